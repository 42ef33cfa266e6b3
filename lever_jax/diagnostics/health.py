"""The figures of health.json, with an interval beside every one that is a mean or a share.

The first question of every run is whether the data or the training is at fault. `measure_health`
answers it from one row a candidate, and ends with the verdict. What cannot be known is None, never
NaN and never a silent 0.
"""

from typing import Any

import numpy as np
from scipy.special import gammaln

from lever_jax.diagnostics.rows import Candidates, Picks, Rows, prepare
from lever_jax.diagnostics.verdict import DEFAULT_THRESHOLDS, Thresholds, verdict
from lever_jax.rewards import is_flat_between
from lever_jax.statistics import Estimate, mean_ci, ratios_ci, share_ci, spearman

_GAP = 0.2 + 1e-9  # accuracies are multiples of 0.1; a gap of 0.9 - 0.7 is not above 0.2
_SPEARMAN_CELLS = 60_000_000  # rows x resamples, some two seconds


def measure_health(
    candidates: Candidates,
    *,
    picks: Picks | None = None,
    trained: Picks | None = None,
    ceiling: Picks | None = None,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    min_range: float = 1e-6,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of `health.json`.

    Shares are fractions. `ci95` holds [low, high] for every figure that is a mean, a share or a
    correlation; shares of candidates and the correlation are resampled by query.

      queries, candidates        how many, failed ones included
      verified                   candidates with a known accuracy
      estimated_from             those of them that the rates over candidates come from: the
                                 uniformly sampled ones, or all where none is marked
      eval_failed                candidates that failed; pct_eval_failed is their share
      unique_ratio               different ordered pointers of a query / its candidates
      positive_rate              positive / verified candidates, of the sample
      positives_per_query        min, quartiles and max, over queries with a verified candidate
      pct_zero_positive_query    share of those queries that have no positive
      coverage_rising            of the queries without a positive after half of their verified
                                 candidates, in random order, the share that gets one by the rest
      pct_flat_reward_query      share of the queries with a reward where max - min < min_range
      by_source                  candidates, verified, of the sample estimated_from,
                                 positive_rate and ci95 of each source
      spearman_gt_prob_accuracy  rank correlation over the verified candidates of the sample
      oracle_in_data             mean over queries of the best verified accuracy
      model_pick                 mean accuracy of the selector's pick
      headroom                   oracle_in_data - model_pick
      pct_headroom_over_0_2      share of queries where the gap is above 0.2
      headroom_left              the headroom of the trained selector, else headroom itself
      training_use               share of the headroom that the trained selector closed
      ceiling_gain               what a search with extra budget finds above the best in the data
      ceiling_found              of the searched queries without a positive, those it found one for
      verdict, outcome, title,
      ready, next, reasons, evidence    see `verdict.Verdict`

    The selector's pick is `picks` if given, else the query's candidate (not failed) with the
    highest `log_prob`, the earlier row if tied. Where there is a pick, the four figures of headroom
    are over the `headroom_queries` queries for which pick and oracle are both verified; without
    one, oracle_in_data is over every query with a verified candidate and the others are None.

    Args:
      candidates: the rows; none at all is allowed.
      picks: of the selector that proposed the data, where they were answered apart from them.
      trained: picks on the same queries of the selector that was trained on the data, if any.
      ceiling: best accuracy that a search with extra budget found, for some of the queries.
      thresholds: of the verdict.
      min_range: a group whose max - min reward is below it is flat.
      resamples: bootstrap resamples; fewer, at least 100, for the correlation of very many rows.
      seed: of the resampling.

    Returns:
      Figures of plain Python types, ready for JSON.

    Raises:
      ValueError: the arrays have different lengths.
    """
    rows = prepare(candidates, resamples=resamples, seed=seed)
    return health_of(rows, picks, trained, ceiling, thresholds, min_range)


def health_of(
    rows: Rows,
    picks: Picks | None,
    trained: Picks | None,
    ceiling: Picks | None,
    thresholds: Thresholds,
    min_range: float,
) -> dict[str, Any]:
    """`measure_health` of rows that are prepared."""
    num_verified, num_positive = rows.per_query(rows.verified), rows.per_query(rows.positive)
    answered = num_verified > 0
    highest, lowest = rows.extremes(rows.reward)
    rewarded = np.isfinite(highest)
    flat = is_flat_between(lowest, highest, min_range)
    sample, sampling = rows.sample, rows.sampling
    figures: dict[str, Estimate] = {
        "pct_eval_failed": share_ci(
            rows.per_query(rows.failed), np.bincount(rows.query), **sampling
        ),
        "unique_ratio": _unique_ratio(rows),
        "positive_rate": share_ci(
            rows.per_query(rows.positive & sample), rows.per_query(sample), **sampling
        ),
        "pct_zero_positive_query": share_ci(num_positive[answered] == 0),
        "coverage_rising": _coverage_rising(num_verified, num_positive, sampling),
        "pct_flat_reward_query": share_ci(flat[rewarded]),
        "spearman_gt_prob_accuracy": rank_correlation(rows, rows.gt_prob, rows.accuracy, sample),
    }
    oracle = rows.extremes(rows.accuracy)[0]
    pick = rows.aligned(picks) if picks is not None else _most_probable(rows)
    headroom_queries = _headroom(figures, oracle, pick, sampling)
    _training(figures, oracle, pick, rows.aligned(trained), sampling)
    ceiling_queries = _ceiling(figures, oracle, rows.aligned(ceiling), sampling)

    value = {name: estimate.value for name, estimate in figures.items()}
    health = {
        "queries": rows.num_queries,
        "candidates": len(rows.query),
        "verified": int(rows.verified.sum()),
        "estimated_from": int(sample.sum()),
        "unique_ratio": value["unique_ratio"],
        "positive_rate": value["positive_rate"],
        "positives_per_query": _five_numbers(num_positive[answered]),
        "pct_zero_positive_query": value["pct_zero_positive_query"],
        "coverage_rising": value["coverage_rising"],
        "pct_flat_reward_query": value["pct_flat_reward_query"],
        "by_source": _by_source(rows),
        "spearman_gt_prob_accuracy": value["spearman_gt_prob_accuracy"],
        "oracle_in_data": value["oracle_in_data"],
        "model_pick": value["model_pick"],
        "headroom": value["headroom"],
        "pct_headroom_over_0_2": value["pct_headroom_over_0_2"],
        "headroom_queries": headroom_queries,
        "headroom_left": value["headroom_left"],
        "training_use": value["training_use"],
        "ceiling_gain": value["ceiling_gain"],
        "ceiling_found": value["ceiling_found"],
        "ceiling_queries": ceiling_queries,
        "eval_failed": int(rows.failed.sum()),
        "pct_eval_failed": value["pct_eval_failed"],
        "ci95": {name: estimate.interval for name, estimate in figures.items()},
    }
    decision = verdict(health, thresholds)
    return {
        **health,
        "verdict": decision.text,
        "outcome": decision.outcome,
        "title": decision.title,
        "ready": decision.ready,
        "next": decision.next,
        "reasons": decision.reasons,
        "evidence": decision.evidence,
    }


def rank_correlation(rows: Rows, x: np.ndarray, y: np.ndarray, where: np.ndarray) -> Estimate:
    """Spearman of x and y [N] where both are known, queries resampled.

    With very many rows the interval needs few resamples.
    """
    both = where & ~np.isnan(x) & ~np.isnan(y)
    fewer = max(100, _SPEARMAN_CELLS // max(int(both.sum()), 1))
    return spearman(
        x[both],
        y[both],
        clusters=rows.query[both],
        resamples=min(rows.resamples, fewer),
        seed=rows.seed,
    )


def _by_source(rows: Rows) -> dict[str, dict[str, Any]]:
    by_source = {}
    names, source = np.unique(np.asarray(rows.given.source, str), return_inverse=True)
    for code, name in enumerate(names):
        own = source == code
        counted = rows.sample & own
        rate = share_ci(
            rows.per_query(rows.positive & counted), rows.per_query(counted), **rows.sampling
        )
        by_source[str(name)] = {
            "candidates": int(own.sum()),
            "verified": int((rows.verified & own).sum()),
            "estimated_from": int(counted.sum()),
            "positive_rate": rate.value,
            "ci95": rate.interval,
        }
    return by_source


def missed_share(verified: np.ndarray, positive: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Probability [...] that `drawn` of `verified` candidates hold none of the positives.

    C(verified - positive, drawn) / C(verified, drawn); 0 where it is impossible.
    """
    n, k, m = (np.asarray(x, np.float64) for x in (verified, positive, drawn))
    rest = n - k - m
    possible = rest >= 0
    log = gammaln(n - k + 1) - gammaln(np.where(possible, rest, 0) + 1)
    log += gammaln(n - m + 1) - gammaln(n + 1)
    return np.where(possible, np.exp(log), 0.0)


def _coverage_rising(verified: np.ndarray, positive: np.ndarray, sampling) -> Estimate:
    """Share of the queries without a positive at half of the evaluations that the rest covers."""
    several = verified > 1
    n, k = verified[several], positive[several]
    open_at_half = missed_share(n, k, n // 2)
    covered_later = open_at_half * (k > 0)
    (estimate,) = ratios_ci(
        covered_later[:, None], open_at_half[:, None], bounds=(0.0, 1.0), **sampling
    )
    return estimate


def _unique_ratio(rows: Rows) -> Estimate:
    """Share of the rows that are the first of their ordered pointer in their query."""
    if rows.given.pointer is None or len(rows.query) == 0:
        return Estimate(None, None, None, 0)
    order, first = first_of_pointer(rows)
    unique = np.bincount(rows.query[order[first]], minlength=rows.num_queries)
    return share_ci(unique, np.bincount(rows.query, minlength=rows.num_queries), **rows.sampling)


def first_of_pointer(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Rows ordered so that equal ordered pointers of a query are neighbours.

    Returns:
      The order, int [N], and in that order whether a row is the first of its pointer, bool [N].
    """
    keys = np.column_stack([rows.query, rows.given.pointer])
    order = np.lexsort(keys.T[::-1])
    keys = keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    return order, first


def _most_probable(rows: Rows) -> np.ndarray:
    """Accuracy [Q] of each query's most probable candidate; NaN where unknown."""
    pick = np.full(rows.num_queries, np.nan)
    if rows.given.log_prob is None:
        return pick
    log_prob = np.asarray(rows.given.log_prob, np.float64)
    known = np.flatnonzero(~rows.failed & ~np.isnan(log_prob))
    known = known[np.lexsort((known, -log_prob[known], rows.query[known]))]
    best = known[np.flatnonzero(np.diff(rows.query[known], prepend=-1))]
    pick[rows.query[best]] = rows.accuracy[best]
    return pick


def _headroom(
    figures: dict[str, Estimate], oracle: np.ndarray, pick: np.ndarray, sampling: dict[str, int]
) -> int:
    """Adds oracle_in_data, model_pick, headroom and its share; returns the queries compared."""
    compared = ~np.isnan(oracle) & ~np.isnan(pick)
    of_oracle = compared if compared.any() else ~np.isnan(oracle)
    gap = oracle[compared] - pick[compared]
    figures["oracle_in_data"] = mean_ci(oracle[of_oracle], bounds=(0.0, 1.0), **sampling)
    figures["model_pick"] = mean_ci(pick[compared], bounds=(0.0, 1.0), **sampling)
    figures["headroom"] = mean_ci(gap, bounds=(-1.0, 1.0), **sampling)
    figures["pct_headroom_over_0_2"] = share_ci(gap > _GAP)
    return int(compared.sum())


def _training(
    figures: dict[str, Estimate],
    oracle: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    sampling: dict[str, int],
) -> None:
    """Adds what the trained selector made of the headroom, where picks before and after are known.

    training_use = sum(after - before) / sum(oracle - before)
    """
    both = ~np.isnan(oracle) & ~np.isnan(before) & ~np.isnan(after)
    if not both.any():
        figures["headroom_left"] = figures["headroom"]
        figures["training_use"] = Estimate(None, None, None, 0)
        return
    left = oracle[both] - after[both]
    figures["headroom_left"] = mean_ci(left, bounds=(-1.0, 1.0), **sampling)
    gain, gap = after[both] - before[both], oracle[both] - before[both]
    (figures["training_use"],) = ratios_ci(
        gain[:, None], gap[:, None], bounds=(-1.0, 1.0), **sampling
    )


def _ceiling(
    figures: dict[str, Estimate], oracle: np.ndarray, found: np.ndarray, sampling: dict[str, int]
) -> int:
    """Adds what a search with extra budget finds; returns the queries compared."""
    both = ~np.isnan(oracle) & ~np.isnan(found)
    best = np.maximum(oracle, found)[both]
    figures["ceiling_gain"] = mean_ci(best - oracle[both], bounds=(0.0, 1.0), **sampling)
    figures["ceiling_found"] = share_ci(best[oracle[both] == 0] > 0)
    return int(both.sum())


def _five_numbers(counts: np.ndarray) -> dict[str, float | None]:
    names = ("min", "p25", "median", "p75", "max")
    if len(counts) == 0:
        return dict.fromkeys(names)
    return dict(zip(names, np.quantile(counts, [0, 0.25, 0.5, 0.75, 1]).tolist()))
