"""Embeddings that stay on the disk: rows are put together from shared vectors when they are read.

443,757 demonstrations of VQAv2 have 82,783 images and far fewer different texts than questions.
Written out as rows, their embeddings by the 3B model would take 9.5 GB; as vectors, each once,
some 2 GB, of which the operating system keeps in memory what is being used.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 4096  # rows that a pass over all of them holds in memory


class Gathered(NamedTuple):
    """One part of the embeddings.

    Attributes:
      columns: [first, past-the-last) of the part.
      vectors: float32 `[M, width]`, usually memory-mapped.
      rows: int64 `[N]`, which vector each embedding has; -1 for none, which is zeros.
    """

    columns: tuple[int, int]
    vectors: np.ndarray
    rows: np.ndarray


class GatheredRows:
    """`[N, D]` float32 embeddings, read-only; indexing returns an ordinary array.

        rows[i], rows[2:7], rows[[3, 1]], rows[mask], rows[2:7, 10:20]

    Columns that no part covers are zero. `np.asarray(rows)` reads all of them into memory.

    Args:
      count: `N`.
      dim: `D`.
      parts: of disjoint columns.
    """

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, count: int, dim: int, parts: list[Gathered]):
        for part in parts:
            low, high = part.columns
            if not 0 <= low < high <= dim or part.vectors.shape[1] != high - low:
                raise ValueError(f"columns {part.columns} of {dim} for {part.vectors.shape}")
            if part.rows.shape != (count,):
                raise ValueError(f"rows {part.rows.shape} for {count} embeddings")
        self.shape = (count, dim)
        self._parts = parts
        self._positions = np.arange(count)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        if not isinstance(columns, slice) or columns.step not in (None, 1):
            raise TypeError(f"columns {columns!r} must be a slice without a step")
        first, last, _ = columns.indices(self.shape[1])
        # NumPy itself says which rows an index means.
        chosen = self._positions[rows]
        out = np.zeros((*chosen.shape, max(last - first, 0)), np.float32)
        for (low, high), vectors, where in self._parts:
            start, stop = max(low, first), min(high, last)
            if start < stop:
                picked = where[chosen]
                known = picked >= 0
                part = vectors[picked[known]]
                out[..., start - first : stop - first][known] = part[:, start - low : stop - low]
        return out

    def take(self, rows: Sequence[int]) -> "GatheredRows":
        """Some of the rows, as they stay on the disk."""
        parts = [part._replace(rows=part.rows[rows]) for part in self._parts]
        return GatheredRows(len(rows), self.shape[1], parts)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("gathered rows have no array of their own; a copy is needed")
        out = np.empty(self.shape, self.dtype)
        for first in range(0, len(self), _BLOCK):
            out[first : first + _BLOCK] = self[first : first + _BLOCK]
        return out if dtype is None else out.astype(dtype, copy=False)

    def mean(self, axis: int = 0, dtype=np.float64, out=None) -> np.ndarray:
        """Mean of all rows `[D]`; `np.mean(rows, axis=0)` comes here too.

        Each vector is read once, and counts as often as it is used.

        Raises:
          ValueError: another axis, or an array to write to.
        """
        if axis != 0 or out is not None:
            raise ValueError(f"mean(axis={axis}, out={out!r}): only axis=0 into a new array")
        total = np.zeros(self.shape[1], np.float64)
        for (low, high), vectors, rows in self._parts:
            uses = np.bincount(rows[rows >= 0], minlength=len(vectors)).astype(np.float64)
            for first in range(0, len(vectors), _BLOCK):
                block = slice(first, first + _BLOCK)
                if uses[block].any():
                    total[low:high] += uses[block] @ vectors[block].astype(np.float64)
        return (total / len(self)).astype(np.float64 if dtype is None else dtype, copy=False)
