"""How alike a query and a demonstration are: the weighted mean of the cosines of their parts.

Embeddings are `[N, D]` arrays with named column ranges, `parts = {"image": (0, 64), "question":
(64, 128)}`. No part outvotes another by its width or its norm. A bank may be a memory-mapped file
larger than memory: everything here reads it in blocks and copies none of it whole.

The similarity of a pair is *defined* by `similarity_features` and `exact_similarity`: float64 sums
in an order that depends on nothing but the width of the parts. It is therefore bit-equal whatever
batch, block or device a pair was met in.
"""

import mmap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lever_jax.errors import InputError

Parts = Mapping[str, tuple[int, int]]
Weights = Mapping[str, float]

_BLOCK_BYTES = 2**20  # of float64: what stays in a core's cache


class Columns(NamedTuple):
    """Columns [start, stop) of a part that has weight; the weights of all of them sum to 1."""

    start: int
    stop: int
    weight: float


def weighted_columns(parts: Parts, weights: Weights) -> list[Columns]:
    """The columns that a similarity reads.

    Args:
      parts: name -> (first, past-the-last) column.
      weights: name -> weight >= 0; a part not named has weight 0. Only their ratios matter.

    Raises:
      InputError: a weight is negative or names no part, or all are zero.
    """
    for name, weight in weights.items():
        if name not in parts:
            raise InputError(
                f"similarity weight {name!r} names no part of the embeddings; "
                f"their parts are {', '.join(parts)}"
            )
        if not weight >= 0:
            raise InputError(f"similarity weight {name}={weight} must be 0 or more")
    total = sum(weights.values())
    if total == 0:
        raise InputError(
            f"all similarity weights are 0; give one of {', '.join(parts)} a positive weight"
        )
    return [Columns(*parts[name], weight / total) for name, weight in weights.items() if weight > 0]


def similarity_features(
    embeddings: np.ndarray, parts: Parts, weights: Weights, mean: np.ndarray | None = None
) -> np.ndarray:
    """Rows whose dot product is the similarity: unit parts, each scaled by sqrt(its weight).

    Args:
      embeddings: [N, D].
      parts, weights: as in `weighted_columns`.
      mean: [D] subtracted first (the bank's mean, to centre), or None. A part that is then all
        zeros is similar to nothing (cosine 0).

    Returns:
      [N, D'] float32, the columns of the parts that have weight.

    Raises:
      InputError: as in `weighted_columns`.
    """
    used = weighted_columns(parts, weights)
    width = sum(stop - start for start, stop, _ in used)
    features = np.empty((len(embeddings), width), np.float32)
    for rows in _blocks(len(embeddings), width):
        column = 0
        for start, stop, weight in used:
            part = np.array(embeddings[rows, start:stop], np.float64)
            if mean is not None:
                part -= mean[start:stop]
            norm = np.sqrt((part * part).sum(axis=1, keepdims=True))
            part *= np.sqrt(weight) / np.where(norm > 0, norm, 1.0)
            features[rows, column : column + stop - start] = part
            column += stop - start
    return features


def exact_similarity(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Dot products of features, row by row; one of the two may be a single row.

    Args:
      features: [n, D'] or [1, D'] from `similarity_features`.
      others: [n, D'] likewise.

    Returns:
      [n] float64.
    """
    exact = np.empty(len(others))
    for rows in _blocks(*others.shape):
        left = features if len(features) == 1 else features[rows]
        exact[rows] = (others[rows].astype(np.float64) * left).sum(axis=1)
    return exact


def similarity(
    query_embeddings: np.ndarray,
    bank_embeddings: np.ndarray,
    parts: Parts,
    weights: Weights,
    mean: np.ndarray | None = None,
) -> np.ndarray:
    """Weighted mean of the cosines of the parts, of every query with every demonstration.

    sim(q, d) = sum_p w_p * cos(q_p - mean_p, d_p - mean_p) / sum_p w_p

    Args:
      query_embeddings: [B, D].
      bank_embeddings: [N, D].
      parts, weights, mean: as in `similarity_features`.

    Returns:
      [B, N] float32 in [-1, 1].
    """
    queries = similarity_features(query_embeddings, parts, weights, mean)
    return queries @ similarity_features(bank_embeddings, parts, weights, mean).T


def column_mean(embeddings: np.ndarray) -> np.ndarray:
    """Mean of the rows, float32 [D]; summed in float64, block by block."""
    total = np.zeros(embeddings.shape[1])
    for rows in _blocks(*embeddings.shape, bytes_at_a_time=2**23):
        total += embeddings[rows].sum(axis=0, dtype=np.float64)
        release(embeddings)
    return (total / max(len(embeddings), 1)).astype(np.float32)


def release(array: np.ndarray) -> None:
    """Unmaps the pages of a memory-mapped file that were read, which else count as our memory.

    The system keeps them cached and gives them back without reading the disk again.
    """
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    # A copy-on-write map would lose what was written to it.
    if array is not None and array.mode != "c" and isinstance(array._mmap, mmap.mmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)


def _blocks(count: int, width: int, bytes_at_a_time: int = _BLOCK_BYTES) -> Iterator[slice]:
    step = max(1, bytes_at_a_time // (8 * max(width, 1)))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))
