"""LoRA adapters: merged into the weights, checked against peft's own unmerged forward."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from qwen_bridge.adapters import check_adapter
from qwen_bridge.errors import InputError
from qwen_bridge.hub import TINY_QWEN
from qwen_bridge.identity import adapter_digest
from qwen_bridge.loading import load_model

# peft's own call of what this transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
RANK = 4
TARGETS = ["q_proj", "v_proj", "down_proj", "qkv"]  # of the language model and the vision tower


@torch.inference_mode()
def logits(model):
    image = model.config.image_token_id
    ids = torch.tensor([[5, 6, image, image, 7, 8, 9]])
    generator = torch.Generator().manual_seed(1)
    return model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == image).int(),
        pixel_values=torch.randn(8, 1176, generator=generator),
        image_grid_thw=torch.tensor([[1, 2, 4]]),
    ).logits


@pytest.fixture
def trained(tmp_path):
    """An adapter of the embedded model, saved by peft, and the logits it should give."""
    peft = pytest.importorskip("peft", reason="the extra `adapter` is not installed")
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY_QWEN)
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS)
    adapted = peft.get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    return folder, logits(adapted.eval())


def rewrite(folder, change):
    """Replaces the adapter's tensors by `change` of them."""
    file = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)


def reconfigure(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_merged_is_what_peft_computes_unmerged(trained):
    folder, expected = trained
    merged, plain = load_model("", adapter=str(folder)), load_model("")
    torch.testing.assert_close(logits(merged.model), expected, atol=1e-4, rtol=1e-4)
    assert (logits(plain.model) - expected).abs().max() > 0.1
    assert [n for n, _ in merged.model.named_parameters()] == [
        n for n, _ in plain.model.named_parameters()
    ]
    assert merged.model.lm_head.weight is merged.model.get_input_embeddings().weight


def test_merged_is_the_formula_written_out(trained):
    folder, _ = trained
    tensors = load_file(folder / "adapter_model.safetensors")
    low = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{}.weight"
    update = tensors[low.format("B")] @ tensors[low.format("A")] * (8 / RANK)
    merged, plain = (
        load_model("", adapter=adapter).model.model.language_model.layers[1].self_attn.q_proj
        for adapter in (str(folder), "")
    )
    torch.testing.assert_close(merged.weight, plain.weight + update)


def test_adapters_of_older_transformers_carry_other_names(trained):
    folder, expected = trained

    def old(name):
        name = name.replace("model.model.language_model.", "model.model.")
        return name.replace("model.model.visual.", "model.visual.")

    rewrite(folder, lambda tensors: {old(name): t for name, t in tensors.items()})
    merged = load_model("", adapter=str(folder))
    torch.testing.assert_close(logits(merged.model), expected, atol=1e-4, rtol=1e-4)


def test_the_adapter_is_part_of_the_identity(trained, tmp_path):
    folder, _ = trained
    first = load_model("", adapter=str(folder)).fingerprint
    assert first != load_model("").fingerprint
    moved = folder.rename(tmp_path / "moved")
    reconfigure(moved, base_model_name_or_path="/elsewhere", target_modules=TARGETS[::-1])
    assert load_model("", adapter=str(moved)).fingerprint == first
    before = adapter_digest(moved)
    reconfigure(moved, lora_alpha=16)
    assert adapter_digest(moved) != before
    before = adapter_digest(moved)
    rewrite(moved, lambda tensors: {name: t + 0.01 for name, t in tensors.items()})
    assert adapter_digest(moved) != before


def widened(tensors):
    return {n: t if len(t) == RANK else torch.zeros(2 * len(t), RANK) for n, t in tensors.items()}


def shortened(tensors):
    return dict(list(tensors.items())[2:])


def deepened(tensors):
    name = "base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight"
    return tensors | {name: next(iter(tensors.values())).clone()}


@pytest.mark.parametrize("change", [widened, shortened, deepened])
def test_an_adapter_of_another_model_is_refused(trained, change):
    folder, _ = trained
    reconfigure(folder, base_model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct")
    rewrite(folder, change)
    words = r"--adapter=.* was trained for Qwen/Qwen2.5-VL-7B-Instruct and does not fit --model"
    with pytest.raises(InputError, match=words) as error:
        load_model("", adapter=str(folder))
    assert "\n" not in str(error.value)


def test_modules_that_the_model_does_not_have(trained):
    folder, _ = trained
    reconfigure(folder, target_modules=["no_such_module"])
    with pytest.raises(InputError, match="does not fit --model"):
        load_model("", adapter=str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "of type IA3; only LORA"),
        ({"modules_to_save": ["lm_head"]}, "holds whole modules beside LoRA .lm_head."),
    ],
)
def test_adapters_that_cannot_be_merged(trained, changes, words):
    reconfigure(trained[0], **changes)
    with pytest.raises(InputError, match=words):
        load_model("", adapter=str(trained[0]))


def test_files_that_are_missing_or_pickled(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(InputError, match="is not a folder"):
        check_adapter(tmp_path / "nothing")
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors; only safetensors"):
        load_model("", adapter=str(folder))
    (folder / "adapter_config.json").write_text("[]")
    weights.touch()
    with pytest.raises(InputError, match=r"adapter_config\.json is not peft's"):
        check_adapter(folder)


def test_without_peft_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"needs peft: pip install -c constraints\.txt peft"):
        check_adapter(tmp_path)
