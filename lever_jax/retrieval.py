"""Which demonstrations a query may choose from, and the similarity baselines inside a pool.

`build_pools` is the one place that decides it: mining, training and evaluation all call it, so
that they see the same pools. It searches the *whole* bank, exactly, in blocks (`topk.py`), so the
bank may be a memory-mapped file larger than memory. The orderings inside a pool
(`rank_within_pool`, `mmr`) are the baselines that the selector has to beat.

A query's pool is bit-equal whatever batch, block, memory budget or device it was made with; exact
ties fall to the lower row of the bank.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lever_jax.errors import InputError
from lever_jax.products import Pairs
from lever_jax.similarity import Parts, Weights, exact_similarity, similarity_features
from lever_jax.topk import Search

SOURCES = ("image", "question", "both", "random")


class Excluded(NamedTuple):
    """How many demonstrations all pools together had to leave out, each counted once.

    Attributes:
      itself: they are the query itself (same id).
      same_image: they are on the query's image.
      near_duplicate: their image is nearly the query's.
    """

    itself: int
    same_image: int
    near_duplicate: int


class Pools(NamedTuple):
    """Candidate pools of B queries, most similar first.

    Attributes:
      rows: [B, K] int32, bank row of each action; 0 where masked.
      similarity: [B, K] float32 in [-1, 1]; 0 where masked.
      mask: [B, K] bool, which actions exist. All, unless `allow_short`.
      excluded: what no pool may hold.
    """

    rows: np.ndarray
    similarity: np.ndarray
    mask: np.ndarray
    excluded: Excluded


def pool_quotas(pool_size: int, shares: Mapping[str, int]) -> dict[str, int]:
    """Places of a pool by source, in the order in which they are filled; they sum to K.

    Args:
      pool_size: K.
      shares: source (`image`, `question`, `both`, `random`) -> places >= 0. What they leave open
        is added to `both`.

    Raises:
      InputError: a source that does not exist, or more places than K.
    """
    if pool_size < 1:
        raise InputError(f"--pool_size={pool_size} must be at least 1")
    for name, count in shares.items():
        if name not in SOURCES:
            raise InputError(
                f"--pool_shares: {name!r} is no source of a pool; they are {', '.join(SOURCES)}"
            )
        if count < 0:
            raise InputError(f"--pool_shares: {name}:{count} must be 0 or more")
    if sum(shares.values()) > pool_size:
        raise InputError(
            f"--pool_shares add up to {sum(shares.values())}, more than --pool_size={pool_size}; "
            "lower them or enlarge the pool"
        )
    quotas = {name: shares.get(name, 0) for name in SOURCES}
    quotas["both"] += pool_size - sum(shares.values())
    return quotas


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
    mean: np.ndarray | None = None,
    shares: Mapping[str, int] | None = None,
    near_duplicate: float = 1.0,
    seed: int = 0,
    allow_short: bool = False,
    memory: int = 2**29,
    accelerator: bool | None = None,
    bar: Callable | None = None,
) -> Pools:
    """Exact candidate pools over the whole bank.

    A demonstration with the query's own id, on the query's own image or on a near duplicate of it
    is never in its pool. A query's pool depends on that query, the bank and the options, never on
    the other queries.

    Args:
      query_embeddings: [B, D].
      bank_embeddings: [N, D], in memory or memory-mapped; it is read in blocks, never copied.
      pool_size: K, demonstrations a pool.
      parts: name -> (first, past-the-last) column.
      weights: name -> weight >= 0 of a part in the similarity that orders pools and fills `both`.
      query_ids: [B] integers.
      bank_ids: [N] integers.
      query_images, bank_images: [B] and [N] keys (strings or integers) of the pictures; give
        both or neither.
      mean: [D] subtracted from both sides before a cosine (the bank's mean, to centre), or None.
      shares: places by source, see `pool_quotas`; None is all `both`. `image` and `question` are
        filled by the cosine of that part alone, `both` by the similarity; each skips what an
        earlier one took. `random` is drawn uniformly from the rest of the bank by a generator of
        (seed, query id).
      near_duplicate: a demonstration is out if the cosine of its image part with the query's
        exceeds this; 1 or more is off.
      seed: of the random places.
      allow_short: mask the missing places of a pool instead of refusing.
      memory: bytes that a search may hold beside the inputs and the pools.
      accelerator, bar: as in `topk.Search`.

    Returns:
      `Pools`, ordered by similarity whatever source a member is from, ties by the lower row.

    Raises:
      InputError: `--pool_size` or `--pool_shares` that cannot be filled, or embeddings that are
        not finite.
    """
    total, num_queries = len(bank_embeddings), len(query_embeddings)
    quotas = pool_quotas(pool_size, shares or {})
    if (query_images is None) != (bank_images is None):
        raise ValueError("give query_images and bank_images together, or neither")
    if pool_size > total and not allow_short:
        raise InputError(
            f"--pool_size={pool_size} exceeds the {total} demonstrations in the bank; "
            "lower it or add demonstrations"
        )

    def search(weights: Weights, label: str) -> Search:
        return Search(
            query_embeddings,
            bank_embeddings,
            parts,
            weights,
            mean,
            memory=memory,
            accelerator=accelerator,
            bar=bar,
            label=label,
        )

    itself = _matches(query_ids, bank_ids)
    pairs = _union(itself, _matches(query_images, bank_images), num_queries)
    same_image = len(pairs.rows) - len(itself.rows)
    if near_duplicate < 1:
        near = search({"image": 1.0}, "near duplicates").above(near_duplicate, memory // 64)
        if near is None:
            raise InputError(
                f"--near_duplicate={near_duplicate} takes over {memory // 64:,} pairs of a query "
                "and a demonstration for duplicates; raise it"
            )
        pairs = _union(pairs, near, num_queries)
    excluded = Excluded(
        len(itself.rows), same_image, len(pairs.rows) - len(itself.rows) - same_image
    )
    available = total - np.bincount(pairs.queries, minlength=num_queries)
    if not allow_short and (available < pool_size).any():
        q = int(np.argmin(available))
        raise InputError(
            f"--pool_size={pool_size} exceeds the {available[q]} demonstrations that query "
            f"{query_ids[q]} may use ({total - available[q]} of {total} are the query itself or "
            "on its image or a near duplicate of it); lower it or add demonstrations"
        )

    joint = search(weights, "search the bank")
    found, depth = [], 0
    for source in ("image", "question", "both"):
        depth += quotas[source]
        if quotas[source]:
            by = joint if source == "both" else search({source: 1.0}, f"search by {source}")
            found.append((quotas[source], *by.top_k(depth, pairs)))
    if len(found) == 1 and quotas["both"] == pool_size:
        _, rows, exact = found[0]
    else:
        rows = _filled(found, quotas["random"], pairs, total, query_ids, pool_size, seed)
        rows, exact = _ordered(rows, joint)
    mask = rows >= 0
    return Pools(
        np.where(mask, rows, 0).astype(np.int32),
        np.where(mask, exact, 0.0).astype(np.float32),
        mask,
        excluded,
    )


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
    feature = similarity_features(query[None], parts, weights, mean)
    exact = exact_similarity(feature, features[actions])
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
    feature = similarity_features(query[None], parts, weights, mean)
    relevance = exact_similarity(feature, features)
    repetition = np.full(len(pool), -np.inf)
    picked = []
    for shot in range(shots):
        value = trade_off * relevance
        if shot:
            value = value - (1 - trade_off) * repetition
        pick = int(np.argmax(np.where(available, value, -np.inf)))
        picked.append(pick)
        available[pick] = False
        repetition = np.maximum(repetition, exact_similarity(features[pick][None], features))
    return np.array(picked, np.int32)


def _matches(query_keys: Any, bank_keys: Any) -> Pairs:
    """Pairs of a query and the bank rows that carry the same key (id or picture)."""
    if query_keys is None:
        return Pairs.none()
    query_keys, bank_keys = np.asarray(query_keys), np.asarray(bank_keys)
    order = np.argsort(bank_keys, kind="stable")
    ordered = bank_keys[order]
    starts = np.searchsorted(ordered, query_keys, side="left")
    counts = np.searchsorted(ordered, query_keys, side="right") - starts
    queries = np.repeat(np.arange(len(query_keys)), counts)
    within = np.arange(len(queries)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Pairs.of(queries, order[np.repeat(starts, counts) + within], len(query_keys))


def _union(a: Pairs, b: Pairs, num_queries: int) -> Pairs:
    queries = np.concatenate([a.queries, b.queries])
    return Pairs.of(queries, np.concatenate([a.rows, b.rows]), num_queries)


def _filled(found, num_random, excluded: Pairs, total, query_ids, pool_size, seed) -> np.ndarray:
    """Rows [B, K] of mixed pools in no particular order, -1 where a pool is short."""
    order = np.argsort(excluded.queries, kind="stable")
    barred = np.split(
        excluded.rows[order],
        np.searchsorted(excluded.queries[order], np.arange(1, len(query_ids))),
    )
    out = np.full((len(query_ids), pool_size), -1, np.int64)
    for q, query_id in enumerate(query_ids):
        chosen = np.empty(0, np.int64)
        for quota, rows, _ in found:
            new = rows[q][(rows[q] >= 0) & ~np.isin(rows[q], chosen)]
            chosen = np.concatenate([chosen, new[:quota]])
        if num_random:
            rng = np.random.default_rng([seed % 2**64, int(query_id) % 2**64])
            taken = np.unique(np.concatenate([chosen, barred[q]]))
            rest = total - len(taken)
            drawn = rng.choice(rest, min(num_random, rest), replace=False)
            # The i-th row that is free has as many taken rows before it as this counts.
            skipped = np.searchsorted(taken - np.arange(len(taken)), drawn, side="right")
            chosen = np.concatenate([chosen, drawn + skipped])
        out[q, : len(chosen)] = chosen
    return out


def _ordered(rows: np.ndarray, joint: Search) -> tuple[np.ndarray, np.ndarray]:
    """Rows and exact similarities [B, K], most similar first, ties by the lower row."""
    exact = np.full(rows.shape, -np.inf)
    queries, places = np.nonzero(rows >= 0)
    exact[queries, places] = joint.exact(queries, rows[queries, places])
    order = np.lexsort((rows, -exact), axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(exact, order, axis=1)
