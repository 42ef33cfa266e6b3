"""Evaluation: every method on the same queries and pools, with intervals and paired differences.

Methods that a user can deploy see embeddings only. `oracle_in_pool` searches the pool with the
ground truth in hand; it bounds what any selector could reach and is labelled an oracle.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lever_jax.pooled import PooledQueries
from lever_jax.proposing import Proposer
from lever_jax.retrieval import mmr, rank_within_pool
from lever_jax.scoring import ScoringService, columns
from lever_jax.search import search_pools
from lever_jax.statistics import Estimate, mean_ci, paired_difference

SIMILARITIES = ("similarity_image", "similarity_question", "similarity_joint")
ORACLE = "oracle_in_pool"
METRICS = {"normalized": "accuracy", "official_2021": "accuracy_official"}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated.

    Attributes:
      shots: numbers of demonstrations, each its own table.
      metric: `normalized` or `official_2021`.
      random_seeds: random picks averaged a query.
      mmr_trade_off: of maximal marginal relevance, 1 is plain similarity.
      oracle_beam: pointers kept at each level of the oracle's search; 0 leaves the oracle out.
      oracle_verify: pointers of highest gt_prob that the oracle has answered.
      image_weight: of the joint similarity.
      question_weight: of the joint similarity.
      seed: of random picks.
    """

    shots: tuple[int, ...] = (1, 2)
    metric: str = "normalized"
    random_seeds: int = 3
    mmr_trade_off: float = 0.7
    oracle_beam: int = 6
    oracle_verify: int = 4
    image_weight: float = 1.0
    question_weight: float = 1.0
    seed: int = 0


