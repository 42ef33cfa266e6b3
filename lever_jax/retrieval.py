"""Similarity retrieval: the one place that decides which demonstrations a query may choose from.

`build_pools` gives every query its exact top-K over the *whole* demonstration bank; mining,
training and evaluation all call it, so that they see the same pools. The orderings inside a pool
(`rank_within_pool`, `mmr`) are the baselines that the selector has to beat.

Embeddings are plain `[N, D]` arrays with named column ranges, `parts = {"image": (0, 64),
"question": (64, 128)}`. Similarity is the weighted mean of the cosines of the parts, so one part
never outvotes another by its width or its norm. Everything is NumPy: one matrix product finds the
candidates, then each is scored again in float64 in a fixed order, which makes a query's pool
bit-equal whatever batch or block it was computed in, and exact ties fall to the lower row.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lever_jax.errors import InputError

Parts = Mapping[str, tuple[int, int]]
Weights = Mapping[str, float]

_ROWS_AT_A_TIME = 4096  # bounds the float64 copies


class Pools(NamedTuple):
    """Candidate pools of B queries, most similar first.

    Attributes:
      rows: [B, K] int32, bank row of each action; 0 where masked.
      similarity: [B, K] float32 in [-1, 1]; 0 where masked.
      mask: [B, K] bool, which actions exist. All, unless `allow_short`.
    """

    rows: np.ndarray
    similarity: np.ndarray
    mask: np.ndarray


def similarity_features(
    embeddings: np.ndarray, parts: Parts, weights: Weights, mean: np.ndarray | None = None
) -> np.ndarray:
    """Rows whose dot product is the similarity: unit parts, each scaled by sqrt(its weight).

    Args:
      embeddings: [N, D].
      parts: name -> (first, past-the-last) column.
      weights: name -> weight >= 0; a part not named has weight 0. Only their ratios matter.
      mean: [D] subtracted first (the bank's mean, to centre), or None. A part that is then all
        zeros is similar to nothing (cosine 0).

    Returns:
      [N, D'] float32, the columns of the parts that have weight.

    Raises:
      InputError: a weight is negative or names no part, or all are zero.
    """
    for name, weight in weights.items():
        if name not in parts:
            raise InputError(
                f"similarity weight {name!r} names no part of the embeddings; "
                f"their parts are {', '.join(parts)}"
            )
        if not weight >= 0:
            raise InputError(f"similarity weight {name}={weight} must be 0 or more")
    total = sum(weights.values())
    if total == 0:
        raise InputError(
            f"all similarity weights are 0; give one of {', '.join(parts)} a positive weight"
        )
    used = [(parts[name], weight / total) for name, weight in weights.items() if weight > 0]
    width = sum(stop - start for (start, stop), _ in used)
    features = np.empty((len(embeddings), width), np.float32)
    for first in range(0, len(embeddings), _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        column = 0
        for (start, stop), weight in used:
            part = np.array(embeddings[rows, start:stop], np.float64)
            if mean is not None:
                part -= mean[start:stop]
            norm = np.sqrt((part * part).sum(axis=1, keepdims=True))
            part *= np.sqrt(weight) / np.where(norm > 0, norm, 1.0)
            features[rows, column : column + stop - start] = part
            column += stop - start
    return features


def similarity(
    query_embeddings: np.ndarray,
    bank_embeddings: np.ndarray,
    parts: Parts,
    weights: Weights,
    mean: np.ndarray | None = None,
) -> np.ndarray:
    """Weighted mean of the cosines of the parts, of every query with every demonstration.

    sim(q, d) = sum_p w_p * cos(q_p - mean_p, d_p - mean_p) / sum_p w_p

    Args:
      query_embeddings: [B, D].
      bank_embeddings: [N, D].
      parts, weights, mean: as in `similarity_features`.

    Returns:
      [B, N] float32 in [-1, 1].
    """
    queries = similarity_features(query_embeddings, parts, weights, mean)
    return queries @ similarity_features(bank_embeddings, parts, weights, mean).T


def build_pools(
    query_embeddings: np.ndarray,
    bank_embeddings: np.ndarray,
    *,
    pool_size: int,
    parts: Parts,
    weights: Weights,
    query_ids: np.ndarray,
    bank_ids: np.ndarray,
    query_images: Any = None,
    bank_images: Any = None,
    center: bool = False,
    random_share: float = 0.0,
    seed: int = 0,
    allow_short: bool = False,
    block: int | None = None,
) -> Pools:
    """Exact candidate pools over the whole bank.

    A demonstration with the query's own id, or on the query's own image, is never in its pool.
    A query's pool depends on that query, the bank and the options, never on the other queries.

    Args:
      query_embeddings: [B, D].
      bank_embeddings: [N, D].
      pool_size: K, demonstrations a pool.
      parts, weights: as in `similarity_features`.
      query_ids: [B] integers.
      bank_ids: [N] integers.
      query_images, bank_images: [B] and [N] keys (strings or integers) of the pictures; give
        both or neither.
      center: subtract the mean of the bank from both sides before the cosine.
      random_share: in [0, 1]; this share of the K places is drawn uniformly from the rest of the
        bank by a generator of (seed, query id), for pools that similarity alone would narrow.
      seed: of those draws.
      allow_short: mask the missing places of a pool instead of refusing.
      block: queries at a time, against the whole bank; by default what fits 128 MiB.

    Returns:
      `Pools`, ordered by similarity, ties by the lower row; random members are sorted in.

    Raises:
      InputError: `--pool_size` below 1 or above what the bank offers a query, or
        `--random_share` outside [0, 1].
    """
    total = len(bank_embeddings)
    if pool_size < 1:
        raise InputError(f"--pool_size={pool_size} must be at least 1")
    if not 0 <= random_share <= 1:
        raise InputError(f"--random_share={random_share} must be between 0 and 1")
    if (query_images is None) != (bank_images is None):
        raise ValueError("give query_images and bank_images together, or neither")
    if pool_size > total and not allow_short:
        raise InputError(
            f"--pool_size={pool_size} exceeds the {total} demonstrations in the bank; "
            "lower it or add demonstrations"
        )
    mean = np.mean(bank_embeddings, axis=0, dtype=np.float64) if center and total else None
    queries = similarity_features(query_embeddings, parts, weights, mean)
    bank = similarity_features(bank_embeddings, parts, weights, mean)
    excluded = _Matches(query_ids, bank_ids), _Matches(query_images, bank_images)
    block = block or max(1, 2**25 // max(total, 1))
    num_similar = pool_size - int(random_share * pool_size + 0.5)

    num_queries = len(query_embeddings)
    rows = np.zeros((num_queries, pool_size), np.int32)
    similarities = np.zeros((num_queries, pool_size), np.float32)
    mask = np.zeros((num_queries, pool_size), bool)
    for first in range(0, num_queries, block):
        scores = queries[first : first + block] @ bank.T  # [b, N]
        for q, score in enumerate(scores, start=first):
            for matches in excluded:
                score[matches.of(q)] = -np.inf
            available = int(np.count_nonzero(score > -np.inf))
            if available < pool_size and not allow_short:
                raise InputError(
                    f"--pool_size={pool_size} exceeds the {available} demonstrations that query "
                    f"{query_ids[q]} may use ({total - available} of {total} are the query itself "
                    "or on its image); lower it or add demonstrations"
                )
            chosen, exact = _most_similar(queries[q], bank, score, min(num_similar, available))
            num_random = min(pool_size, available) - len(chosen)
            if num_random:
                score[chosen] = -np.inf
                rest = np.flatnonzero(score > -np.inf)
                rng = np.random.default_rng([seed % 2**64, int(query_ids[q]) % 2**64])
                drawn = rng.choice(rest, num_random, replace=False)
                chosen = np.concatenate([chosen, drawn])
                exact = np.concatenate([exact, _exact_similarity(queries[q], bank, drawn)])
                order = np.lexsort((chosen, -exact))
                chosen, exact = chosen[order], exact[order]
            rows[q, : len(chosen)] = chosen
            similarities[q, : len(chosen)] = exact
            mask[q, : len(chosen)] = True
    return Pools(rows, similarities, mask)


def rank_within_pool(
    query: np.ndarray,
    pool: np.ndarray,
    parts: Parts,
    weights: Weights,
    *,
    mask: np.ndarray | None = None,
    mean: np.ndarray | None = None,
) -> np.ndarray:
    """Actions of one pool, most similar to the query first; ties to the lower action.

    The first S of them are a similarity baseline: `weights={"image": 1}`, `{"question": 1}` or
    both. Which end of the prompt the most similar one goes to is the caller's choice.

    Args:
      query: [D].
      pool: [K, D].
      parts, weights, mean: as in `similarity_features`.
      mask: [K] bool, which actions exist. All by default.

    Returns:
      [number of actions that exist] int32 actions.
    """
    actions = np.arange(len(pool)) if mask is None else np.flatnonzero(mask)
    features = similarity_features(pool, parts, weights, mean)
    feature = similarity_features(query[None], parts, weights, mean)[0]
    exact = _exact_similarity(feature, features, actions)
    return actions[np.lexsort((actions, -exact))].astype(np.int32)


def mmr(
    query: np.ndarray,
    pool: np.ndarray,
    shots: int,
    trade_off: float,
    parts: Parts,
    weights: Weights,
    *,
    mask: np.ndarray | None = None,
    mean: np.ndarray | None = None,
) -> np.ndarray:
    """Maximal marginal relevance: similar to the query, unlike what is already picked.

    next = argmax_d trade_off * sim(q, d) - (1 - trade_off) * max_{d' picked} sim(d, d')

    Args:
      query: [D].
      pool: [K, D].
      shots: S, how many to pick.
      trade_off: in [0, 1]; 1 is plain similarity, 0 only avoids repetition (after a first pick
        that ties everywhere and so falls to the lowest action).
      parts, weights, mean: as in `similarity_features`.
      mask: [K] bool, which actions exist. All by default.

    Returns:
      [S] int32 actions, in the order picked; ties to the lower action.

    Raises:
      InputError: more shots than demonstrations, or a trade-off outside [0, 1].

    References: Carbonell & Goldstein, The use of MMR, diversity-based reranking for reordering
      documents and producing summaries, SIGIR 1998.
    """
    if not 0 <= trade_off <= 1:
        raise InputError(f"MMR trade-off {trade_off} must be between 0 and 1")
    available = np.ones(len(pool), bool) if mask is None else np.array(mask, bool)
    if shots > available.sum():
        raise InputError(
            f"--shots={shots} exceeds the {available.sum()} demonstrations in the pool; "
            "lower it or raise --pool_size"
        )
    features = similarity_features(pool, parts, weights, mean)
    feature = similarity_features(query[None], parts, weights, mean)[0]
    every = np.arange(len(pool))
    relevance = _exact_similarity(feature, features, every)
    repetition = np.full(len(pool), -np.inf)
    picked = []
    for shot in range(shots):
        value = trade_off * relevance
        if shot:
            value = value - (1 - trade_off) * repetition
        pick = int(np.argmax(np.where(available, value, -np.inf)))
        picked.append(pick)
        available[pick] = False
        repetition = np.maximum(repetition, _exact_similarity(features[pick], features, every))
    return np.array(picked, np.int32)


class _Matches:
    """For each query, the bank rows that carry the same key (id or picture)."""

    def __init__(self, query_keys: Any, bank_keys: Any):
        self._order = np.empty(0, np.int64)
        self._starts = self._stops = None
        if query_keys is None:
            return
        query_keys, bank_keys = np.asarray(query_keys), np.asarray(bank_keys)
        self._order = np.argsort(bank_keys, kind="stable")
        ordered = bank_keys[self._order]
        self._starts = np.searchsorted(ordered, query_keys, side="left")
        self._stops = np.searchsorted(ordered, query_keys, side="right")

    def of(self, q: int) -> np.ndarray:
        if self._starts is None:
            return self._order
        return self._order[self._starts[q] : self._stops[q]]


def _exact_similarity(feature: np.ndarray, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float64 dot products, each summed in an order that depends on nothing but its length."""
    feature = feature.astype(np.float64)
    exact = np.empty(len(rows))
    for first in range(0, len(rows), _ROWS_AT_A_TIME):
        chunk = slice(first, first + _ROWS_AT_A_TIME)
        exact[chunk] = (features[rows[chunk]] * feature).sum(axis=1)
    return exact


def _most_similar(
    feature: np.ndarray, bank: np.ndarray, score: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` rows of highest exact similarity, in order, from approximate scores [N].

    A float32 dot product of n terms of two vectors of norm <= 1 is off by at most about n * eps;
    a row that belongs to the top is thus within twice that of the approximate count-th score.
    """
    if count == 0:
        return np.empty(0, np.int64), np.empty(0)
    kth = np.partition(score, len(score) - count)[len(score) - count]
    slack = 2 * (len(feature) + 2) * np.finfo(np.float32).eps
    candidates = np.flatnonzero((score >= kth - slack) & (score > -np.inf))
    exact = _exact_similarity(feature, bank, candidates)
    order = np.lexsort((candidates, -exact))[:count]
    return candidates[order], exact[order]
