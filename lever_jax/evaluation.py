"""Evaluation: every method on the same queries and pools, with intervals and paired differences.

Methods that a user can deploy see embeddings, and the VLM's own answers where they rerank. What
reads the ground truth to choose is an oracle (`decoding.is_oracle`): it bounds what a selector
could reach, is labelled so, and is never the best of anything.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lever_jax.baselines import REVERSED, baseline_picks
from lever_jax.decoding import (
    SHUFFLED,
    Answered,
    accuracies_of,
    answer,
    answer_best,
    decode,
    decoded_pairs,
    is_oracle,
)
from lever_jax.errors import InputError
from lever_jax.pooled import PooledQueries
from lever_jax.proposing import Proposer
from lever_jax.scoring import ScoringService, columns
from lever_jax.search import search_pools
from lever_jax.statistics import mean_ci, paired_difference

ORACLE = "oracle_in_pool"
METRICS = {"normalized": "accuracy", "official_2021": "accuracy_official"}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated.

    Attributes:
      shots: numbers of demonstrations, each its own table.
      metric: `normalized` or `official_2021`.
      decodings: of each selector, of `decoding.DECODINGS`.
      beam_width: of the decoding `beam`.
      rerank_width: W, pointers answered a query by `rerank` and `oracle_rerank`.
      random_seeds: random picks, and orders of `shuffled`, averaged a query.
      mmr_trade_off: of maximal marginal relevance, 1 is plain similarity.
      oracle_beam: pointers kept at each level of the oracle's search; 0 leaves the oracle out.
      oracle_verify: pointers of highest gt_prob that the oracle has answered.
      image_weight: of the joint similarity.
      question_weight: of the joint similarity.
      seed: of random picks and orders.
    """

    shots: tuple[int, ...] = (1, 2)
    metric: str = "normalized"
    decodings: tuple[str, ...] = ("greedy",)
    beam_width: int = 8
    rerank_width: int = 8
    random_seeds: int = 3
    mmr_trade_off: float = 0.7
    oracle_beam: int = 6
    oracle_verify: int = 4
    image_weight: float = 1.0
    question_weight: float = 1.0
    seed: int = 0

    def baselines(self, queries: PooledQueries, parts, shots: int) -> dict[str, list[np.ndarray]]:
        """`baseline_picks` under these settings."""
        names = ("image_weight", "question_weight", "mmr_trade_off", "random_seeds", "seed")
        own = {name: getattr(self, name) for name in names}
        return baseline_picks(queries, parts, shots=shots, **own)


class Picked(NamedTuple):
    """One draw of a method over all queries, as it goes into picks.jsonl.

    Attributes:
      method: as in eval.json.
      shots: S; 0 for zero-shot.
      draw: which seed, 0 for methods without chance.
      answered: pointers and records in the order of the queries.
    """

    method: str
    shots: int
    draw: int
    answered: Answered


