"""What is set on a GPU is set before a model runs there, and nothing is on a CPU."""

import published
import pytest
import torch

from qwen_bridge import encoders, loading
from qwen_bridge.benchmark import models
from qwen_bridge.gpu_settings import set_for_scoring

RANDOM = {"dtype": torch.bfloat16, "seed": 0}


def settings():
    """Whether convolutions of float32 round, and whether cuDNN's attention may run."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def torch_defaults():
    """PyTorch's own settings, also afterwards."""

    def restore():
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(True)

    restore()
    yield
    restore()


@pytest.mark.usefixtures("torch_defaults")
def test_a_gpu_is_set_and_a_cpu_is_not():
    set_for_scoring("cpu")
    assert settings() == (True, True)
    set_for_scoring("cuda:1")
    assert settings() == (False, False)


@pytest.mark.parametrize(
    ("module", "load"),
    [
        (loading, lambda folder: loading.load_model("")),
        (models, lambda folder: models.random_model("tiny", device="cpu", **RANDOM)),
        (encoders, lambda folder: encoders.load_encoder("clip", str(folder), None, "cpu")),
    ],
    ids=["checkpoint", "random", "encoder"],
)
def test_every_model_asks_for_its_device(module, load, tmp_path, monkeypatch):
    published.clip_folder(tmp_path)
    asked = []
    monkeypatch.setattr(module, "set_for_scoring", asked.append)
    load(tmp_path)
    assert asked == ["cpu"]
