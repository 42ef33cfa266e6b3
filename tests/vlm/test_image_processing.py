"""How a file becomes patches: our path, the transformers processor, and the rules written out.

`VisionCache.patches` opens an image by the data set's own opener. It must give bit for bit what
the transformers processor gives for the file as Pillow opens it, transparency shown on white;
and, up to float rounding, what the published rules give when they are written out here.
"""

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from qwen_bridge.loading import load_model
from qwen_bridge.vision import VisionCache
from qwen_bridge.vqa.images import image_folders

PATCH, MERGE, FRAMES = 14, 2, 2
SIDE = PATCH * MERGE
LIMITS = [(None, None), (None, 50_176), (200_704, 401_408)]


def resized(height, width, least, most):
    """Height and width in multiples of 28, the ratio kept, pixels between the limits."""
    high, wide = (round(side / SIDE) * SIDE for side in (height, width))
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (max(SIDE, int(side / shrink / SIDE) * SIDE) for side in (height, width))
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * grow / SIDE) * SIDE for side in (height, width))
    return high, wide


def by_the_rules(image, settings, least, most):
    """Patches [n, 1176] and grid of an upright RGB picture, one patch after the other."""
    high, wide = resized(image.height, image.width, least, most)
    pixels = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC), np.float64) / 255
    pixels = (pixels - settings["image_mean"]) / settings["image_std"]
    rows, columns = high // PATCH, wide // PATCH
    patches = []
    for top in range(0, rows, MERGE):
        for left in range(0, columns, MERGE):
            for row in range(top, top + MERGE):
                for column in range(left, left + MERGE):
                    y, x = row * PATCH, column * PATCH
                    patch = pixels[y : y + PATCH, x : x + PATCH].transpose(2, 0, 1)
                    patches.append(np.stack([patch] * FRAMES, axis=1).ravel())
    return np.array(patches), (1, rows, columns)


@pytest.fixture(scope="module")
def loaders(random_qwen):
    """Loaded checkpoints by their limits of pixels, as the flags give them."""
    return {
        limits: load_model(str(random_qwen), min_pixels=limits[0], max_pixels=limits[1])
        for limits in LIMITS
    }


def check(path, limits, loaders, shared):
    settings = json.loads((shared / "qwen2_5_vl" / "preprocessor_config.json").read_text())
    least, most = (
        limit or settings[name] for limit, name in zip(limits, ("min_pixels", "max_pixels"))
    )
    folders = image_folders(path.parent, None)
    cache = VisionCache(None, loaders[limits].image_processor, folders)
    pixels, grid = cache.patches(f"bank/{path.name}")
    assert pixels.dtype == np.float32

    processor = Qwen2VLImageProcessorPil.from_pretrained(shared / "qwen2_5_vl")
    processor.size = {"shortest_edge": least, "longest_edge": most}
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands():  # Which transformers 5.17 drops, and 5.23 shows on white.
            white = Image.new("RGB", upright.size, "white")
            white.paste(upright.convert("RGB"), mask=upright.getchannel("A"))
            upright = white
        theirs = processor(images=[upright], return_tensors="np")
        assert grid == tuple(theirs["image_grid_thw"][0])
        np.testing.assert_array_equal(pixels, theirs["pixel_values"])
        expected, expected_grid = by_the_rules(upright.convert("RGB"), settings, least, most)
    assert grid == expected_grid
    # One part in 255 of a colour is a step of 0.014; this is rounding.
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=2e-6)


def photographs(shared):
    paths = sorted((shared / "vqav2_mini" / "train2014").glob("*.jpg"))
    assert len(paths) == 328
    return paths


@pytest.mark.parametrize("limits", LIMITS)
def test_photographs(shared, loaders, limits):
    for path in photographs(shared)[::17]:
        check(path, limits, loaders, shared)


@pytest.mark.slow
@pytest.mark.parametrize("limits", LIMITS)
def test_all_328_photographs(shared, loaders, limits):
    for path in photographs(shared):
        check(path, limits, loaders, shared)


def picture(mode, size=(75, 51)):
    """A picture of a mode, without symmetry, that varies in every band."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    content = np.random.default_rng(len(mode)).integers(0, 256, (size[1], size[0], bands), np.uint8)
    content[: size[1] // 2, :, 0] = 20
    return Image.merge(mode, [Image.fromarray(band) for band in np.moveaxis(content, -1, 0)])


@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "grey.png"), ("RGBA", "half.png"), ("CMYK", "print.jpg"), ("LA", "faint.png")],
)
def test_other_modes(shared, loaders, tmp_path, mode, name):
    picture(mode).save(tmp_path / name)
    check(tmp_path / name, LIMITS[0], loaders, shared)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_that_says_how_it_was_held(shared, loaders, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture("RGB").save(tmp_path / "phone.png", exif=exif)
    check(tmp_path / "phone.png", LIMITS[0], loaders, shared)
    shown = image_folders(tmp_path, None)("bank/phone.png")
    assert shown.size == ((75, 51) if orientation <= 4 else (51, 75))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (13, 700), (4000, 30), (28, 28), (42, 41)])
def test_odd_sizes(shared, loaders, tmp_path, size):
    picture("RGB", size).save(tmp_path / "odd.png")
    check(tmp_path / "odd.png", LIMITS[1], loaders, shared)
