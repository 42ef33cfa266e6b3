"""Checkpoints as they are published: shards, old names, tied and untied heads, bf16, no code."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from qwen_bridge import identity
from qwen_bridge.errors import InputError
from qwen_bridge.hub import TINY_QWEN
from qwen_bridge.loading import load_model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
SMALL_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}


def published(shared, name, folder):
    """A small model of a published config, saved; with the embedded tokenizer."""
    for file in TINY_QWEN.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            shutil.copy(file, folder)
    config = json.loads((shared / "qwen2_5_vl" / f"config_{name}.json").read_text())
    own = json.loads((TINY_QWEN / "config.json").read_text())
    config |= SMALL | {"vocab_size": own["text_config"]["vocab_size"]}
    config |= {key: own[key] for key in own if key.endswith("_token_id")}
    config["vision_config"] |= SMALL_VISION
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
    # A fresh network's norms and biases are all alike; these tell a misplaced tensor.
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


@pytest.fixture(params=["3b", "7b"])
def checkpoint(request, shared, tmp_path):
    published(shared, request.param, tmp_path)
    return tmp_path


def inputs():
    """A prompt with one image of 4 x 8 patches, as the network takes it."""
    image = json.loads((TINY_QWEN / "config.json").read_text())["image_token_id"]
    ids = torch.tensor([[5, 6, *[image] * 8, 7, 8, 9]])
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).int(),
        "pixel_values": torch.randn(32, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 8]]),
    }


@torch.inference_mode()
def logits(model, dtype=torch.float32):
    given = inputs()
    given["pixel_values"] = given["pixel_values"].to(dtype)
    return model(**given).logits.float()


def reference(folder, dtype=torch.float32):
    """The same checkpoint through transformers alone."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def test_tied_and_untied_heads(checkpoint):
    loaded = load_model(str(checkpoint))
    head, table = loaded.model.lm_head.weight, loaded.model.get_input_embeddings().weight
    tied = json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"]
    assert (head.data_ptr() == table.data_ptr()) == tied
    assert torch.equal(head, table) == tied
    torch.testing.assert_close(logits(loaded.model), logits(reference(checkpoint)))


def test_an_untied_head_that_is_missing_is_refused(shared, tmp_path):
    published(shared, "7b", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"weights missing.*lm_head\.weight"):
        load_model(str(tmp_path))


def shard(folder, rename=lambda name: name):
    """Splits the weights into two shards and an index, as large checkpoints are published."""
    weights = {rename(k): v for k, v in load_file(folder / "model.safetensors").items()}
    names = sorted(weights)
    parts = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file, {"format": "pt"})
    index = {key: file for file, keys in parts.items() for key in keys}
    size = sum(tensor.nbytes for tensor in weights.values())
    document = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    (folder / "model.safetensors").unlink()


def published_name(name):
    """The names of the published files: `visual.*` and `model.layers.*`."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


@pytest.mark.parametrize("rename", [lambda name: name, published_name], ids=["new", "published"])
def test_shards(checkpoint, rename):
    whole = load_model(str(checkpoint))
    expected = logits(whole.model)
    shard(checkpoint, rename)
    sharded = load_model(str(checkpoint))
    assert torch.equal(logits(sharded.model), expected)
    copy = checkpoint.parent / f"{checkpoint.name}_moved"
    shutil.copytree(checkpoint, copy)
    assert load_model(str(copy)).fingerprint == sharded.fingerprint


def test_a_missing_shard_is_named(checkpoint):
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 2 shards are not in .*model-00002-of-00002"):
        load_model(str(checkpoint))


def test_an_index_that_is_none_is_named(checkpoint):
    shard(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="is not an index of weights"):
        load_model(str(checkpoint))


def test_pickled_weights_are_never_read(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights.*only safetensors are read"):
        load_model(str(checkpoint))


def test_code_in_a_checkpoint_is_never_run(checkpoint):
    marker = checkpoint / "was_run"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Config: pass\n"
    (checkpoint / "modeling.py").write_text(code)
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((checkpoint / file).read_text())
        names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor")
        content["auto_map"] = dict.fromkeys(names, "modeling.Config")
        (checkpoint / file).write_text(json.dumps(content))
    load_model(str(checkpoint))
    assert not marker.exists()


def test_bfloat16_on_a_cpu(checkpoint):
    loaded = load_model(str(checkpoint), dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    ours = logits(loaded.model, torch.bfloat16)
    theirs = logits(reference(checkpoint, torch.bfloat16), torch.bfloat16)
    exact = logits(load_model(str(checkpoint)).model)
    assert loaded.fingerprint != load_model(str(checkpoint)).fingerprint
    # No further from float32 than transformers' own bf16 is.
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()


def test_bfloat16_scores(make_scorer):
    queries = [e.id for e in make_scorer().dataset.eval[:20]]
    bank = [e.id for e in make_scorer().dataset.bank[:2]]
    exact = make_scorer().score(queries, [bank] * 20)
    rounded = make_scorer(dtype="bfloat16").score(queries, [bank] * 20)
    assert not rounded.reasons
    assert abs(rounded.gt_prob - exact.gt_prob).max() < 0.1
    assert abs(rounded.gt_prob - exact.gt_prob).max() > 0


def digest(folder):
    return identity.checkpoint_digest(folder)


def test_identity_follows_content_only(checkpoint):
    before = digest(checkpoint)
    (checkpoint / "README.md").write_text("words")
    (checkpoint / "training_args.json").write_text("{}")
    assert digest(checkpoint) == before
    for name in ("merges.txt", "config.json", "tokenizer_config.json"):
        content = (checkpoint / name).read_text()
        (checkpoint / name).write_text(content + "\n")
        assert digest(checkpoint) != before, name
        (checkpoint / name).write_text(content)
    assert digest(checkpoint) == before


def test_a_change_in_any_large_tensor_changes_the_identity(tmp_path):
    # Tensors above 1 MiB are hashed in pieces; an adapter changes all of a matrix.
    tensors = {f"t{i}": torch.zeros(1024, 600) for i in range(3)}
    digests = set()
    for changed in (None, *tensors):
        some = {name: t + 0.001 * (name == changed) for name, t in tensors.items()}
        save_file(some, tmp_path / "model.safetensors")
        digests.add(digest(tmp_path))
    assert len(digests) == 4
