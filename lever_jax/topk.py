"""Exact search of a large bank: the K most similar rows, or all rows above a threshold.

The bank is read in blocks and never copied; what the search itself holds stays within a budget.
float32 products of a block of demonstrations with a tile of queries find candidates, and every
candidate is scored again by the float64 definition in `similarity.py`. Candidates are taken within
a bound on the roundings of a product, so no row of the answer is missed; and the order (higher
similarity, then lower row) depends on nothing but query and bank: not on blocks, budget, threads
or device.

The products run on the accelerator if JAX has one, else in NumPy.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lever_jax.errors import InputError
from lever_jax.products import DeviceProducts, HostProducts, Pairs
from lever_jax.similarity import (
    Parts,
    Weights,
    exact_similarity,
    release,
    similarity_features,
    weighted_columns,
)

_LOWEST = np.float32(-2.0)  # below every similarity, above the -inf of an excluded pair
_BLOCK, _TILE = 4096, 1024  # rows and queries of one product, where the budget allows
_SCORE_BYTES = 33  # a product takes with it, when every one of a tile is a candidate
_BUFFER = 6  # candidates kept a query, in K
_NO_BAR = contextlib.nullcontext(lambda count: None)


class Search:
    """Queries against a bank by one similarity.

    Args:
      queries: [B, D].
      bank: [N, D], in memory or memory-mapped; only the columns with weight are read.
      parts, weights: as in `similarity.weighted_columns`.
      mean: [D] subtracted from both sides, used as float32; or None.
      memory: bytes that a search may hold beside its result, the queries and the bank.
      accelerator: whether JAX does the products; by default where it has a device for it.
      bar: `bar(label, total)`, a context manager that yields `advance(count)`; or None.
      label: of the bar.
    """

    def __init__(
        self,
        queries: np.ndarray,
        bank: np.ndarray,
        parts: Parts,
        weights: Weights,
        mean: np.ndarray | None = None,
        *,
        memory: int = 2**29,
        accelerator: bool | None = None,
        bar: Callable | None = None,
        label: str = "search the bank",
    ):
        self._queries, self._bank = queries, bank
        self._parts, self._weights = parts, weights
        self._mean = None if mean is None else np.asarray(mean, np.float32)
        self._columns = weighted_columns(parts, weights)
        self._width = sum(stop - start for start, stop, _ in self._columns)
        self._memory, self._bar, self._label = memory, bar, label
        accelerated = jax.default_backend() != "cpu" if accelerator is None else accelerator
        self._products = DeviceProducts if accelerated else HostProducts
        # Roundings are eps / 2 each. A dot product of n terms collects at most n of them, the
        # norm of a row n / 2, in whatever order they are summed: 0.75 n eps, and a few more of
        # single terms.
        self._error = np.float32((self._width + 16) * np.finfo(np.float32).eps)

    def top_k(self, k: int, excluded: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """The K most similar rows of each query that are not excluded.

        Returns:
          rows [B, K] int64, most similar first, ties by the lower row, and their exact similarity
          [B, K] float64; -1 and -inf where a query has fewer.
        """
        rows = np.full((len(self._queries), k), -1, np.int64)
        exact = np.full((len(self._queries), k), -np.inf)
        if not len(self._bank):
            return rows, exact
        for first, features, scan in self._groups(excluded, k):
            best = _Best(len(features), k, self._error, functools.partial(self._exact, features))
            for seen, candidates in scan(best.floor):
                best.add(candidates, seen)
            found = slice(first, first + len(features))
            rows[found], exact[found] = best.result()
        return rows, exact

    def above(self, threshold: float, limit: int) -> Pairs | None:
        """All pairs whose exact similarity exceeds a threshold; None if there are over `limit`."""
        queries, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        found = 0
        for first, features, scan in self._groups(Pairs.none(), None):
            floor = np.full(len(features), threshold - self._error, np.float32)
            for _, (q, row, score) in scan(floor):
                sure = score > threshold + self._error
                close = np.flatnonzero(~sure)
                sure[close] = self._exact(features, q[close], row[close]) > threshold
                queries.append(q[sure].astype(np.int64) + first)
                rows.append(row[sure].astype(np.int64))
                found += len(rows[-1])
                if found > limit:
                    return None
        return Pairs.of(np.concatenate(queries), np.concatenate(rows), len(self._queries))

    def exact(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Exact similarity [P] float64 of pairs: queries [P] and bank rows [P]."""
        out = np.empty(len(queries))
        step = max(1, 2**22 // (4 * self._bank.shape[1]))
        for start in range(0, len(queries), step):
            pairs = slice(start, start + step)
            features = self._features(self._queries[queries[pairs]])
            every = np.arange(len(features))
            out[pairs] = self._exact(features, every, rows[pairs])
        return out

    # --- the scan -------------------------------------------------------------------------------

    def _groups(self, excluded: Pairs, k: int | None) -> Iterator[tuple]:
        """Yields (first query, features, scan) of as many queries as the budget holds.

        `scan(floor)` yields, for a tile of queries and a block of the bank, how many rows all
        queries have seen and the candidates (query, row, product), three arrays, whose product
        reaches the query's floor. The caller raises floors in between; the scan does, where a
        block alone shows how.
        """
        block, tile, group = self._plan(k or 1)
        total = len(self._bank) * -(-len(self._queries) // group)
        with self._bar(self._label, total) if self._bar else _NO_BAR as advance:
            for first in range(0, len(self._queries), group):
                embeddings = self._queries[first : first + group]
                for start, stop, _ in self._columns:
                    _check_finite(embeddings[:, start:stop], first + np.arange(len(embeddings)))
                features = self._features(embeddings)
                release(self._queries)
                own = (excluded.queries >= first) & (excluded.queries < first + group)
                pairs = Pairs(excluded.queries[own] - first, excluded.rows[own])
                products = self._products(features, tile, block, k, 2 * self._error)
                yield (
                    first,
                    features,
                    functools.partial(self._scan, products, pairs, block, tile, advance),
                )

    def _scan(self, products, pairs: Pairs, block: int, tile: int, advance, floor: np.ndarray):
        buffer = np.empty((block, self._width), np.float32)
        for start in range(0, len(self._bank), block):
            stop = min(start + block, len(self._bank))
            products.load(self._fast_features(slice(start, stop), buffer[: stop - start]))
            low, high = np.searchsorted(pairs.rows, (start, stop))
            own = Pairs(pairs.queries[low:high], pairs.rows[low:high] - start)
            for first in range(0, len(floor), tile):
                last = min(first + tile, len(floor))
                inside = (own.queries >= first) & (own.queries < last)
                masked = Pairs(own.queries[inside] - first, own.rows[inside])
                q, row, score = products.hits(first, last, masked, floor[first:last])
                seen = stop if last == len(floor) else start
                yield seen, ((q + first).astype(np.int32), (row + start).astype(np.int32), score)
            release(self._bank)
            advance(stop - start)

    def _plan(self, k: int) -> tuple[int, int, int]:
        """Rows of a block, queries of a tile, and queries of a group, from the budget."""
        share = max(self._memory // 4, 1)
        block = int(np.clip(share // (8 * self._width), 1, _BLOCK))
        tile = int(np.clip(share // (_SCORE_BYTES * block), 1, _TILE))
        a_query = 4 * self._width + 48 * _BUFFER * k
        return block, tile, max(1, 2 * share // a_query)

    def _features(self, embeddings: np.ndarray) -> np.ndarray:
        return similarity_features(embeddings, self._parts, self._weights, self._mean)

    def _fast_features(self, rows: slice, out: np.ndarray) -> np.ndarray:
        """`similarity_features` of bank rows in float32, into `out`; within the error bound."""
        column = 0
        for start, stop, weight in self._columns:
            part = out[:, column : column + stop - start]
            column += stop - start
            values = self._bank[rows, start:stop]
            with np.errstate(over="ignore", invalid="ignore"):
                if self._mean is None:
                    np.copyto(part, values, casting="same_kind")
                else:
                    np.subtract(values, self._mean[start:stop], out=part, casting="same_kind")
                square = np.einsum("ij,ij->i", part, part)
            # Squares that leave float32's range make this route useless: empty parts and freaks.
            freak = np.flatnonzero(~((square > 1e-24) & (square < 1e36)))
            square[freak] = 1.0
            part *= (np.float32(np.sqrt(weight)) / np.sqrt(square))[:, None]
            if len(freak):
                _check_finite(values[freak], rows.start + freak, "demonstration")
                mean = None if self._mean is None else self._mean[start:stop]
                whole = {"part": (0, stop - start)}
                part[freak] = similarity_features(values[freak], whole, {"part": 1.0}, mean)
                part[freak] *= np.float32(np.sqrt(weight))
        return out

    def _exact(self, features: np.ndarray, q: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Exact similarity of the pairs of features [q] and bank rows, in bounded memory."""
        exact = np.empty(len(rows))
        step = max(1, 2**20 // (4 * self._bank.shape[1]))
        for start in range(0, len(rows), step):
            pairs = slice(start, start + step)
            demonstrations = self._features(self._bank[rows[pairs]])
            exact[pairs] = exact_similarity(features[q[pairs]], demonstrations)
            release(self._bank)
        return exact


class _Best:
    """The running best K candidates of some queries.

    A row can belong to the K best only if its product is at least the K-th best product so far
    less twice the error; `floor` says so, and rises.
    """

    def __init__(self, num: int, k: int, error: np.float32, exact: Callable):
        self.floor = np.full(num, _LOWEST, np.float32)
        self._num, self._k, self._error, self._exact = num, k, error, exact
        self._kept = [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))]
        self._count, self._due = 0, 1

    def add(self, candidates: tuple, seen: int) -> None:
        """Takes candidates; all queries have seen `seen` rows of the bank.

        Floors are brought up to date each time the bank seen doubles, when about K new rows a
        query have come in.
        """
        self._kept.append(candidates)
        self._count += len(candidates[0])
        if self._count > _BUFFER * self._k * self._num:
            self._merge()
        if seen >= self._due:
            self._merge()
            self._due = 2 * seen

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows [num, K] int64 and exact similarities [num, K] float64 of the best."""
        self._merge()
        q, row, _ = self._kept[0]
        exact = self._exact(q, row)
        order, place = _ranked(q, (row, -exact), self._num)
        order, place = order[place < self._k], place[place < self._k]
        rows = np.full((self._num, self._k), -1, np.int64)
        similarity = np.full((self._num, self._k), -np.inf)
        rows[q[order], place] = row[order]
        similarity[q[order], place] = exact[order]
        return rows, similarity

    def _merge(self) -> None:
        q, row, score = (np.concatenate(columns) for columns in zip(*self._kept))
        order, place = _ranked(q, (-score,), self._num)
        q, row, score = q[order], row[order], score[order]
        kth = place == self._k - 1
        self.floor[q[kth]] = np.maximum(self.floor[q[kth]], score[kth] - 2 * self._error)
        keep = score >= self.floor[q]
        q, row, score, place = q[keep], row[keep], score[keep], place[keep]
        # Where very many are nearly equal, only exact similarity can tell which may go.
        crowded = np.unique(q[place >= _BUFFER * self._k // 2])
        if len(crowded):
            inside = np.isin(q, crowded)
            some_q, some_row, some_score = q[inside], row[inside], score[inside]
            exact = self._exact(some_q, some_row)
            order, place = _ranked(some_q, (some_row, -exact), self._num)
            last = order[place == self._k - 1]
            self.floor[some_q[last]] = np.maximum(
                self.floor[some_q[last]], (exact[last] - self._error).astype(np.float32)
            )
            best = order[place < self._k]
            q = np.concatenate([q[~inside], some_q[best]])
            row = np.concatenate([row[~inside], some_row[best]])
            score = np.concatenate([score[~inside], some_score[best]])
        self._kept, self._count = [(q, row, score)], len(q)


def _ranked(q: np.ndarray, keys: tuple, num: int) -> tuple[np.ndarray, np.ndarray]:
    """An order by query, then by the last of the keys; and each one's place in its query."""
    order = np.lexsort((*keys, q))
    starts = np.concatenate([[0], np.cumsum(np.bincount(q, minlength=num))])
    return order, np.arange(len(q)) - starts[q[order]]


def _check_finite(values: np.ndarray, rows: np.ndarray, of: str = "query") -> None:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise InputError(f"the embedding of {of} row {rows[np.argmin(finite)]} is not finite")
