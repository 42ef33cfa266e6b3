"""Can gt_prob be trusted, and the similarity of answers? Scores held against accuracy."""

from typing import Any

import numpy as np

from lever_jax.diagnostics.health import rank_correlation
from lever_jax.diagnostics.rows import Rows
from lever_jax.statistics import Estimate, ratios_ci

BINS = 10


def calibration(rows: Rows, health: dict[str, Any]) -> dict[str, Any]:
    """Accuracy by gt_prob, over the verified candidates of the sample.

    Args:
      rows: the candidates.
      health: their figures, which hold the correlation over all of them.

    Returns:
      bins: one entry for each tenth of [0, 1] that has candidates: low, high, n, mean_gt_prob,
        accuracy, ci95 (queries resampled). A gt_prob above 1, which mean_token or imported data
        may have, counts in the last.
      gap: mean over candidates of |accuracy - gt_prob| of their bin (expected calibration error).
      spearman: of gt_prob and accuracy, {"all": entry, ANSWER_TYPE: entry}, an entry being value,
        ci95, n; answer types only where they are known.
    """
    where = rows.sample & ~np.isnan(rows.gt_prob)
    code = np.zeros(len(where), np.int64)
    code[where] = np.clip(np.floor(rows.gt_prob[where] * BINS), 0, BINS - 1)
    counts = rows.table(where, code, BINS)
    means = ratios_ci(
        rows.table(where, code, BINS, rows.accuracy), counts, bounds=(0.0, 1.0), **rows.sampling
    )
    totals = counts.sum(axis=0)
    gt_prob = rows.table(where, code, BINS, rows.gt_prob).sum(axis=0)
    bins, gap = [], 0.0
    for bin_, estimate in enumerate(means):
        if totals[bin_] == 0:
            continue
        mean_gt_prob = gt_prob[bin_] / totals[bin_]
        gap += totals[bin_] * abs(estimate.value - mean_gt_prob)
        bins.append(
            {
                "low": bin_ / BINS,
                "high": (bin_ + 1) / BINS,
                "n": int(totals[bin_]),
                "mean_gt_prob": float(mean_gt_prob),
                "accuracy": estimate.value,
                "ci95": estimate.interval,
            }
        )
    name = "spearman_gt_prob_accuracy"
    whole = {"value": health[name], "ci95": health["ci95"][name], "n": int(where.sum())}
    correlations = {}
    if rows.given.answer_type is not None:
        types = np.asarray(rows.given.answer_type, str)
        for name in np.unique(types[where]).tolist():
            own = rows.sample & (types == name)
            correlations[name or "(none)"] = rank_correlation(
                rows, rows.gt_prob, rows.accuracy, own
            )
    return {
        "bins": bins,
        "gap": float(gap / totals.sum()) if totals.sum() else None,
        "spearman": {"all": whole, **{name: entry(one) for name, one in correlations.items()}},
    }


def similarity_shaping(rows: Rows) -> dict[str, Any] | None:
    """What --similarity_weight would add: is the similarity of an answer worth a reward?

    The shaping counts only where hard = 0 (see `rewards`). It helps if the similarity is higher for
    right answers than for wrong ones, so that it measures rightness at all, and if among the wrong
    ones it orders pointers as gt_prob does, so that a more similar wrong answer is a nearer miss.

    Returns:
      None without similarities; else n, mean_right, mean_wrong (mean similarity where hard = 1 and
      where hard = 0), and the rank correlations with_hard, with_gt_prob_where_wrong and
      with_gt_prob_where_right (value, ci95, n), over the sample; queries resampled.
    """
    known = rows.sample & ~np.isnan(rows.similarity)
    if not known.any():
        return None
    right = rows.positive.astype(np.int64)
    wrong_mean, right_mean = ratios_ci(
        rows.table(known, right, 2, rows.similarity), rows.table(known, right, 2), **rows.sampling
    )
    hard = np.where(rows.verified, rows.positive, np.nan)

    def correlated(values: np.ndarray, where: np.ndarray) -> dict[str, Any]:
        return entry(rank_correlation(rows, rows.similarity, values, known & where))

    return {
        "n": int(known.sum()),
        "mean_right": entry(right_mean),
        "mean_wrong": entry(wrong_mean),
        "with_hard": correlated(hard, rows.verified),
        "with_gt_prob_where_wrong": correlated(rows.gt_prob, ~rows.positive),
        "with_gt_prob_where_right": correlated(rows.gt_prob, rows.positive),
    }


def entry(estimate: Estimate) -> dict[str, Any]:
    """An estimate as it stands in analysis.json."""
    return {"value": estimate.value, "ci95": estimate.interval, "n": estimate.n}
