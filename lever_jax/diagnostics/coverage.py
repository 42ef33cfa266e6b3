"""Where the positives are: against the number of evaluations, and by place in the pool."""

from typing import Any

import numpy as np

from lever_jax.diagnostics.health import missed_share
from lever_jax.diagnostics.rows import Rows
from lever_jax.statistics import ratios_ci

_MOST_POINTS = 14


def coverage(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Share of queries with a positive against the number of evaluations, by source.

    The curve is the expected one if the verified candidates of a query had been evaluated in
    random order: with k positives of n, m evaluations find one with probability
    1 - C(n - k, m) / C(n, m). A query with fewer than m counts with all it has.

    Returns:
      {"all": points, SOURCE: points}; a point has evaluations, queries, share, ci95.
    """
    names, source = np.unique(np.asarray(rows.given.source, str), return_inverse=True)
    curves = {"all": _curve(rows, rows.verified)}
    for code, name in enumerate(names.tolist()):
        curves[name] = _curve(rows, rows.verified & (source == code))
    return {name: points for name, points in curves.items() if points}


def _curve(rows: Rows, where: np.ndarray) -> list[dict[str, Any]]:
    verified, positive = rows.per_query(where), rows.per_query(where & rows.positive)
    verified, positive = verified[verified > 0], positive[verified > 0]
    if not len(verified):
        return []
    most = int(verified.max())
    points = np.unique(np.geomspace(1, most, _MOST_POINTS).round().astype(int))
    drawn = np.minimum(points[None, :], verified[:, None])
    found = 1 - missed_share(verified[:, None], positive[:, None], drawn)
    estimates = ratios_ci(found, np.ones_like(found), bounds=(0.0, 1.0), **rows.sampling)
    return [
        {
            "evaluations": int(point),
            "queries": len(verified),
            "share": estimate.value,
            "ci95": estimate.interval,
        }
        for point, estimate in zip(points, estimates, strict=True)
    ]


def positions(rows: Rows) -> list[dict[str, Any]] | None:
    """Positives and gt_prob by place in the pool and by shot, over the verified sample.

    Pools are ordered by similarity, so position 0 is the most similar candidate; shot 1 is the
    first demonstration of a prompt.

    Returns:
      None if positions are unknown; else entries with shot ("any" or from 1), position, n,
      positive_rate, ci95, gt_prob (mean, None where unknown) of the candidates that have that
      demonstration at that shot.
    """
    if rows.given.position is None or not rows.sample.any():
        return None
    position = np.asarray(rows.given.position)
    width = int(position.max(initial=-1)) + 1
    found = []
    summed = np.zeros((3, rows.num_queries, width))
    for shot in range(position.shape[1]):
        tables = _at(rows, position[:, shot], width)
        summed += tables
        found += _entries(rows, shot + 1, tables)
    return (_entries(rows, "any", summed) if position.shape[1] > 1 else []) + found


def _at(rows: Rows, position: np.ndarray, width: int) -> np.ndarray:
    """Candidates, positives and sums of gt_prob by query and position, [3, Q, width]."""
    where = rows.sample & (position >= 0)
    known = where & ~np.isnan(rows.gt_prob)
    return np.stack(
        [
            rows.table(where, position, width),
            rows.table(where & rows.positive, position, width),
            rows.table(known, position, width, rows.gt_prob),
        ]
    )


def _entries(rows: Rows, shot: int | str, tables: np.ndarray) -> list[dict[str, Any]]:
    counts, positives, gt_prob = tables
    rates = ratios_ci(positives, counts, bounds=(0.0, 1.0), **rows.sampling)
    known = bool((~np.isnan(rows.gt_prob[rows.sample])).all())
    totals, sums = counts.sum(axis=0), gt_prob.sum(axis=0)
    return [
        {
            "shot": shot,
            "position": position,
            "n": int(totals[position]),
            "positive_rate": rate.value,
            "ci95": rate.interval,
            "gt_prob": float(sums[position] / totals[position]) if known else None,
        }
        for position, rate in enumerate(rates)
        if totals[position]
    ]
