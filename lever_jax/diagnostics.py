"""Health figures of mined data: is there anything in it to learn from?

The first question of every run is whether the data or the training is at fault. `measure_health`
answers it from one row a candidate, as plain arrays, with an interval beside every figure that is
a mean or a share; `verdict` turns the figures into "start GRPO" or "do not, because" by the rules
of one table. What cannot be known is None, never NaN and never a silent 0.

Words, as everywhere here: a candidate is *failed* if its prompt could not be scored or answered;
it is *verified* if it did not fail and its accuracy is known (stage B ran, or a certificate gave
the answer); it is *positive* if it is verified and its accuracy is above 0. A query counts for a
figure only if it has a candidate of the kind that the figure is about.
"""

from typing import Any, NamedTuple

import numpy as np

from lever_jax.statistics import Estimate, mean_ci, share_ci, spearman

_GAP = 0.2 + 1e-9  # accuracies are multiples of 0.1; a gap of 0.9 - 0.7 is not above 0.2
_SPEARMAN_CELLS = 100_000_000  # rows x resamples, some three seconds


class Candidates(NamedTuple):
    """Every stored candidate of every query, one row each, in any order.

    Attributes:
      query_id: [N] integers.
      source: [N] names of the proposal sources (strings).
      gt_prob: [N] `vqa_gt_prob`; NaN where unknown.
      accuracy: [N] VQA accuracy; NaN where no answer was generated.
      reward: [N] the reward trained on; NaN where there is none.
      failed: [N] bool, `eval_failed`. Scores of a failed row are not looked at.
      pointer: [N, S] ordered actions or demonstration ids, padded with -1; None if unknown.
      log_prob: [N] log-probability under the selector being judged, in nats, NaN where unknown;
        None if there is no selector yet.
      sampled: [N] bool, the candidates that were answered because a uniform draw said so. Rates
        over candidates are estimated from them alone: the others were answered because their
        score was high or low, or certified. None if all were answered alike.
    """

    query_id: np.ndarray
    source: np.ndarray
    gt_prob: np.ndarray
    accuracy: np.ndarray
    reward: np.ndarray
    failed: np.ndarray
    pointer: np.ndarray | None = None
    log_prob: np.ndarray | None = None
    sampled: np.ndarray | None = None


class Picks(NamedTuple):
    """What the selector picks for each query, where its pick was answered.

    Attributes:
      query_id: [P] integers, each at most once.
      accuracy: [P] VQA accuracy of the pick; NaN where unknown.
    """

    query_id: np.ndarray
    accuracy: np.ndarray


class Thresholds(NamedTuple):
    """What GRPO asks of the data.

    Attributes:
      max_zero_positive: largest share of queries without a positive, in [0, 1].
      min_spearman: smallest rank correlation of gt_prob and accuracy, in [-1, 1].
    """

    max_zero_positive: float = 0.1
    min_spearman: float = 0.3


DEFAULT_THRESHOLDS = Thresholds()


class Rule(NamedTuple):
    """One requirement: the figure must be `sense` ("<=" or ">=") the threshold."""

    figure: str
    sense: str
    threshold: str  # a field of Thresholds, and the name of the flag
    meaning: str
    advice: str
    advice_unknown: str
    advice_at_one: str = ""  # where the figure is 1.0 and the advice would then mislead


RULES = (
    Rule(
        figure="pct_zero_positive_query",
        sense="<=",
        threshold="max_zero_positive",
        meaning="queries for which no pointer was ever right; GRPO learns nothing from them",
        advice="raise --pool_size, or mine more proposals a query",
        advice_unknown="no candidate was verified; run stage B, and look at eval_failed",
        advice_at_one="not one answer was right whatever was shown: this VLM, asked in this way, "
        "knows nothing of these questions, and more proposals will not help; look at --model, "
        "--instruction and --max_pixels",
    ),
    Rule(
        figure="spearman_gt_prob_accuracy",
        sense=">=",
        threshold="min_spearman",
        meaning="how well gt_prob, by which candidates are chosen and rewarded, orders accuracy",
        advice="try --answer_weight=official, or --reward_mode=hard_plus_soft, which ignores "
        "gt_prob",
        advice_unknown="gt_prob or accuracy is the same for every verified candidate, or there "
        "are fewer than two; verify more of them, or raise --num_queries",
    ),
)


