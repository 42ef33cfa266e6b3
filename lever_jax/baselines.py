"""Picks that need no training: random draws, similarity in both directions, and MMR.

They stand beside every selector in the evaluation, over the same pools. Nothing here asks the VLM
or reads a ground truth.
"""

import numpy as np

from lever_jax.pooled import PooledQueries
from lever_jax.retrieval import Parts, mmr, rank_within_pool

REVERSED = "_reversed"


def baseline_picks(
    queries: PooledQueries,
    parts: Parts,
    *,
    shots: int,
    image_weight: float,
    question_weight: float,
    mmr_trade_off: float,
    random_seeds: int,
    seed: int,
) -> dict[str, list[np.ndarray]]:
    """The baselines' picks, most similar last: next to the question.

    Args:
      queries: with their pools.
      parts: column ranges of the embeddings' parts.
      shots: S.
      image_weight: of the joint similarity, which is also MMR's.
      question_weight: likewise.
      mmr_trade_off: of `retrieval.mmr`, in [0, 1].
      random_seeds: draws of `random`.
      seed: of these draws.

    Returns:
      Method name to one int32 [Q, S] array of actions a draw. `_reversed` behind a similarity
      shows the same demonstrations most similar first.
    """
    table = queries.table
    embeddings, bank = np.asarray(table.queries), np.asarray(table.bank)
    masks = queries.pool_ids >= 0
    pools = [(q, bank[r], m) for q, r, m in zip(embeddings, np.asarray(table.rows), masks)]
    joint = {"image": image_weight, "question": question_weight}
    weights = {
        "similarity_image": {"image": 1.0},
        "similarity_question": {"question": 1.0},
        "similarity_joint": joint,
    }
    picks = {
        "random": [
            random_picks(queries, shots=shots, seed=seed, draw=draw) for draw in range(random_seeds)
        ]
    }
    first = {
        name: [
            rank_within_pool(q, pool, parts, own, mask=m, mean=queries.mean)[:shots]
            for q, pool, m in pools
        ]
        for name, own in weights.items()
    }
    picks |= {name: [np.array(ranked, np.int32)[:, ::-1]] for name, ranked in first.items()}
    picks |= {name + REVERSED: [np.array(ranked, np.int32)] for name, ranked in first.items()}
    diverse = [
        mmr(q, pool, shots, mmr_trade_off, parts, joint, mask=m, mean=queries.mean)
        for q, pool, m in pools
    ]
    picks["mmr"] = [np.array(diverse, np.int32)[:, ::-1]]
    return picks


def random_picks(queries: PooledQueries, *, shots: int, seed: int, draw: int) -> np.ndarray:
    """Uniform draws without replacement, int32 [Q, S]; each from (seed, draw, query id) alone."""
    drawn = []
    for query_id, mask in zip(queries.query_ids, queries.pool_ids >= 0):
        rng = np.random.default_rng([seed, draw, int(query_id)])
        drawn.append(rng.permutation(np.flatnonzero(mask))[:shots])
    return np.array(drawn, np.int32)
