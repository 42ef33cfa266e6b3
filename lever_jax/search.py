"""VLM-guided search of a pool: score every single demonstration, keep the best, combine them.

It gives the warm-up its targets and evaluation its oracle. It reads the ground truth through
`vqa_gt_prob`, so what it finds is never a result that a user could deploy.
"""

import itertools

import numpy as np

from lever_jax.pooled import PooledQueries
from lever_jax.scoring import ScoringService, columns


def search_pools(
    queries: PooledQueries,
    rows: np.ndarray,
    service: ScoringService,
    *,
    shots: int,
    beam: int,
    label: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Searches the pools of some queries.

    Level 1 scores every candidate alone. Level s extends the `beam` best pointers of level s - 1
    by the `beam` best single candidates, put first and put last: where demonstrations disagree,
    order decides.

    Args:
      queries: with their pools.
      rows: int [n] which of them.
      service: scores prompts.
      shots: S, length of the pointers wanted.
      beam: pointers and singles kept at each level.
      label: of the progress bar.

    Returns:
      For each query, pointers int32 [m, S] and their `vqa_gt_prob` [m], best first, without those
      that could not be scored; m may be 0.
    """
    rows = np.asarray(rows)
    width = queries.pool_ids.shape[1]
    valid = queries.pool_ids[rows] >= 0
    singles = [np.flatnonzero(mask)[:, None].astype(np.int32) for mask in valid]
    found = _score_all(queries, rows, singles, service, f"{label}: singles of {width}")
    best_singles = [pointers[:beam, 0] for pointers, _ in found]
    for level in range(2, shots + 1):
        extended = [
            _extend(pointers[:beam], additions)
            for (pointers, _), additions in zip(found, best_singles)
        ]
        found = _score_all(queries, rows, extended, service, f"{label}: {level} shots")
    return found


def _extend(pointers: np.ndarray, additions: np.ndarray) -> np.ndarray:
    """Each pointer with each addition first and last: distinct ordered tuples."""
    grown = {}
    for pointer, action in itertools.product(pointers.tolist(), additions.tolist()):
        if action not in pointer:
            grown[(*pointer, action)] = grown[(action, *pointer)] = None
    shots = pointers.shape[1] + 1
    return np.array(list(grown), np.int32).reshape(-1, shots)


def _score_all(queries, rows, pointers, service, label):
    """Scores a ragged set of pointers and sorts each query's by gt_prob."""
    counts = [len(p) for p in pointers]
    owner = np.repeat(rows, counts)
    flat = np.concatenate(pointers)
    records = service.score(queries.query_ids[owner], queries.demo_ids(owner, flat), label=label)
    gt_prob = columns(records)["gt_prob"]
    result = []
    for start, count in zip(np.cumsum([0, *counts]), counts):
        own, values = flat[start : start + count], gt_prob[start : start + count]
        order = np.argsort(-values, kind="stable")
        order = order[np.isfinite(values[order])]
        result.append((own[order], values[order]))
    return result
