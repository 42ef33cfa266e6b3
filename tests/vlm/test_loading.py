"""Checkpoint folders that cannot be used end in one line that names the mend."""

import json
import shutil

import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.loading import TINY_QWEN, load_model


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(TINY_QWEN, copy)
    return copy


def test_the_embedded_checkpoint_is_an_ordinary_folder(folder):
    from_copy, embedded = load_model(str(folder)), load_model("")
    assert from_copy.fingerprint == embedded.fingerprint
    assert sum(p.numel() for p in from_copy.model.parameters()) < 2_000_000
    weights = sum(file.stat().st_size for file in TINY_QWEN.glob("*.safetensors"))
    assert weights <= 8_000_000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("config.json", "no configuration"),
        ("*.safetensors", "no weights"),
        ("tokenizer*.json", "no tokenizer"),
        ("preprocessor_config.json", "no image processor settings"),
    ],
)
def test_missing_files_are_named(folder, pattern, message):
    for file in folder.glob(pattern):
        file.unlink()
    with pytest.raises(InputError, match=message):
        load_model(str(folder))


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        load_model(str(tmp_path / "nothing"))


def test_another_architecture_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "llama"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not of a qwen2_5_vl model"):
        load_model(str(folder))


def test_weights_that_do_not_fit_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="weights missing or misshapen"):
        load_model(str(folder))


def test_truncated_weights_are_refused(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(folder))


def test_the_fingerprint_follows_the_weights(folder):
    before = load_model(str(folder)).fingerprint
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert load_model(str(folder)).fingerprint != before