def evaluate(
    queries: PooledQueries,
    parts: Mapping[str, tuple[int, int]],
    selectors: Mapping[str, Any],
    proposer: Proposer,
    service: ScoringService,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Evaluates baselines, selectors and the oracle.

    Args:
      queries: with their pools.
      parts: column ranges of the embeddings' parts.
      selectors: method name (`selector_rce`, ...) to parameters; picks are greedy.
      proposer: makes the selectors' picks.
      service: answers prompts, through the store.
      config: what is evaluated.

    Returns:
      The content of `eval.json`: n, metric, shots -> method -> accuracy, ci95, n; paired.
    """
    tables: dict[str, dict] = {}
    paired = []
    zero = _answers(queries, [np.zeros((len(queries), 0), np.int32)], service, config, "zero-shot")
    for shots in config.shots:
        picks = baseline_picks(queries, parts, shots, config)
        rows = np.arange(len(queries))
        for name, params in selectors.items():
            picks[name] = [proposer.greedy(params, rows, shots=shots)]
        accuracy = {"zero_shot": zero}
        for name, pointers in picks.items():
            label = f"evaluate {name}, {shots} shots"
            accuracy[name] = _answers(queries, pointers, service, config, label)
        if config.oracle_beam:
            accuracy[ORACLE] = _oracle(queries, shots, service, config)
            # The oracle may not lose to a pick that it happened not to try.
            accuracy[ORACLE] = np.fmax.reduce(
                [accuracy[ORACLE], *(accuracy[n] for n in picks if n != "random")]
            )
        tables[str(shots)] = {name: _row(values) for name, values in accuracy.items()}
        paired += _comparisons(accuracy, tables[str(shots)], tuple(selectors), shots)
    return {"n": len(queries), "metric": config.metric, "shots": tables, "paired": paired}


def baseline_picks(
    queries: PooledQueries, parts, shots: int, config: EvaluationConfig
) -> dict[str, list[np.ndarray]]:
    """Picks that need no training: int32 [Q, S] actions, one array a seed, most similar last."""
    table = queries.table
    embeddings, bank = np.asarray(table.queries), np.asarray(table.bank)
    rows, mask = np.asarray(table.rows), np.asarray(table.mask)
    joint = {"image": config.image_weight, "question": config.question_weight}
    weights = {
        "similarity_image": {"image": 1.0},
        "similarity_question": {"question": 1.0},
        "similarity_joint": joint,
    }
    picks: dict[str, list[np.ndarray]] = {"random": []}
    for seed in range(config.random_seeds):
        drawn = []
        for query_id, own in zip(queries.query_ids, mask):
            rng = np.random.default_rng([config.seed, seed, int(query_id)])
            drawn.append(rng.permutation(np.flatnonzero(own))[:shots])
        picks["random"].append(np.array(drawn, np.int32))
    for name, part_weights in weights.items():
        ranked = [
            rank_within_pool(q, bank[r], parts, part_weights, mask=m, mean=queries.mean)[:shots]
            for q, r, m in zip(embeddings, rows, mask)
        ]
        picks[name] = [np.array(ranked, np.int32)[:, ::-1]]
    diverse = [
        mmr(q, bank[r], shots, config.mmr_trade_off, parts, joint, mask=m, mean=queries.mean)
        for q, r, m in zip(embeddings, rows, mask)
    ]
    picks["mmr"] = [np.array(diverse, np.int32)[:, ::-1]]
    return picks


def answer_picks(
    queries: PooledQueries, pointers: np.ndarray, service: ScoringService, *, label: str
) -> dict[str, np.ndarray]:
    """Scores of one pointer [Q, S] a query, as `scoring.columns`."""
    rows = np.arange(len(queries))
    ids = queries.demo_ids(rows, pointers)
    return columns(service.verify(queries.query_ids, ids, label=label))


def gap_closed(table: Mapping[str, dict], method: str) -> float | None:
    """Share of the gap from the best similarity to the oracle that `method` closes.

    (accuracy(method) - best similarity) / (oracle - best similarity); None without a gap.
    """
    if ORACLE not in table or table[ORACLE]["accuracy"] is None:
        return None
    best = max(table[name]["accuracy"] for name in SIMILARITIES)
    gap = table[ORACLE]["accuracy"] - best
    return (table[method]["accuracy"] - best) / gap if gap > 0 else None


def _answers(queries, pointers, service, config, label) -> np.ndarray:
    """Accuracy [Q] of each query's pick, averaged over the given picks; NaN where it failed."""
    column = METRICS[config.metric]
    return np.mean(
        [answer_picks(queries, p, service, label=label)[column] for p in pointers], axis=0
    )


def _oracle(queries, shots, service, config) -> np.ndarray:
    """Best accuracy [Q] among the pointers that a search with the ground truth rates highest."""
    rows = np.arange(len(queries))
    found = search_pools(
        queries, rows, service, shots=shots, beam=config.oracle_beam, label=f"oracle, {shots} shots"
    )
    tried = [pointers[: config.oracle_verify] for pointers, _ in found]
    owner = np.repeat(rows, list(map(len, tried)))
    flat = np.concatenate([t.reshape(-1, shots) for t in tried])
    records = service.verify(
        queries.query_ids[owner], queries.demo_ids(owner, flat), label=f"oracle, {shots} shots"
    )
    best = np.full(len(queries), -np.inf)
    values = columns(records)[METRICS[config.metric]]
    known = np.isfinite(values)
    np.maximum.at(best, owner[known], values[known])
    return np.where(np.isfinite(best), best, np.nan)


def _row(values: np.ndarray) -> dict[str, Any]:
    estimate = mean_ci(values[np.isfinite(values)])
    return {"accuracy": estimate.value, "ci95": _bounds(estimate), "n": estimate.n}


def _bounds(estimate: Estimate) -> list[float] | None:
    return None if estimate.low is None else [estimate.low, estimate.high]


def _comparisons(accuracy, table, selectors, shots) -> list[dict[str, Any]]:
    """Paired differences: each selector to the best similarity and to the one before it."""
    best = max(SIMILARITIES, key=lambda name: table[name]["accuracy"] or 0.0)
    pairs = [(name, best) for name in selectors]
    pairs += list(zip(selectors[1:], selectors[:-1]))
    pairs += [(best, "random"), (best, "zero_shot")]
    if ORACLE in accuracy and selectors:
        pairs.append((ORACLE, selectors[-1]))
    rows = []
    for a, b in pairs:
        both = np.isfinite(accuracy[a]) & np.isfinite(accuracy[b])
        estimate = paired_difference(accuracy[a][both], accuracy[b][both])
        rows.append(
            {
                "a": a,
                "b": b,
                "shots": shots,
                "diff": estimate.value,
                "ci95": _bounds(estimate),
                "n": estimate.n,
            }
        )
    return rows
