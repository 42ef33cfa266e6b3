"""How large an image becomes: pixels to a grid of patches. Pure arithmetic, no torch.

The image processor does the same; here it is for those who must know the number of tokens before
any image is decoded (the cost model), and for the check of `--min_pixels` and `--max_pixels`.
"""

import math

from qwen_bridge.errors import InputError

PATCH_SIZE, MERGE_SIZE = 14, 2
MAX_ASPECT = 200  # the processor refuses longer images


def image_grid(
    width: int,
    height: int,
    *,
    min_pixels: int,
    max_pixels: int,
    patch_size: int = PATCH_SIZE,
    merge_size: int = MERGE_SIZE,
) -> tuple[int, int]:
    """The grid of patches that an image is resized to.

    Each side is rounded to a multiple of `patch_size * merge_size`; where the area then leaves
    [min_pixels, max_pixels], both sides are scaled alike, rounding back into the range.

    Args:
      width: of the image, pixels.
      height: of the image, pixels.
      min_pixels: smallest area, pixels.
      max_pixels: largest area, pixels.
      patch_size: side of a patch, pixels.
      merge_size: side of a merged token, patches.

    Returns:
      (rows, columns) of patches, both multiples of `merge_size`.

    Raises:
      InputError: one side is more than 200 times the other.

    Source: Qwen2-VL (arXiv:2409.12191), naive dynamic resolution.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"an image of {width} x {height} pixels is longer than 1 : {MAX_ASPECT}")
    unit = patch_size * merge_size
    sides = [round(side / unit) * unit for side in (height, width)]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        sides = [max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)]
    elif math.prod(sides) < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        sides = [math.ceil(side * grow / unit) * unit for side in (height, width)]
    return sides[0] // patch_size, sides[1] // patch_size


def check_pixels(
    min_pixels: int,
    max_pixels: int,
    *,
    patch_size: int = PATCH_SIZE,
    merge_size: int = MERGE_SIZE,
) -> None:
    """Refuses bounds that no image could meet.

    Raises:
      InputError: the bounds are the wrong way round, or below one merged token.
    """
    unit = (patch_size * merge_size) ** 2
    if max_pixels < unit:
        raise InputError(
            f"--max_pixels={max_pixels} is less than one merged token "
            f"({patch_size * merge_size} x {patch_size * merge_size} = {unit} pixels); raise it"
        )
    if min_pixels > max_pixels:
        raise InputError(
            f"--min_pixels={min_pixels} exceeds --max_pixels={max_pixels}; give both, the smaller "
            "one as --min_pixels (what is not given is as preprocessor_config.json says)"
        )