def evaluate(
    queries: PooledQueries,
    parts: Mapping[str, tuple[int, int]],
    selectors: Mapping[str, Any],
    proposer: Proposer,
    service: ScoringService,
    config: EvaluationConfig,
    *,
    answer_types: Sequence[str] | None = None,
    on_picks: Callable[[Picked], None] | None = None,
) -> dict[str, Any]:
    """Evaluates baselines, selectors under every decoding, and the oracle.

    Args:
      queries: with their pools.
      parts: column ranges of the embeddings' parts.
      selectors: method name (`selector_rce`, ...) to parameters.
      proposer: makes the selectors' picks.
      service: answers prompts, through the store.
      config: what is evaluated.
      answer_types: the data set's label of each query, "" for none; no table by type by default.
      on_picks: called with each draw of each method as soon as it is answered.

    Returns:
      The content of `eval.json`: n, metric, shots -> method -> accuracy, ci95, n, by_answer_type,
      for methods with chance seeds, and for selectors that stop mean_shots; paired.

    Raises:
      InputError: a pool has fewer candidates than shots.
    """
    check_shots(queries, config.shots)
    column = METRICS[config.metric]
    types = np.array(answer_types if answer_types is not None else [""] * len(queries))
    tables: dict[str, dict] = {}
    shown: dict[tuple[str, int], float] = {}
    paired = []

    def note(method: str, shots: int, draws: Sequence[Answered]) -> np.ndarray:
        for draw, answered in enumerate(draws):
            if on_picks is not None:
                on_picks(Picked(method, shots, draw, answered))
        shown[method, shots] = float(np.mean([(d.pointers >= 0).sum(axis=1) for d in draws]))
        return accuracies_of(draws, column)

    nothing = np.zeros((len(queries), 0), np.int32)
    zero = note("zero_shot", 0, [answer(queries, nothing, service, label="evaluate zero-shot")])
    for shots in config.shots:
        accuracy = {"zero_shot": zero}
        baselines = config.baselines(queries, parts, shots)
        for name, draws in baselines.items():
            label = f"evaluate {name}, {shots} shots"
            answered = [answer(queries, pointers, service, label=label) for pointers in draws]
            accuracy[name] = note(name, shots, answered)
        for name, params in selectors.items():
            decoded = decode(
                name,
                params,
                config.decodings,
                queries,
                proposer,
                service,
                shots=shots,
                accuracy=column,
                beam_width=config.beam_width,
                rerank_width=config.rerank_width,
                shuffles=config.random_seeds,
                seed=config.seed,
            )
            accuracy |= {method: note(method, shots, draws) for method, draws in decoded.items()}
        if config.oracle_beam:
            found = _oracle(queries, baselines, service, config, shots, proposer.stops)
            accuracy[ORACLE] = note(ORACLE, shots, [found])
        table = {name: _row(values, types) for name, values in accuracy.items()}
        if proposer.stops:
            for name in table:
                if name.startswith("selector_"):
                    table[name]["mean_shots"] = shown[name, shots]
        tables[str(shots)] = table
        paired += _comparisons(accuracy, table, tuple(selectors), shots)
    return {"n": len(queries), "metric": config.metric, "shots": tables, "paired": paired}


def check_shots(queries: PooledQueries, shots: Sequence[int]) -> None:
    """Refuses more shots than the smallest pool has candidates.

    Raises:
      InputError: names both numbers.
    """
    smallest = int((queries.pool_ids >= 0).sum(axis=1).min(initial=queries.pool_ids.shape[1]))
    if max(shots) > smallest:
        raise InputError(
            f"--shots={max(shots)} exceeds the {smallest} candidates of the smallest pool; "
            "lower it or raise --pool_size"
        )


def answer_picks(
    queries: PooledQueries, pointers: np.ndarray, service: ScoringService, *, label: str
) -> dict[str, np.ndarray]:
    """Scores of one pointer [Q, S] a query, as `scoring.columns`."""
    return columns(answer(queries, pointers, service, label=label).records)


def best_similarity(table: Mapping[str, dict]) -> str | None:
    """The similarity of highest accuracy in a table of eval.json, in either direction."""
    known = [name for name in table if name.startswith("similarity_")]
    known = [name for name in known if table[name]["accuracy"] is not None]
    return max(known, key=lambda name: table[name]["accuracy"], default=None)


def gap_closed(table: Mapping[str, dict], method: str) -> float | None:
    """Share of the gap from the best similarity to the oracle that `method` closes.

    (accuracy(method) - best similarity) / (oracle - best similarity); None without a gap.
    """
    best = best_similarity(table)
    known = [ORACLE, method]
    if best is None or any(m not in table or table[m]["accuracy"] is None for m in known):
        return None
    floor = table[best]["accuracy"]
    gap = table[ORACLE]["accuracy"] - floor
    return (table[method]["accuracy"] - floor) / gap if gap > 0 else None


