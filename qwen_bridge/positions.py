"""Positions of tokens in Qwen2.5-VL: M-RoPE, three coordinates a token.

Text advances all three coordinates together. An image of `h x w` merged tokens keeps its time,
runs through rows and columns, and takes `max(h, w)` steps of the text's counter. Positions
depend only on what stands before, so a prefix can be cached. We compute them ourselves:
without `mm_token_type_ids` the model silently falls back to one coordinate.
"""

import numpy as np


def image_positions(start: int, height: int, width: int) -> np.ndarray:
    """Returns int64 `[3, height * width]` positions of an image's merged tokens, row by row."""
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.stack([np.zeros_like(rows), rows, columns]) + start


def segment_positions(
    ids: np.ndarray, image_token: int, grid: tuple[int, int] | None, start: int
) -> tuple[np.ndarray, int]:
    """Positions of one segment's tokens, its image already expanded.

    Args:
      ids: int64 `[L]` token ids, with `grid[0] * grid[1]` consecutive image tokens if any.
      image_token: id of `<|image_pad|>`.
      grid: (height, width) of the image in merged tokens, or None.
      start: the counter before the segment.

    Returns:
      int64 `[3, L]` positions, and the counter after the segment.
    """
    length = len(ids)
    if grid is None:
        return np.broadcast_to(np.arange(length) + start, (3, length)).copy(), start + length
    first = int(np.argmax(ids == image_token))
    count = grid[0] * grid[1]
    after = start + first + max(grid)
    rest = length - first - count
    positions = np.concatenate(
        [
            np.broadcast_to(np.arange(first) + start, (3, first)),
            image_positions(start + first, *grid),
            np.broadcast_to(np.arange(rest) + after, (3, rest)),
        ],
        axis=1,
    )
    return positions, after + rest
