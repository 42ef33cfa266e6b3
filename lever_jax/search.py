"""VLM-guided search of a pool: score every single demonstration, keep the best, combine them.

It gives the warm-up its targets and evaluation its oracle. It reads the ground truth through
`vqa_gt_prob`, so what it finds is never a result that a user could deploy.
"""

import itertools

import numpy as np

from lever_jax.errors import InputError
from lever_jax.pooled import PooledQueries
from lever_jax.scoring import ScoringService, columns
from lever_jax.training import GroupBatch

SCORES = ("gt_prob", "gain")
CONSTRUCTIONS = ("both", "left", "right")
_CHUNK = 256  # Queries searched level by level before the next ones are begun.


def search_pools(
    queries: PooledQueries,
    rows: np.ndarray,
    service: ScoringService,
    *,
    shots: int,
    beam: int,
    label: str,
    score: str = "gt_prob",
    construction: str = "both",
    shorter: bool = False,
    chunk: int = _CHUNK,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Searches the pools of some queries.

    Level 1 scores every candidate alone. Level s extends the `beam` best pointers of level s - 1
    by the `beam` best single candidates: put first (left), put last (right), or each in turn
    (both), because where demonstrations disagree, order decides. The worth of a pointer p of
    query q is, with g = `vqa_gt_prob` and () the prompt without demonstrations,

      gt_prob:  v(q, p) = g(q, p)
      gain:     v(q, p) = g(q, p) - g(q, ())

    Both rank the pointers of a query alike, at every level; but a gain is at most 0 where the
    demonstrations do not help, and as a weight it tells two good pointers apart where the prompt
    without demonstrations is nearly as good.

    Queries are searched in chunks, so that memory does not grow with their number. Every batch of
    scores is in the store as it lands: a search that was stopped asks only for the rest.

    Args:
      queries: with their pools.
      rows: int [n] which of them.
      service: scores prompts.
      shots: S >= 1, length of the pointers wanted.
      beam: pointers and singles kept at each level, >= 1.
      label: of the progress bar, which counts the prompts of the whole search.
      score: "gt_prob" or "gain".
      construction: "both", "left" or "right".
      shorter: whether the pointers of all levels are wanted, not of the last alone, as a policy
        that stops learns from; of equals the shorter comes first.
      chunk: queries in memory at a time, >= 1.

    Returns:
      For each query, pointers int32 [m, S] and their worth float32 [m], best first, without those
      that could not be scored; m may be 0. Shorter pointers have -1 after their end. A query
      without a g(q, ()) has no gains.

    Raises:
      InputError: an unknown score or construction.
    """
    for name, value, allowed in (
        ("search_score", score, SCORES),
        ("search_construction", construction, CONSTRUCTIONS),
    ):
        if value not in allowed:
            raise InputError(f"--{name}={value} is not one of {', '.join(allowed)}")
    rows = np.asarray(rows)
    sizes = (queries.pool_ids[rows] >= 0).sum(axis=1)
    planned = _planned(sizes, shots, beam, score, construction)
    found = []
    with service.progress(label, int(planned.sum())) as advance:
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            search = _Search(queries, rows[part], service, label, advance)
            found += search.run(shots, beam, score, construction, shorter)
            advance(int(planned[part].sum()) - search.asked)  # Orders that two pointers share.
    return found


class _Search:
    """The search of one chunk of queries; counts what it asks for."""

    def __init__(self, queries, rows, service, label, advance):
        self._queries, self._rows = queries, rows
        self._service, self._label, self._advance = service, label, advance
        self.asked = 0

    def run(self, shots, beam, score, construction, shorter):
        valid = self._queries.pool_ids[self._rows] >= 0
        base = np.zeros(len(self._rows), np.float32)
        if score == "gain":
            base = self._gt_prob([np.zeros((1, 0), np.int32)] * len(self._rows))
        found = self._rank([np.flatnonzero(mask)[:, None].astype(np.int32) for mask in valid])
        levels = [found]
        best_singles = [pointers[:beam, 0] for pointers, _ in found]
        for _ in range(2, shots + 1):
            extended = [
                extend(pointers[:beam], additions, construction)
                for (pointers, _), additions in zip(found, best_singles)
            ]
            found = self._rank(extended)
            levels.append(found)
        if shorter:
            found = [_merge(own, shots) for own in zip(*levels)]
        return [
            (pointers, values - zero) if np.isfinite(zero) else (pointers[:0], values[:0])
            for (pointers, values), zero in zip(found, base)
        ]

    def _rank(self, pointers):
        """Scores a ragged set of pointers and sorts each query's by gt_prob."""
        values = self._gt_prob(pointers)
        result = []
        for own, start in zip(pointers, np.cumsum([0, *map(len, pointers)])):
            g = values[start : start + len(own)]
            order = np.argsort(-g, kind="stable")
            order = order[np.isfinite(g[order])]
            result.append((own[order], g[order]))
        return result

    def _gt_prob(self, pointers):
        """gt_prob of a ragged set of pointers, flat; NaN where one could not be scored."""
        owner = np.repeat(self._rows, list(map(len, pointers)))
        flat = np.concatenate(pointers)
        records = self._service.score(
            self._queries.query_ids[owner],
            self._queries.demo_ids(owner, flat),
            label=self._label,
            advance=self._advance,
        )
        self.asked += len(records)
        return columns(records)["gt_prob"]


def _merge(levels, shots: int) -> tuple[np.ndarray, np.ndarray]:
    """The pointers of one query of all levels [m_s, s] as one ranking [m, S]."""
    padded = [
        np.pad(pointers, ((0, 0), (0, shots - pointers.shape[1])), constant_values=-1)
        for pointers, _ in levels
    ]
    values = np.concatenate([values for _, values in levels])
    order = np.argsort(-values, kind="stable")
    return np.concatenate(padded)[order], values[order]


def extend(pointers: np.ndarray, additions: np.ndarray, construction: str) -> np.ndarray:
    """Each pointer with each addition, put first (left), last (right) or each in turn (both).

    Args:
      pointers: int32 [m, S] actions.
      additions: int [a] actions; those that a pointer has already are not added to it.
      construction: "both", "left" or "right".

    Returns:
      int32 [n, S + 1] distinct ordered tuples, in order of first appearance.
    """
    grown = {}
    for pointer, action in itertools.product(pointers.tolist(), additions.tolist()):
        if action in pointer:
            continue
        if construction != "left":
            grown[(*pointer, action)] = None
        if construction != "right":
            grown[(action, *pointer)] = None
    return np.array(list(grown), np.int32).reshape(-1, pointers.shape[1] + 1)


def search_targets(
    rows: np.ndarray, found: list[tuple[np.ndarray, np.ndarray]], count: int, *, shots: int
) -> GroupBatch:
    """What a search found as groups for the supervised step.

    Args:
      rows: int [n] the queries that were searched.
      found: for each, its pointers and their worth, best first, as `search_pools` returns them.
      count: most targets a query.
      shots: S.

    Returns:
      One group a query that has anything to imitate: its best pointers, weighted by their worth.
      A pointer of worth <= 0 is not imitated: it does not help (gain), or is never right.
    """
    members = []
    for row, (pointers, values) in zip(rows, found, strict=True):
        best = np.flatnonzero(values > 0)[:count]
        if len(best):
            members.append((row, pointers[best], values[best]))
    shape = (len(members), count)
    batch = GroupBatch(
        query_rows=np.array([row for row, _, _ in members], np.int32),
        pointers=np.zeros((*shape, shots), np.int32),
        rewards=np.zeros(shape, np.float32),
        behaviour_log_probs=np.zeros(shape, np.float32),
        mask=np.zeros(shape, bool),
    )
    for i, (_, pointers, values) in enumerate(members):
        batch.pointers[i, : len(pointers)] = pointers
        batch.rewards[i, : len(values)] = values
        batch.mask[i, : len(pointers)] = True
    return batch


def _planned(sizes, shots, beam, score, construction) -> np.ndarray:
    """Most prompts [n] that the search of pools of these sizes [n] can ask for."""
    sizes = np.asarray(sizes, np.int64)
    ends = 2 if construction == "both" else 1
    additions = np.minimum(beam, sizes)
    kept, total = additions, sizes + (score == "gain")
    for level in range(2, shots + 1):
        # All of a pointer are among the best singles, so one of S can be extended by all but S.
        asked = kept * np.maximum(additions - (level - 1), 0) * ends
        if level == 2 and ends == 2:
            asked = asked // 2  # Of two singles each order comes up twice.
        total = total + asked
        kept = np.minimum(beam, asked)
    return total
