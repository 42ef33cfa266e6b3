"""The vision tower: batched windows against the model's own loop, and the cache."""

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from qwen_bridge.loading import TINY_QWEN, load_model
from qwen_bridge.vision import VisionCache, batch_equal_windows


def test_batched_windows_equal_the_loop():
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 24,
            "fullatt_block_indexes": [1],
        }
    ).vision_config
    config._attn_implementation = "sdpa"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    grids = torch.tensor([[1, 2, 2], [1, 8, 12], [1, 18, 10], [1, 2, 2], [1, 8, 8]])
    pixels = torch.randn(int(grids.prod(1).sum()), 1176)
    with torch.inference_mode():
        expected = tower(pixels, grid_thw=grids)
        batch_equal_windows(tower)
        actual = tower(pixels, grid_thw=grids)
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(actual[name], expected[name], atol=2e-6, rtol=1e-5)


def test_cache_runs_each_image_once_and_reports_bad_ones():
    loaded = load_model(str(TINY_QWEN))
    reads = []

    def load_image(key):
        reads.append(key)
        if key == "bad":
            raise OSError("cannot identify image file")
        rng = np.random.default_rng(len(key))
        size = (28, 28) if key != "wide" else (84, 56)
        return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8))

    cache = VisionCache(loaded.model.model.visual, loaded.image_processor, load_image)
    features, failed = cache.fetch(["a", "wide", "bad", "a"])
    assert failed == {"bad": "image bad: cannot identify image file"}
    assert features["a"].grid == (1, 1)
    assert features["a"].tokens.shape == (1, 128)
    assert features["wide"].grid == (2, 3)
    assert features["wide"].tokens.shape == (6, 128)
    assert features["wide"].mean.shape == (64,)
    again, _ = cache.fetch(["wide", "bad"])
    assert again["wide"] is features["wide"]
    assert reads == ["a", "wide", "bad"]
