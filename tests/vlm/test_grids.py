"""The arithmetic of image sizes, against transformers' processor."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from qwen_bridge.errors import InputError
from qwen_bridge.grids import check_pixels, image_grid
from qwen_bridge.loading import load_model


def test_grids_are_those_of_the_processor():
    rng = np.random.default_rng()
    for _ in range(2000):
        width, height = (int(x) for x in np.exp(rng.uniform(np.log(10), np.log(3000), 2)))
        low = int(rng.integers(784, 100_000))
        high = int(rng.integers(low, 400_000))
        if max(width, height) > 200 * min(width, height):
            continue
        expected = smart_resize(height, width, 28, low, high)
        rows, columns = image_grid(width, height, min_pixels=low, max_pixels=high)
        assert (rows * 14, columns * 14) == tuple(expected), (width, height, low, high)


def test_a_coco_picture_by_hand():
    # 640 x 480 = 307,200 pixels; shrunk by sqrt(307,200 / 200,704) = 1.237 to 517 x 388,
    # that is 18 x 13 whole tokens of 28 pixels.
    grid = image_grid(640, 480, min_pixels=112_896, max_pixels=200_704)
    assert grid == (2 * 13, 2 * 18)


def test_an_image_like_a_thread_is_refused():
    with pytest.raises(InputError, match="1 x 10000"):
        image_grid(1, 10_000, min_pixels=784, max_pixels=200_704)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1000, 783, "--max_pixels=783 is less than one merged token"),
        (200_000, 100_000, "--min_pixels=200000 exceeds --max_pixels=100000"),
    ],
)
def test_bounds_that_no_image_meets(low, high, words):
    with pytest.raises(InputError, match=words):
        check_pixels(low, high)
    with pytest.raises(InputError, match=words):
        load_model("", min_pixels=low, max_pixels=high)


def test_a_bound_that_contradicts_the_checkpoints_own_is_refused():
    with pytest.raises(InputError, match="--min_pixels=60000 exceeds --max_pixels=50176"):
        load_model("", min_pixels=60_000)


def test_bounds_change_grids_and_identity():
    plain = load_model("")
    bounded = load_model("", min_pixels=4 * 784, max_pixels=9 * 784)
    assert plain.fingerprint != bounded.fingerprint
    rng = np.random.default_rng(0)
    for size in ((28, 28), (61, 35), (200, 90), (84, 84)):
        image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
        out = bounded.image_processor(images=[image], return_tensors="np")
        grid = image_grid(*size, min_pixels=4 * 784, max_pixels=9 * 784)
        assert tuple(out["image_grid_thw"][0]) == (1, *grid)
        assert 4 <= grid[0] * grid[1] // 4 <= 9