def _oracle(
    queries, baselines, service, config: EvaluationConfig, shots: int, shorter: bool
) -> Answered:
    """Best pick of each query among those that a search with the ground truth rates highest.

    The baselines' picks count too, so that the oracle does not lose to one that the search happened
    not to try. The selectors' picks do not: what bounds them may not depend on which of them are
    evaluated. A selector can therefore beat the oracle on a query, where the search missed. Where
    selectors stop, `shorter` lets the oracle stop too.
    """
    label = f"oracle, {shots} shots"
    rows = np.arange(len(queries))
    found = search_pools(
        queries,
        rows,
        service,
        shots=shots,
        beam=config.oracle_beam,
        label=label,
        shorter=shorter,
    )
    others = [draws[0] for name, draws in baselines.items() if name != "random"]
    candidates = [
        np.concatenate([pointers[: config.oracle_verify], *(own[row][None] for own in others)])
        for row, (pointers, _) in enumerate(found)
    ]
    return answer_best(queries, candidates, service, by=METRICS[config.metric], label=label)


def _row(draws: np.ndarray, types: np.ndarray) -> dict[str, Any]:
    """A method's entry, from its accuracies [draws, Q]."""
    values = draws.mean(axis=0)
    known = np.isfinite(values)
    row = _figures(values[known])
    if len(draws) > 1:
        row["seeds"] = _spread(draws[:, known])
    counts = collections.Counter(types[known].tolist())
    row["by_answer_type"] = {
        name: _figures(values[known & (types == name)]) for name, _ in counts.most_common() if name
    }
    return row


def _figures(values: np.ndarray) -> dict[str, Any]:
    estimate = mean_ci(values, bounds=(0.0, 1.0))
    return {"accuracy": estimate.value, "ci95": estimate.interval, "n": estimate.n}


def _spread(draws: np.ndarray) -> dict[str, Any]:
    """How the mean accuracy differs between draws, each over the same queries [draws, n]."""
    if not draws.shape[1]:
        return {"count": len(draws), "min": None, "max": None, "sd": None}
    means = draws.mean(axis=1)
    return {
        "count": len(draws),
        "min": float(means.min()),
        "max": float(means.max()),
        "sd": float(means.std(ddof=1)),
    }


def _comparisons(accuracy, table, selectors, shots) -> list[dict[str, Any]]:
    """Paired differences: to the best similarity, to the phase before, to the greedy picks."""
    best = best_similarity(table) or "similarity_image"
    chosen = [name for name in table if name.startswith("selector_") and not is_oracle(name)]
    pairs = [(name, best) for name in chosen]
    pairs += [pair for pair in zip(selectors[1:], selectors[:-1]) if set(pair) <= set(table)]
    for name in selectors:
        pairs += decoded_pairs(name, table)
    other = best.removesuffix(REVERSED) if best.endswith(REVERSED) else best + REVERSED
    pairs.append((other, best))
    pairs += [(best, "random"), (best, "zero_shot")]
    if ORACLE in accuracy and chosen:
        pairs.append((ORACLE, selectors[-1] if selectors[-1] in table else chosen[-1]))
    if shots == 1:  # One demonstration has one order: the same prompts, not a comparison.
        reordered = (REVERSED, SHUFFLED)
        pairs = [pair for pair in pairs if not any(name.endswith(reordered) for name in pair)]
    means = {name: draws.mean(axis=0) for name, draws in accuracy.items()}
    rows = []
    for a, b in pairs:
        both = np.isfinite(means[a]) & np.isfinite(means[b])
        estimate = paired_difference(means[a][both], means[b][both], bounds=(-1.0, 1.0))
        rows.append(
            {
                "a": a,
                "b": b,
                "shots": shots,
                "diff": estimate.value,
                "ci95": estimate.interval,
                "n": estimate.n,
            }
        )
    return rows
