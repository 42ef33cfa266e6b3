"""Products of a block of demonstrations with a tile of queries, and the candidates among them.

`HostProducts` does them in NumPy, `DeviceProducts` in JAX on an accelerator; `topk.py` says what
candidates are for. Both give every product that reaches its query's floor, so the search comes to
the same answer with either.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SPARE = 16  # more than K that an accelerator hands back, for near ties


class Pairs(NamedTuple):
    """Pairs of a query and a bank row, sorted by row, without repetition.

    Attributes:
      queries: [P] int64 in [0, B).
      rows: [P] int64 in [0, N).
    """

    queries: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, queries: np.ndarray, rows: np.ndarray, num_queries: int) -> "Pairs":
        """Sorts and makes unique."""
        key = np.unique(np.asarray(rows, np.int64) * max(num_queries, 1) + queries)
        return cls(key % max(num_queries, 1), key // max(num_queries, 1))

    @classmethod
    def none(cls) -> "Pairs":
        """No pairs."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))


class HostProducts:
    """Candidates of a block by NumPy.

    Args:
      features: [B, D'] of the queries.
      tile, block: the largest numbers of queries and rows of a product.
      k: K; a row is no candidate if K rows of its own block beat it. None: the floors are fixed.
      slack: twice the error of a product.
    """

    def __init__(self, features, tile: int, block: int, k: int | None, slack: np.float32):
        self._features, self._k, self._slack = features, k, slack
        size = min(tile, len(features)) * block
        self._scores = np.empty(size, np.float32)
        self._reached = np.zeros(-(-size // 8) * 8, bool)

    def load(self, block: np.ndarray) -> None:
        """Takes the features [n, D'] of the next rows of the bank."""
        self._block = block

    def hits(self, first: int, last: int, excluded: Pairs, floor: np.ndarray) -> tuple:
        """Queries, rows and products that reach the floors of the queries [first, last).

        `floor` rises in place where this block alone has K better rows.
        """
        return self._hits(self._features[first:last], excluded, floor)

    def _hits(self, features, excluded: Pairs, floor: np.ndarray) -> tuple:
        shape = len(self._block), len(features)
        # Rows by queries: BLAS is the faster of the two ways round.
        scores = self._scores[: shape[0] * shape[1]].reshape(shape)
        np.matmul(self._block, features.T, out=scores)
        scores[excluded.rows, excluded.queries] = -np.inf
        hits = self._reaching(scores, floor)
        if self._k is not None and len(hits) > 4 * self._k * shape[1] and shape[0] > self._k:
            kth = np.partition(scores, shape[0] - self._k, axis=0)[shape[0] - self._k]
            np.maximum(floor, kth - self._slack, out=floor)
            hits = self._reaching(scores, floor)
        rows, queries = np.divmod(hits, shape[1])
        return queries, rows, scores.ravel()[hits]

    def _reaching(self, scores: np.ndarray, floor: np.ndarray) -> np.ndarray:
        """Flat indices where scores [n, b] >= floor [b]: few, so eight are ruled out at once."""
        reached = self._reached[: -(-scores.size // 8) * 8]
        reached[scores.size :] = False
        np.greater_equal(scores, floor, out=reached[: scores.size].reshape(scores.shape))
        eights = np.flatnonzero(reached.view(np.uint64))
        if 8 * len(eights) >= scores.size:
            return np.flatnonzero(reached)
        near = (eights[:, None] * 8 + np.arange(8)).ravel()
        return near[reached[near]]


class DeviceProducts(HostProducts):
    """Candidates of a block by JAX: the best few of each query come back, no product else.

    A query with more candidates than that (many near ties) is done again by NumPy.
    """

    def __init__(self, features, tile: int, block: int, k: int | None, slack: np.float32):
        super().__init__(features, tile, block, k, slack)
        self._tile, self._rows = min(tile, len(features)), block
        self._few = min(block, (k or 64) + _SPARE)
        self._tiles = {}
        for first in range(0, len(features), self._tile):
            some = features[first : first + self._tile]
            padding = ((0, self._tile - len(some)), (0, 0))
            self._tiles[first] = jax.device_put(np.pad(some, padding))

    def load(self, block: np.ndarray) -> None:
        super().load(block)
        # A copy: the buffer is filled with the next block while the device may still read.
        padded = np.zeros((self._rows, block.shape[1]), np.float32)
        padded[: len(block)] = block
        self._on_device = jax.device_put(padded)

    def hits(self, first: int, last: int, excluded: Pairs, floor: np.ndarray) -> tuple:
        count = last - first
        size = max(16, 1 << (len(excluded.rows) - 1).bit_length())  # few shapes to compile
        pairs = np.full((2, size), max(self._tile, self._rows), np.int32)  # outside: ignored
        pairs[:, : len(excluded.rows)] = excluded.queries, excluded.rows
        scores, rows = _device_best(
            self._tiles[first], self._on_device, len(self._block), *pairs, few=self._few
        )
        scores, rows = np.array(scores)[:count], np.array(rows)[:count]
        if self._k is not None and self._k <= self._few:
            np.maximum(floor, scores[:, self._k - 1] - self._slack, out=floor)
        reached = scores >= floor[:, None]
        crowded = np.flatnonzero(reached[:, -1]) if self._few < len(self._block) else []
        reached[crowded] = False
        query, place = np.nonzero(reached)
        found = [(query, rows[query, place], scores[query, place])]
        if len(crowded):
            local = np.full(count, -1)
            local[crowded] = np.arange(len(crowded))
            own = local[excluded.queries] >= 0
            masked = Pairs(local[excluded.queries[own]], excluded.rows[own])
            some = floor[crowded]
            query, row, score = self._hits(self._features[first + crowded], masked, some)
            floor[crowded] = some
            found.append((crowded[query], row, score))
        return tuple(np.concatenate(columns) for columns in zip(*found))


@functools.partial(jax.jit, static_argnames="few")
def _device_best(queries, block, count, excluded_queries, excluded_rows, *, few: int):
    """The `few` best products [b, few] of each query with the first `count` rows, and the rows."""
    scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)  # no TF32
    scores = scores.at[excluded_queries, excluded_rows].set(-jnp.inf, mode="drop")
    scores = jnp.where(jnp.arange(block.shape[0]) < count, scores, -jnp.inf)
    return jax.lax.top_k(scores, few)
