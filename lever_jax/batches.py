"""Batches of query groups for the optimiser, padded to few shapes and to little else.

A step takes B groups, drawn by a shuffle that knows nothing of their sizes. It may compute them in
N pieces, whose gradients are added up: the groups of a step are then sorted by size and cut into N
pieces of equally many, each padded to the least of a few bucket sizes that holds its largest
group. So small groups are not padded to the largest of all, which groups share a step does not
depend on their sizes, and the step is that of the whole batch, up to rounding.
"""

from collections.abc import Iterator

import jax
import numpy as np

from lever_jax.training import GroupBatch

CHOICES = (1, 2, 4, 8)
"""Numbers of pieces that are tried where none is given."""

MOST_PADDING = 0.25
"""Share of padding among the pointers computed above which more pieces are tried."""


def bucket_sizes(largest: int) -> tuple[int, ...]:
    """Powers of two from 4 that are less than the largest group, and that one itself."""
    powers = [2**n for n in range(2, max(largest, 1).bit_length())]
    return (*(size for size in powers if size < largest), largest)


class Batches:
    """All groups of a phase as batches, epoch by epoch.

    Only the bucket sizes that the first epoch used are used later, so that nothing is compiled
    after it.

    Args:
      groups: NumPy arrays.
      size: B, groups of a step.
      pieces: N, in how many pieces a step is computed; 0 takes the least of `CHOICES` with which
        at most `MOST_PADDING` of the pointers are padding, or else the best. Where one size G for
        all wastes no more than that, there is one.
      devices: the groups of a piece are padded to a multiple of it.
      one_size: whether all are padded to the G of `groups` whatever that wastes.
    """

    def __init__(
        self,
        groups: GroupBatch,
        size: int,
        *,
        pieces: int = 0,
        devices: int = 1,
        one_size: bool = False,
    ):
        self._groups, self._size, self._devices = groups, size, devices
        width = groups.mask.shape[1]
        # How much of a group must be kept: members stand first, but nothing relies on that.
        self._extents = np.where(groups.mask, np.arange(1, width + 1), 0).max(axis=1, initial=0)
        self._first, self._buckets = True, np.array([width])
        if one_size or self.padding(1) <= MOST_PADDING:
            self.pieces = pieces or 1
        else:
            self._buckets = np.array(bucket_sizes(width))
            self.pieces = pieces or self._choose()

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-len(self._extents) // self._size)

    def epoch(self, seed: tuple[int, ...]) -> Iterator[list[GroupBatch]]:
        """Yields the pieces of each step; every group is in exactly one of them.

        Args:
          seed: of the shuffle.
        """
        plan = self._plan(seed, self.pieces)
        if self._first:
            used = [bucket for step in plan for _, bucket in step]
            self._first, self._buckets = False, np.unique(used)
        for step in plan:
            yield [self._piece(rows, bucket) for rows, bucket in step]

    def padding(self, pieces: int) -> float:
        """Share of padding among the pointers of all groups, with so many pieces."""
        plan = self._plan((0,), pieces)
        computed = sum(len(rows) * bucket for step in plan for rows, bucket in step)
        return 1.0 - self._extents.sum() / max(computed, 1)

    def _choose(self) -> int:
        choices = [n for n in CHOICES if n == 1 or self._devices * n <= self._size]
        shares = [self.padding(n) for n in choices]
        for number, share in zip(choices, shares):
            if share <= MOST_PADDING:
                return number
        return choices[int(np.argmin(shares))]

    def _rows(self, pieces: int) -> int:
        """Groups of a piece."""
        return -(-self._size // (pieces * self._devices)) * self._devices

    def _plan(self, seed, pieces: int) -> list[list[tuple[np.ndarray, int]]]:
        """For each step the groups of its pieces, and what each is padded to."""
        order = np.random.default_rng(seed).permutation(len(self._extents))
        rows, plan = self._rows(pieces), []
        for start in range(0, len(order), self._size):
            step = order[start : start + self._size]
            if pieces > 1:
                step = step[np.argsort(-self._extents[step], kind="stable")]
            cuts = [step[at : at + rows] for at in range(0, len(step), rows)]
            plan.append([(cut, self._bucket(self._extents[cut].max())) for cut in cuts])
        return plan

    def _bucket(self, extent: int) -> int:
        return int(self._buckets[np.searchsorted(self._buckets, extent)])

    def _piece(self, rows: np.ndarray, bucket: int) -> GroupBatch:
        """Some groups, padded with masked pointers to the bucket and with empty groups."""
        missing = self._rows(self.pieces) - len(rows)
        own = jax.tree.map(lambda x: np.asarray(x)[rows], self._groups)

        def padded(x):
            return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

        def resized(x):
            x = padded(x)[:, :bucket]
            return np.pad(x, [(0, 0), (0, bucket - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

        fields = {name: x for name, x in own._asdict().items() if x is not None}
        rows_of = padded(fields.pop("query_rows"))
        return own._replace(query_rows=rows_of, **{name: resized(x) for name, x in fields.items()})
