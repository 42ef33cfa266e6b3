"""What there is to tell apart: the spread of rewards, duplicates, label noise, failures."""

from collections import Counter
from typing import Any

import numpy as np

from lever_jax.diagnostics.calibration import entry
from lever_jax.diagnostics.health import first_of_pointer
from lever_jax.diagnostics.rows import Rows
from lever_jax.statistics import Estimate, ratios_ci

HISTOGRAM_BINS = 20


def reward_ranges(rows: Rows) -> dict[str, Any]:
    """Histogram of max - min of the reward trained on, over queries.

    Returns:
      edges [B + 1] and counts [B], empty lists where no query has a reward.
    """
    highest, lowest = rows.extremes(rows.reward)
    ranges = (highest - lowest)[np.isfinite(highest)]
    if not len(ranges):
        return {"edges": [], "counts": []}
    top = max(float(ranges.max()), 1e-6)
    counts, edges = np.histogram(ranges, bins=HISTOGRAM_BINS, range=(0.0, top))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def explained_by_source(rows: Rows) -> dict[str, Any]:
    """How much of the reward's variance the proposal source explains (eta squared).

    eta^2 = sum_s n_s (mean_s - mean)^2 / sum_i (r_i - mean)^2

    over the candidates of the sample that have a reward. Between queries rewards differ because
    questions do, so it is also given for rewards less their query's mean, which is what training
    sees. A share near 1 says that a source, not a pointer, is rewarded.

    Returns:
      of_reward, within_query: value, ci95, n (queries), queries resampled; and by_source, the mean
      reward of each source: value, ci95, n.
    """
    where = rows.sample & ~np.isnan(rows.reward)
    names, source = np.unique(np.asarray(rows.given.source, str), return_inverse=True)
    count, total = (
        rows.per_query(where),
        np.bincount(rows.query[where], rows.reward[where], rows.num_queries),
    )
    mean = np.divide(total, count, out=np.zeros(rows.num_queries), where=count > 0)
    centred = rows.reward - mean[rows.query] if len(rows.query) else rows.reward
    num = max(len(names), 1)
    counts = rows.table(where, source, num)
    sums = rows.table(where, source, num, rows.reward)
    means = ratios_ci(sums, counts, **rows.sampling)
    return {
        "of_reward": entry(_eta_squared(rows, where, source, num, rows.reward)),
        "within_query": entry(_eta_squared(rows, where, source, num, centred)),
        "by_source": {name: entry(one) for name, one in zip(names.tolist(), means)},
    }


def _eta_squared(
    rows: Rows, where: np.ndarray, source: np.ndarray, num: int, values: np.ndarray
) -> Estimate:
    """Eta squared of values by source with a percentile bootstrap over queries."""
    counts = rows.table(where, source, num)
    sums = rows.table(where, source, num, values)
    squares = rows.table(where, np.zeros(len(where), np.int64), 1, values**2)
    present = counts.sum(axis=1) > 0
    counts, sums, squares = counts[present], sums[present], squares[present]
    n = len(counts)
    if n == 0:
        return Estimate(None, None, None, 0)

    def of(weights: np.ndarray) -> np.ndarray:
        own_count, own_sum, own_square = weights @ counts, weights @ sums, weights @ squares
        size = own_count.sum(axis=1)
        centre = own_sum.sum(axis=1) ** 2 / size
        between = np.divide(own_sum**2, own_count, out=np.zeros_like(own_sum), where=own_count > 0)
        spread = own_square[:, 0] - centre
        # A spread that is rounding of equal rewards explains nothing.
        some = spread > 1e-9 * np.maximum(own_square[:, 0], 1e-300)
        explained = between.sum(axis=1) - centre
        found = np.full(len(weights), np.nan)
        np.divide(explained, spread, out=found, where=some)
        return np.clip(found, 0.0, 1.0)

    value = float(of(np.ones((1, n)))[0])
    if np.isnan(value):
        return Estimate(None, None, None, n)
    if n == 1:
        return Estimate(value, None, None, 1)
    rng = np.random.default_rng(rows.seed)
    found = []
    for _ in range(min(rows.resamples, 1000)):
        drawn = np.bincount(rng.integers(n, size=n), minlength=n)
        found.append(of(drawn[None].astype(np.float64))[0])
    found = np.array(found)[np.isfinite(found)]
    if 2 * len(found) < min(rows.resamples, 1000):
        return Estimate(value, None, None, n)
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n)


def duplicates(rows: Rows) -> dict[str, Any] | None:
    """Rows whose ordered pointer their query has already, and the noise of their labels.

    Returns:
      None if pointers are unknown; else duplicates (rows beyond the first of their pointer),
      queries_with_duplicates, and label_noise: over pairs of equal prompts with two labels each,
      pairs, hard_differs (share that is right in one and wrong in the other), accuracy_difference
      and gt_prob_difference (mean absolute; value, ci95, n); None without such a pair.
    """
    if rows.given.pointer is None:
        return None
    if not len(rows.query):
        return {"duplicates": 0, "queries_with_duplicates": 0, "label_noise": None}
    order, first = first_of_pointer(rows)
    again = order[~first]
    same = np.flatnonzero(~first)
    one, two = order[same - 1], order[same]
    return {
        "duplicates": len(again),
        "queries_with_duplicates": len(np.unique(rows.query[again])),
        "label_noise": label_noise(
            rows.query[one],
            np.column_stack([rows.accuracy[one], rows.accuracy[two]]),
            np.column_stack([rows.gt_prob[one], rows.gt_prob[two]]),
            **rows.sampling,
        ),
    }


def label_noise(
    query: np.ndarray,
    accuracy: np.ndarray,
    gt_prob: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """How much two labels of one prompt differ.

    Args:
      query: [n] integers, the query of each pair.
      accuracy, gt_prob: [n, 2] NaN where unknown.
      resamples, seed: of the bootstrap over queries.

    Returns:
      As `duplicates` says; None without a pair of two labels.
    """
    answered, scored = (~np.isnan(pair).any(axis=1) for pair in (accuracy, gt_prob))
    if not (answered | scored).any():
        return None
    codes = np.unique(query, return_inverse=True)[1]
    num = int(codes.max()) + 1
    columns = [
        (answered, (accuracy[:, 0] > 0) != (accuracy[:, 1] > 0)),
        (answered, np.abs(accuracy[:, 0] - accuracy[:, 1])),
        (scored, np.abs(gt_prob[:, 0] - gt_prob[:, 1])),
    ]
    sums = [np.bincount(codes[w], np.asarray(v, float)[w], num) for w, v in columns]
    counts = [np.bincount(codes[w], minlength=num) for w, _ in columns]
    estimates = ratios_ci(
        np.column_stack(sums),
        np.column_stack(counts),
        bounds=(0.0, 1.0),
        resamples=resamples,
        seed=seed,
    )
    names = ("hard_differs", "accuracy_difference", "gt_prob_difference")
    pairs = int((answered | scored).sum())
    return {"pairs": pairs, **{name: entry(e) for name, e in zip(names, estimates)}}


def failures(rows: Rows) -> list[dict[str, Any]]:
    """Failed candidates by reason, most frequent first: reason, count, share of all candidates."""
    total = max(len(rows.query), 1)
    if rows.given.reason is None:
        reasons = ["(no reason given)"] * int(rows.failed.sum())
    else:
        reasons = np.asarray(rows.given.reason, str)[rows.failed].tolist()
    return [
        {"reason": reason, "count": count, "share": count / total}
        for reason, count in Counter(reasons).most_common()
    ]
