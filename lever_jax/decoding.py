"""How a selector's distribution over pointers becomes one pointer a query.

`greedy` takes the most probable candidate at each shot, `beam` the most probable pointer of a beam.
`rerank` asks the VLM about the W most probable pointers and takes the one whose answer the VLM
itself is surest of: it costs W answers a query and reads no ground truth, so a user can deploy it.
`oracle_rerank` takes the one of the same W that is most accurate by the ground truth: it bounds
every rerank and is an oracle. `shuffled` shows the greedy pick in another order: an ablation that
says what the order is worth.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lever_jax.policy import Params
from lever_jax.pooled import PooledQueries
from lever_jax.proposing import Proposer
from lever_jax.scoring import ScoringService, columns
from lever_jax.store import ScoreRecord

DECODINGS = ("greedy", "beam", "rerank", "oracle_rerank", "shuffled")
ORACLE_RERANK, SHUFFLED = "_oracle_rerank", "_shuffled"
_SHUFFLE = 1  # Keeps the draws of orders apart from those of `baselines.random_picks`.


class Answered(NamedTuple):
    """One pick a query, and what the VLM said to it.

    Attributes:
      pointers: int32 [Q, S] actions; all -1 where the query has no pick.
      records: Q records in the order of the queries.
    """

    pointers: np.ndarray
    records: list[ScoreRecord]


def method_name(selector: str, decoding: str) -> str:
    """Name of a selector under a decoding, as in eval.json: greedy is the selector's own."""
    return selector if decoding == "greedy" else f"{selector}_{decoding}"


def decode(
    selector: str,
    params: Params,
    decodings: Sequence[str],
    queries: PooledQueries,
    proposer: Proposer,
    service: ScoringService,
    *,
    shots: int,
    accuracy: str,
    beam_width: int,
    rerank_width: int,
    shuffles: int,
    seed: int,
) -> dict[str, list[Answered]]:
    """A selector's picks under several decodings, answered by the VLM.

    Args:
      selector: method name of its greedy picks.
      params: its parameters.
      decodings: of `DECODINGS`.
      queries: with their pools.
      proposer: over the pool table of `queries`.
      service: answers prompts, through the store.
      shots: S.
      accuracy: column that `oracle_rerank` maximises, `accuracy` or `accuracy_official`.
      beam_width: of `beam`.
      rerank_width: W, pointers answered a query by `rerank` and `oracle_rerank`; the W that a
        beam search of that width finds.
      shuffles: orders drawn a query by `shuffled`; fewer where S has fewer.
      seed: of these orders.

    Returns:
      Method name to what was answered, one entry a draw.
    """
    rows = np.arange(len(queries))
    found: dict[str, list[Answered]] = {}
    greedy = beams = None
    for decoding in decodings:
        name = method_name(selector, decoding)
        label = f"evaluate {name}, {shots} shots"
        if decoding in ("greedy", "shuffled") and greedy is None:
            greedy = proposer.greedy(params, rows, shots=shots)
        if decoding in ("rerank", "oracle_rerank") and beams is None:
            drawn = proposer.beam(params, rows, shots=shots, width=rerank_width)
            beams = [own[mask] for own, mask in zip(drawn.pointers, drawn.mask)]
        if decoding == "greedy":
            draws = [answer(queries, greedy, service, label=label)]
        elif decoding == "beam":
            drawn = proposer.beam(params, rows, shots=shots, width=beam_width)
            draws = [answer(queries, drawn.pointers[:, 0], service, label=label)]
        elif decoding == "shuffled":
            draws = [
                answer(queries, order, service, label=label)
                for order in other_orders(greedy, queries.query_ids, draws=shuffles, seed=seed)
            ]
        else:
            by = "confidence" if decoding == "rerank" else accuracy
            draws = [answer_best(queries, beams, service, by=by, label=label)]
        found[name] = draws
    return found