class Verdict(NamedTuple):
    """Whether GRPO should start.

    Attributes:
      ready: True if every rule holds.
      text: the decision and its reasons in one line.
      reasons: one dictionary a broken rule: figure, value, ci95, threshold, flag, text, advice.
    """

    ready: bool
    text: str
    reasons: list[dict[str, Any]]


def verdict(health: dict[str, Any], thresholds: Thresholds = DEFAULT_THRESHOLDS) -> Verdict:
    """Whether data with these figures is fit for GRPO, by `RULES`.

    A rule looks at the figure itself, not at its interval, which is printed beside it. A figure
    that could not be computed breaks its rule.

    Args:
      health: figures as from `measure_health`; only those that `RULES` name are looked at.
      thresholds: the flags' values.

    Returns:
      `Verdict`.
    """
    reasons = []
    for rule in RULES:
        value = health[rule.figure]
        threshold = getattr(thresholds, rule.threshold)
        flag = f"--{rule.threshold}"
        interval = health.get("ci95", {}).get(rule.figure)
        if value is None:
            text = f"{rule.figure} is unknown"
            advice = rule.advice_unknown
        elif value <= threshold if rule.sense == "<=" else value >= threshold:
            continue
        else:
            side = "above" if rule.sense == "<=" else "below"
            bounds = f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""
            text = f"{rule.figure}={value:.3g}{bounds} is {side} {flag}={threshold:g}"
            advice = rule.advice_at_one if value == 1 and rule.advice_at_one else rule.advice
        reasons.append(
            {
                "figure": rule.figure,
                "value": value,
                "ci95": interval,
                "threshold": threshold,
                "flag": flag,
                "text": f"{text} ({rule.meaning})",
                "advice": advice,
            }
        )
    if not reasons:
        return Verdict(True, "healthy: start GRPO", [])
    told = "; ".join(f"{reason['text']}: {reason['advice']}" for reason in reasons)
    return Verdict(False, f"not ready for GRPO: {told}", reasons)


