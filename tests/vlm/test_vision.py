"""The vision tower: batched windows against the model's own loop, and the cache."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from qwen_bridge.errors import InputError
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


SIZES = {"wide": (84, 56), "large": (112, 84)}


def random_image(key):
    rng = np.random.default_rng(list(key.encode()))
    size = SIZES.get(key, (28, 28))
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8))


@pytest.fixture(scope="module")
def tiny():
    return load_model(str(TINY_QWEN))


@pytest.fixture
def make_cache(tiny):
    """Makes caches, with the list of images read and the list of patches of each pass."""

    def make(load_image=random_image, **options):
        reads, passes = [], []

        def load(key):
            reads.append(key)
            return load_image(key)

        visual = tiny.model.model.visual
        cache = VisionCache(visual, tiny.image_processor, load, **options)
        run = cache._run

        def counted(batch):
            passes.append([len(pixels) for _, pixels, _ in batch])
            return run(batch)

        cache._run = counted
        return cache, reads, passes

    return make


def test_cache_runs_each_image_once_and_reports_bad_ones(make_cache):
    def load_image(key):
        if key == "bad":
            raise OSError("cannot identify image file")
        if key == "gone":
            raise InputError("images/gone.jpg: no such image; check --bank_images")
        return random_image(key)

    cache, reads, _ = make_cache(load_image)
    features, failed = cache.fetch(["a", "wide", "bad", "a", "gone"])
    assert failed == {
        "bad": "image bad: cannot identify image file; mend the file or leave it out",
        "gone": "image gone: images/gone.jpg: no such image; check --bank_images",
    }
    assert features["a"].grid == (1, 1)
    assert features["a"].tokens.shape == (1, 128)
    assert features["wide"].grid == (2, 3)
    assert features["wide"].tokens.shape == (6, 128)
    again, failed = cache.fetch(["wide", "bad"])
    assert again["wide"] is features["wide"]
    assert list(failed) == ["bad"]
    assert sorted(reads) == ["a", "bad", "gone", "wide"]


def test_images_are_read_while_the_tower_is_at_work(make_cache):
    """The third image is read only once the first pass is under way, which waits for it."""
    under_way, read = threading.Event(), threading.Event()

    def load_image(key):
        if key == "third":
            assert under_way.wait(20)
            read.set()
        return random_image(key)

    cache, reads, passes = make_cache(load_image, batch_patches=4)
    run = cache._run

    def watched(batch):
        under_way.set()
        assert read.wait(20), "nothing was read during the pass"
        return run(batch)

    cache._run = watched
    features, failed = cache.fetch(["first", "second", "third"])
    assert (len(features), failed) == (3, {})
    assert reads == ["first", "second", "third"]
    assert passes == [[4], [4], [4]]


def test_means_are_of_the_towers_states_and_nothing_is_kept(make_cache, tiny):
    cache, reads, passes = make_cache(batch_patches=30)
    keys = ["a", "wide", "b", "large", "a", "c"]
    means, failed = cache.means(keys)
    assert failed == {}
    assert sorted(reads) == ["a", "b", "c", "large", "wide"]
    assert means.shape == (6, 64)
    assert means.dtype == np.float32
    for key, mean in zip(keys, means):
        pixels, grid = cache.patches(key)
        with torch.inference_mode():
            out = tiny.model.model.visual(torch.from_numpy(pixels), grid_thw=torch.tensor([grid]))
        np.testing.assert_allclose(mean, out.last_hidden_state.mean(0).numpy(), atol=1e-5)
    assert len(cache.kept) == 0
    # Passes of many images, each full once it has 30 patches: 4 + 24 + 4, 48, 4.
    assert passes == [[4, 24, 4], [48], [4]]


def test_an_image_that_cannot_be_read_is_zero_and_named(make_cache):
    def load_image(key):
        if key == "bad":
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return random_image(key)

    cache, _, _ = make_cache(load_image)
    means, failed = cache.means(["a", "bad", "b", "bad"])
    reason = "image bad: absolute aspect ratio must be smaller than 200"
    assert failed == {"bad": f"{reason}; mend the file or leave it out"}
    assert not means[[1, 3]].any()
    np.testing.assert_allclose(means[[0, 2]], cache.means(["a", "b"])[0], atol=1e-5)
    means, failed = cache.means(["bad"])
    assert (means.any(), list(failed)) == (False, ["bad"])


def test_kept_features_stay_under_the_budget_and_do_not_depend_on_it(make_cache):
    keys = [f"k{i}" for i in range(12)] + ["wide", "large"]
    roomy, _, _ = make_cache()
    expected, _ = roomy.fetch(keys)
    one = expected["k0"].bytes
    tight, reads, _ = make_cache(cache_bytes=5 * one)
    rng = np.random.default_rng(0)
    for _ in range(30):
        some = [keys[i] for i in rng.integers(0, len(keys), 4)]
        features, failed = tight.fetch(some)
        assert not failed
        for key in some:
            assert features[key].grid == expected[key].grid
            torch.testing.assert_close(
                features[key].tokens, expected[key].tokens, atol=2e-5, rtol=1e-5
            )
        assert tight.kept.bytes <= 5 * one
        # A feature owns its memory: none keeps the batch that it was computed in.
        assert all(f.tokens.untyped_storage().nbytes() == f.bytes for f in features.values())
    assert tight.kept.evictions > 20
    assert len(reads) > 40  # forgotten images are read again
    none, _, _ = make_cache(cache_bytes=0)
    features, _ = none.fetch(keys)
    assert set(features) == set(keys)
    assert none.kept.bytes == 0
