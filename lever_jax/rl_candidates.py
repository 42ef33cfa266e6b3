"""RL JSON, ours or of others, as rows for the health figures."""

from collections.abc import Iterable

import numpy as np

from lever_jax.diagnostics import Candidates
from lever_jax.mining import RewardConfig, uniform_sample
from lever_jax.rl_json_fields import Candidate, QueryEntry
from lever_jax.scoring import columns

_CHUNK = 4096


def candidates_of(
    entries: Iterable[QueryEntry], reward: RewardConfig, verify_uniform: int
) -> Candidates:
    """Every pointer of a file as a row, a few queries in memory at a time.

    Rates over candidates are estimated from a uniform sample where the file shows that it has one:
    if some pointers were answered and others were not, and all those that `uniform_sample` draws
    were answered, as in what a run here exports. Else they are over all that were answered.

    Args:
      entries: as `rl_json.read_rl_json` yields them.
      reward: the reward that is to be judged; NaN where a score that it reads is missing.
      verify_uniform: pointers a query that mining answered because a uniform draw said so.

    Returns:
      `Candidates`; the answer type is the "answer_type" of a query's "query" object.
    """
    blocks, batch, width = [], [], 0
    for entry in entries:
        batch += [(entry, candidate) for candidate in entry.candidates]
        if len(batch) >= _CHUNK:
            blocks.append(_block(batch))
            batch = []
    blocks.append(_block(batch))
    width = max(block["pointer"].shape[1] for block in blocks)
    for block in blocks:
        for name in ("pointer", "position"):
            short = width - block[name].shape[1]
            block[name] = np.pad(block[name], ((0, 0), (0, short)), constant_values=-1)
    joined = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    scores = {name: joined[name] for name in ("gt_prob", "accuracy", "similarity")}
    scores["shots"] = np.sum(joined["pointer"] >= 0, axis=1)
    needs_similarity = reward.similarity_weight and np.isnan(scores["similarity"]).all()
    rewards = np.full(len(joined["failed"]), np.nan) if needs_similarity else reward.of(scores)
    log_prob = joined["log_prob"]
    types = joined["answer_type"]
    return Candidates(
        query_id=joined["query_id"],
        source=joined["source"],
        **{name: scores[name] for name in ("gt_prob", "accuracy")},
        reward=rewards,
        failed=joined["failed"],
        pointer=joined["pointer"],
        log_prob=None if np.isnan(log_prob).all() else log_prob,
        sampled=_sampled(joined, verify_uniform),
        position=joined["position"] if (joined["position"] >= 0).any() else None,
        similarity=None if np.isnan(scores["similarity"]).all() else scores["similarity"],
        reason=joined["reason"],
        answer_type=types if (types != "").any() else None,
    )


def _block(batch: list[tuple[QueryEntry, Candidate]]) -> dict[str, np.ndarray]:
    records = [candidate.record for _, candidate in batch]
    width = max((len(record.pointer) for record in records), default=0)
    places = {}
    pointer = np.full((len(batch), width), -1, np.int64)
    position = pointer.copy()
    for row, (entry, candidate) in enumerate(batch):
        ids = candidate.record.pointer
        pointer[row, : len(ids)] = ids
        if entry.pool is not None:
            if entry.query_id not in places:
                places[entry.query_id] = {one: place for place, one in enumerate(entry.pool)}
            position[row, : len(ids)] = [places[entry.query_id].get(one, -1) for one in ids]
    types = [str(entry.description.get("answer_type") or "") for entry, _ in batch]
    return {
        "query_id": np.array([record.query_id for record in records], np.int64),
        "source": np.array([candidate.source for _, candidate in batch], object),
        "failed": np.array([record.eval_failed is not None for record in records], bool),
        "reason": np.array([record.eval_failed or "" for record in records], object),
        "pointer": pointer,
        "position": position,
        "log_prob": np.array([candidate.log_prob for _, candidate in batch], np.float64),
        "answer_type": np.array(types, object),
        **columns(records),
    }


def _sampled(joined: dict[str, np.ndarray], size: int) -> np.ndarray | None:
    fine = ~joined["failed"]
    answered = ~np.isnan(joined["accuracy"])
    if answered[fine].all() or (joined["pointer"] < 0).any():
        return None
    sample = uniform_sample(joined["query_id"], joined["pointer"], size)
    return sample if answered[sample & fine].all() else None