def answer(
    queries: PooledQueries, pointers: np.ndarray, service: ScoringService, *, label: str
) -> Answered:
    """Has the VLM answer one pointer [Q, S] a query; S may be 0."""
    ids = queries.demo_ids(np.arange(len(queries)), pointers)
    return Answered(pointers, service.verify(queries.query_ids, ids, label=label))


def answer_best(
    queries: PooledQueries,
    candidates: Sequence[np.ndarray],
    service: ScoringService,
    *,
    by: str,
    label: str,
) -> Answered:
    """Has the VLM answer several pointers a query and keeps the best of each.

    Args:
      queries: with their pools.
      candidates: Q arrays int32 [m, S], in the order in which equals are preferred; m may be 0.
      service: answers prompts, through the store.
      by: column of `scoring.columns` that is maximised.
      label: of the progress bar.

    Returns:
      The first pointer of highest `by`; where all failed, the first. A query without candidates
      gets pointer -1 and a record that says so.
    """
    counts = [len(own) for own in candidates]
    shots = candidates[0].shape[1] if len(candidates) else 0
    owner = np.repeat(np.arange(len(queries)), counts)
    flat = np.concatenate([*candidates, np.zeros((0, shots), np.int32)])
    records = service.verify(queries.query_ids[owner], queries.demo_ids(owner, flat), label=label)
    values = np.nan_to_num(columns(records)[by], nan=-np.inf)
    pointers = np.full((len(queries), shots), -1, np.int32)
    chosen = [
        ScoreRecord(int(query_id), (), eval_failed="no prompt of its pool could be scored")
        for query_id in queries.query_ids
    ]
    for row, (start, count) in enumerate(zip(np.cumsum([0, *counts]), counts)):
        if count:
            best = start + int(np.argmax(values[start : start + count]))
            pointers[row], chosen[row] = flat[best], records[best]
    return Answered(pointers, chosen)


def other_orders(
    pointers: np.ndarray, query_ids: np.ndarray, *, draws: int, seed: int
) -> list[np.ndarray]:
    """The same demonstrations in other orders, uniform over the orders that are not the given one.

    Args:
      pointers: int32 [Q, S]; -1 after the end stays where it is.
      query_ids: [Q]; an order depends on (seed, draw, query id) alone.
      draws: how many orders; at most the S! - 1 that there are, and the pointers themselves where
        S is 1.
      seed: of the draws.

    Returns:
      One int32 [Q, S] array a draw.
    """
    shots = pointers.shape[1]
    if shots == 1:
        return [pointers]
    given, orders = np.arange(shots), []
    for draw in range(min(draws, math.factorial(shots) - 1)):
        shuffled = np.empty_like(pointers)
        for row, query_id in enumerate(query_ids):
            rng = np.random.default_rng([seed, draw, int(query_id), _SHUFFLE])
            shown = int((pointers[row] >= 0).sum())  # Fewer than S where a policy stopped.
            order = given.copy()
            while shown > 1 and (order == given).all():
                order[:shown] = rng.permutation(shown)
            shuffled[row] = pointers[row, order]
        orders.append(shuffled)
    return orders


def accuracies_of(draws: Sequence[Answered], accuracy: str) -> np.ndarray:
    """Accuracies [draws, Q] by the given column; NaN where a prompt failed."""
    return np.array([columns(one.records)[accuracy] for one in draws], np.float64)


def is_oracle(method: str) -> bool:
    """Whether a method of eval.json reads the ground truth to choose."""
    return method == "oracle_in_pool" or method.endswith(ORACLE_RERANK)


def decoded_pairs(selector: str, table: Mapping[str, object]) -> list[tuple[str, str]]:
    """Each other decoding of a selector against its greedy picks, of the methods in a table."""
    others = (method_name(selector, decoding) for decoding in DECODINGS if decoding != "greedy")
    return [(name, selector) for name in others if name in table and selector in table]