def measure_health(
    candidates: Candidates,
    *,
    picks: Picks | None = None,
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
      estimated_from             those of them that the three rates over candidates come from:
                                 the uniformly sampled ones, or all where none is marked
      eval_failed                candidates that failed; pct_eval_failed is their share
      unique_ratio               different ordered pointers of a query / its candidates
      positive_rate              positive / verified candidates, of the sample
      positives_per_query        min, quartiles and max, over queries with a verified candidate
      pct_zero_positive_query    share of those queries that have no positive
      pct_flat_reward_query      share of the queries with a reward where max - min < min_range
      by_source                  candidates, verified, of the sample estimated_from,
                                 positive_rate and ci95 of each source
      spearman_gt_prob_accuracy  rank correlation over the verified candidates of the sample
      oracle_in_data             mean over queries of the best verified accuracy
      model_pick                 mean accuracy of the selector's pick
      headroom                   oracle_in_data - model_pick
      pct_headroom_over_0_2      share of queries where the gap is above 0.2
      verdict, ready, reasons    see `Verdict`

    The selector's pick is `picks` if given, else the query's candidate (not failed) with the
    highest `log_prob`, the earlier row if tied. Where there is a pick, the last four figures are
    over the `headroom_queries` queries for which pick and oracle are both verified; without one,
    oracle_in_data is over every query with a verified candidate and the other three are None.

    Args:
      candidates: the rows; none at all is allowed.
      picks: accuracy of the selector's picks, where they were answered apart from the data.
      thresholds: of the verdict.
      min_range: a group whose max - min reward is below it is flat.
      resamples: bootstrap resamples; fewer, at least 200, for the correlation of very many rows.
      seed: of the resampling.

    Returns:
      Figures of plain Python types, ready for JSON.

    Raises:
      ValueError: the arrays have different lengths.
    """
    rows = len(candidates.query_id)
    for name, column in candidates._asdict().items():
        if column is not None and len(column) != rows:
            raise ValueError(f"{name} has {len(column)} rows beside {rows} query ids")
    query_ids, query = np.unique(np.asarray(candidates.query_id), return_inverse=True)
    num_queries = len(query_ids)
    failed = np.asarray(candidates.failed, bool)
    gt_prob, accuracy, reward = (
        np.where(failed, np.nan, np.asarray(column, np.float64))
        for column in (candidates.gt_prob, candidates.accuracy, candidates.reward)
    )
    verified = ~np.isnan(accuracy)
    positive = accuracy > 0
    sampling = {"resamples": resamples, "seed": seed}

    def per_query(flags: np.ndarray) -> np.ndarray:
        return np.bincount(query[flags], minlength=num_queries)

    num_verified, num_positive = per_query(verified), per_query(positive)
    answered = num_verified > 0
    highest, lowest = _extremes(reward, query, num_queries)
    rewarded = np.isfinite(highest)
    sample = verified if candidates.sampled is None else verified & candidates.sampled
    both = sample & ~np.isnan(gt_prob)
    spearman_resamples = min(resamples, max(200, _SPEARMAN_CELLS // max(int(both.sum()), 1)))

    figures: dict[str, Estimate] = {
        "pct_eval_failed": share_ci(per_query(failed), np.bincount(query), **sampling),
        "unique_ratio": _unique_ratio(candidates.pointer, query, num_queries, sampling),
        "positive_rate": share_ci(per_query(positive & sample), per_query(sample), **sampling),
        "pct_zero_positive_query": share_ci(num_positive[answered] == 0),
        "pct_flat_reward_query": share_ci((highest - lowest)[rewarded] < min_range),
        "spearman_gt_prob_accuracy": spearman(
            gt_prob[both],
            accuracy[both],
            clusters=query[both],
            resamples=spearman_resamples,
            seed=seed,
        ),
    }
    by_source = {}
    source_names, source = np.unique(np.asarray(candidates.source, str), return_inverse=True)
    for code, name in enumerate(source_names):
        own = source == code
        counted = sample & own
        rate = share_ci(per_query(positive & counted), per_query(counted), **sampling)
        by_source[str(name)] = {
            "candidates": int(own.sum()),
            "verified": int((verified & own).sum()),
            "estimated_from": int(counted.sum()),
            "positive_rate": rate.value,
            "ci95": rate.interval,
        }
    oracle = _extremes(accuracy, query, num_queries)[0]
    if picks is not None:
        pick = _given_picks(picks, query_ids)
    else:
        pick = _most_probable(candidates.log_prob, accuracy, failed, query, num_queries)
    headroom_queries = _headroom(figures, oracle, pick, sampling)

    value = {name: estimate.value for name, estimate in figures.items()}
    health = {
        "queries": num_queries,
        "candidates": rows,
        "verified": int(verified.sum()),
        "estimated_from": int(sample.sum()),
        "unique_ratio": value["unique_ratio"],
        "positive_rate": value["positive_rate"],
        "positives_per_query": _five_numbers(num_positive[answered]),
        "pct_zero_positive_query": value["pct_zero_positive_query"],
        "pct_flat_reward_query": value["pct_flat_reward_query"],
        "by_source": by_source,
        "spearman_gt_prob_accuracy": value["spearman_gt_prob_accuracy"],
        "oracle_in_data": value["oracle_in_data"],
        "model_pick": value["model_pick"],
        "headroom": value["headroom"],
        "pct_headroom_over_0_2": value["pct_headroom_over_0_2"],
        "headroom_queries": headroom_queries,
        "eval_failed": int(failed.sum()),
        "pct_eval_failed": value["pct_eval_failed"],
        "ci95": {name: estimate.interval for name, estimate in figures.items()},
    }
    ready, text, reasons = verdict(health, thresholds)
    return {**health, "verdict": text, "ready": ready, "reasons": reasons}


def health_csv(health: dict[str, Any]) -> list[tuple]:
    """The figures as rows for `csv.writer`, header first.

    Columns: `figure` (nested names joined by a dot, as in by_source.beam.positive_rate), `value`
    (empty if unknown), and `low` and `high`, the 95% interval (empty if the figure has none).
    """
    table: list[tuple] = [("figure", "value", "low", "high")]
    for name, value in health.items():
        if name in ("ci95", "reasons", "stage"):
            continue
        if name == "by_source":
            for source, entry in value.items():
                for key in ("candidates", "verified", "estimated_from", "positive_rate"):
                    interval = entry["ci95"] if key == "positive_rate" else None
                    table.append((f"{name}.{source}.{key}", entry[key], *(interval or (None,) * 2)))
        elif isinstance(value, dict):
            table.extend((f"{name}.{key}", number, None, None) for key, number in value.items())
        else:
            table.append((name, value, *(health["ci95"].get(name) or (None, None))))
    return table


def _extremes(
    values: np.ndarray, query: np.ndarray, num_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Largest and smallest known value of each query, [Q] each; NaN where none is known."""
    known = ~np.isnan(values)
    highest = np.full(num_queries, np.nan)
    lowest = np.full(num_queries, np.nan)
    if known.any():
        order = np.argsort(query[known], kind="stable")
        owner, sorted_values = query[known][order], values[known][order]
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        highest[owner[starts]] = np.maximum.reduceat(sorted_values, starts)
        lowest[owner[starts]] = np.minimum.reduceat(sorted_values, starts)
    return highest, lowest


def _unique_ratio(
    pointer: np.ndarray | None, query: np.ndarray, num_queries: int, sampling: dict[str, int]
) -> Estimate:
    """Share of the rows that are the first of their ordered pointer in their query."""
    if pointer is None or len(query) == 0:
        return Estimate(None, None, None, 0)
    keys = np.column_stack([query, pointer])
    keys = keys[np.lexsort(keys.T[::-1])]
    first = np.ones(len(keys), bool)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    unique = np.bincount(keys[first, 0], minlength=num_queries)
    return share_ci(unique, np.bincount(query, minlength=num_queries), **sampling)


def _most_probable(
    log_prob: np.ndarray | None,
    accuracy: np.ndarray,
    failed: np.ndarray,
    query: np.ndarray,
    num_queries: int,
) -> np.ndarray:
    """Accuracy [Q] of each query's most probable candidate; NaN where unknown."""
    pick = np.full(num_queries, np.nan)
    if log_prob is None:
        return pick
    log_prob = np.asarray(log_prob, np.float64)
    rows = np.flatnonzero(~failed & ~np.isnan(log_prob))
    rows = rows[np.lexsort((rows, -log_prob[rows], query[rows]))]
    best = rows[np.flatnonzero(np.diff(query[rows], prepend=-1))]
    pick[query[best]] = accuracy[best]
    return pick


def _given_picks(picks: Picks, query_ids: np.ndarray) -> np.ndarray:
    """Accuracy [Q] of the given picks, in the order of query_ids; NaN where there is none."""
    pick = np.full(len(query_ids), np.nan)
    _, own, theirs = np.intersect1d(query_ids, picks.query_id, return_indices=True)
    pick[own] = np.asarray(picks.accuracy, np.float64)[theirs]
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


def _five_numbers(counts: np.ndarray) -> dict[str, float | None]:
    names = ("min", "p25", "median", "p75", "max")
    if len(counts) == 0:
        return dict.fromkeys(names)
    return dict(zip(names, np.quantile(counts, [0, 0.25, 0.5, 0.75, 1]).tolist()))
