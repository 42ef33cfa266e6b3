"""Two-stage mining: score many proposals cheaply, generate for the few that matter.

Stage A scores every proposal of a query by `vqa_gt_prob`, without generating: first those that
need no scores, then, where the quotas ask for it, a local search around the best. Stage B asks for
the VLM's own answer to the best of them, to some low ones for contrast, and to a few drawn
uniformly, which the health figures are estimated from; where stage A has certified the greedy
answer it costs nothing. What has an answer is kept, with its source and log-probability, and is
what RCE learns from.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lever_jax.diagnostics import Candidates
from lever_jax.errors import InputError
from lever_jax.pooled import PooledQueries
from lever_jax.proposing import Proposer
from lever_jax.rewards import compute_rewards
from lever_jax.sampling import MIXABLE, check_quotas
from lever_jax.scoring import ScoringService, columns
from lever_jax.store import Proposals, ScoreRecord, Store
from lever_jax.training import GroupBatch
from lever_jax.types import SOURCES, Rollouts

LOCAL_SEARCH = "local_search"
"""The source whose quota is proposed in a second step, around the best of the first."""


@dataclasses.dataclass(frozen=True)
class MiningConfig:
    """How many pointers are proposed, and which are answered.

    Attributes:
      proposals: pointers scored a query in stage A.
      quotas: how many of them from each source; the rest is drawn at random. `local_search` comes
        last, whatever its place.
      temperature: of the source `sample`.
      top_p: of the source `top_p`.
      verify_best: pointers of highest gt_prob answered in stage B.
      verify_low: pointers of lowest gt_prob answered for contrast.
      verify_uniform: pointers drawn uniformly and answered, from which rates are estimated.
      batch: queries mined between two commits.
    """

    proposals: int = 64
    quotas: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {
            "beam": 12,
            "sample": 20,
            "top_p": 12,
            "retrieval": 4,
            "random": 16,
        }
    )
    temperature: float = 1.0
    top_p: float = 0.9
    verify_best: int = 12
    verify_low: int = 8
    verify_uniform: int = 4
    batch: int = 100

    def __post_init__(self):
        check_quotas(self.quotas, self.proposals, sources=(*MIXABLE, LOCAL_SEARCH))
        if self.proposals == self.local > 0:
            raise InputError(
                f"--quotas: local_search:{self.local} is all of --proposals={self.proposals}; it "
                "needs others that are scored first"
            )
        if self.verify_best < 2 or self.verify_low < 1:
            raise InputError(
                f"--verify_best={self.verify_best} and --verify_low={self.verify_low}: a group "
                "needs at least two high pointers and a low one"
            )
        if self.verify_uniform < 1:
            raise InputError(
                f"--verify_uniform={self.verify_uniform}: the health figures are estimated from "
                "pointers drawn uniformly; give at least 1"
            )

    @property
    def local(self) -> int:
        """Pointers a query that are proposed around the best of the others."""
        return self.quotas.get(LOCAL_SEARCH, 0)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How scores become rewards; see `rewards.compute_rewards`.

    `shot_cost` is taken off for each demonstration shown, so that a policy that stops shows fewer.
    """

    mode: str = "hard01_plus_gtprob"
    hard_weight: float = 2.0
    soft_weight: float = 1.0
    similarity_weight: float = 0.0
    shot_cost: float = 0.0

    def recipe(self) -> dict[str, Any]:
        """What decides rewards; a cost of 0 is left out, as recipes were before there was one."""
        fields = dataclasses.asdict(self)
        return fields if self.shot_cost else {k: fields[k] for k in fields if k != "shot_cost"}

    def of(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Rewards of `scoring.columns`; NaN where a score is missing."""
        rewards = compute_rewards(
            self.mode,
            accuracy=scores["accuracy"],
            gt_prob=scores["gt_prob"],
            similarity=scores["similarity"],
            hard_weight=self.hard_weight,
            soft_weight=self.soft_weight,
            similarity_weight=self.similarity_weight,
        )
        return rewards - self.shot_cost * scores["shots"] if self.shot_cost else rewards


def mine(
    stage: str,
    queries: PooledQueries,
    proposer: Proposer,
    params,
    key: jax.Array,
    service: ScoringService,
    config: MiningConfig,
    *,
    shots: int,
) -> None:
    """Mines every query that `stage` has not mined yet; resumes where it was stopped.

    Args:
      stage: name under which the store keeps the proposals.
      queries: with their pools.
      proposer: draws pointers.
      params: of the selector that proposes.
      key: of the stage; each query's key is made from it and the query's id.
      service: scores and answers, through the store.
      config: how many of what.
      shots: S.
    """
    store = service.store
    finished = np.isin(queries.query_ids, store.proposed_queries(stage))
    remaining = np.flatnonzero(~finished)
    for start in range(0, len(remaining), config.batch):
        rows = remaining[start : start + config.batch]
        label = f"mining {start + len(rows)}/{len(remaining)} queries"
        drawn = propose(queries, rows, proposer, params, key, service, config, shots, label)
        group, place = np.nonzero(drawn.mask)
        owner = rows[group]
        ids = queries.demo_ids(owner, drawn.pointers[group, place])
        owner_ids = queries.query_ids[owner]
        _, answered = _score_and_answer(owner_ids, ids, service, config, label)
        store.put_proposals(
            stage,
            owner_ids,
            ids,
            [SOURCES[source] for source in drawn.sources[group, place]],
            drawn.log_probs[group, place],
            kept=answered,
        )
    _keep_retried(stage, queries.query_ids[finished], service, config)


def _score_and_answer(
    query_ids: np.ndarray,
    ids: np.ndarray,
    service: ScoringService,
    config: MiningConfig,
    label: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Both stages for pointers [n, S]: bool [n], which were chosen to be answered, which are."""
    group = np.unique(query_ids, return_inverse=True)[1]
    scores = columns(service.score(query_ids, ids, label=label))
    chosen = choose(group, scores["gt_prob"], config.verify_best, config.verify_low)
    chosen |= uniform_sample(query_ids, ids, config.verify_uniform)
    answers = columns(service.verify(query_ids[chosen], ids[chosen], label=label))
    answered = np.isfinite(scores["accuracy"])  # By a certificate, or for another phase.
    answered[chosen] = np.isfinite(answers["accuracy"])
    return chosen, answered


def _keep_retried(
    stage: str, query_ids: np.ndarray, service: ScoringService, config: MiningConfig
) -> None:
    """Lets pointers into their groups that failed when they were mined and have a score since.

    Their queries choose anew what stage B answers. What was kept stays; of the rest only what is
    chosen now, or had failed, joins: answers that other phases asked for do not.
    """
    store = service.store
    retried = store.superseded()
    affected = np.array(sorted({query_id for query_id, _ in retried}), np.int64)
    affected = affected[np.isin(affected, query_ids)]
    if not len(affected):
        return
    found = store.get_proposals(stage, affected)
    label = f"mining {len(affected)} queries with retried prompts"
    chosen, answered = _score_and_answer(found.query_ids, found.pointers, service, config, label)
    prompts = zip(found.query_ids.tolist(), found.pointers.tolist(), strict=True)
    had_failed = [(query, tuple(i for i in ids if i >= 0)) in retried for query, ids in prompts]
    kept = (found.kept == 1) | (answered & (chosen | np.array(had_failed, bool)))
    new = kept & (found.kept != 1)
    store.mark_kept(stage, found.query_ids[new], found.pointers[new], kept[new])


def propose(
    queries: PooledQueries,
    rows: np.ndarray,
    proposer: Proposer,
    params,
    key: jax.Array,
    service: ScoringService,
    config: MiningConfig,
    shots: int,
    label: str,
) -> Rollouts:
    """The proposals of some queries; scores those that the local search starts from.

    Args:
      queries: with their pools.
      rows: int [n] which of them.
      proposer: draws pointers.
      params: of the selector that proposes.
      key: of the stage.
      service: scores prompts, through the store.
      config: how many from which source.
      shots: S.
      label: of the progress bar.

    Returns:
      Rollouts [n, `config.proposals`], different pointers within a query.
    """
    drawn = proposer.mixture(
        params,
        key,
        rows,
        shots=shots,
        num=config.proposals - config.local,
        quotas={name: count for name, count in config.quotas.items() if name != LOCAL_SEARCH},
        temperature=config.temperature,
        top_p=config.top_p,
    )
    if not config.local:
        return drawn
    group, place = np.nonzero(drawn.mask)
    owner = rows[group]
    ids = queries.demo_ids(owner, drawn.pointers[group, place])
    gt_prob = np.full(drawn.mask.shape, np.nan, np.float32)
    records = service.score(queries.query_ids[owner], ids, label=label)
    gt_prob[group, place] = columns(records)["gt_prob"]
    key = jax.random.fold_in(key, SOURCES.index(LOCAL_SEARCH))
    near = proposer.local_search(params, key, rows, drawn, gt_prob, num=config.local)
    return jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), drawn, near)


def choose(group: np.ndarray, gt_prob: np.ndarray, best: int, low: int) -> np.ndarray:
    """Which pointers stage B answers: those of highest and those of lowest gt_prob.

    Args:
      group: int [n], which query a pointer belongs to.
      gt_prob: [n] NaN where the prompt could not be scored.
      best: pointers a query from the top.
      low: pointers a query from the bottom.

    Returns:
      bool [n].
    """
    chosen = np.zeros(len(group), bool)
    for query in np.unique(group):
        own = np.flatnonzero((group == query) & np.isfinite(gt_prob))
        order = own[np.argsort(-gt_prob[own], kind="stable")]
        chosen[order[:best]] = True
        chosen[order[max(len(order) - low, 0) :]] = True
    return chosen


def uniform_sample(query_ids: np.ndarray, pointers: np.ndarray, size: int) -> np.ndarray:
    """A uniform sample of each query's pointers that anyone can draw again.

    Pointers are ordered by a hash of query and pointer, and the first `size` of each query are
    taken, so whether one is in the sample depends on no score, no source and no other query.

    Args:
      query_ids: int64 [n].
      pointers: int64 [n, S] demonstration ids, distinct within a query.
      size: pointers a query.

    Returns:
      bool [n].
    """
    keys = np.ascontiguousarray(np.column_stack([query_ids, pointers]), np.int64)
    digests = [hashlib.blake2b(key.tobytes(), digest_size=8).digest() for key in keys]
    ranks = np.array([int.from_bytes(digest) for digest in digests], np.uint64)
    order = np.lexsort((ranks, query_ids))
    owner = np.asarray(query_ids)[order]
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]]) if len(owner) else owner
    place = np.arange(len(owner)) - np.repeat(starts, np.diff(np.r_[starts, len(owner)]))
    sample = np.zeros(len(owner), bool)
    sample[order] = place < size
    return sample


def group_batch(
    queries: PooledQueries,
    query_ids: np.ndarray,
    demo_ids: np.ndarray,
    rewards: np.ndarray,
    log_probs: np.ndarray,
    *,
    size: int | None = None,
    inclusion_log_probs: np.ndarray | None = None,
) -> GroupBatch:
    """Gathers pointers into groups by query.

    Args:
      queries: with their pools; the batch names queries by row of it.
      query_ids: int64 [n].
      demo_ids: int64 [n, S] demonstration ids, -1 after the end of a pointer.
      rewards: [n]; pointers without one (NaN) are left out.
      log_probs: [n] under the policy that drew them, nats.
      size: G; the largest group by default.
      inclusion_log_probs: [n] of pointers drawn without replacement.

    Returns:
      One group a query that has any pointer, padded to G by mask.

    Raises:
      InputError: a pointer names a demonstration that is not in its query's pool.
    """
    order = np.argsort(queries.query_ids, kind="stable")
    row = order[np.searchsorted(queries.query_ids[order], query_ids)]
    known = np.isfinite(rewards)
    actions = positions_in_pool(queries, query_ids, demo_ids).astype(np.int32)
    stray = ((actions < 0) & (demo_ids >= 0)).any(-1)
    if stray.any():
        at = int(np.argmax(stray))
        raise InputError(
            f"query {query_ids[at]}: pointer {demo_ids[at].tolist()} names a demonstration outside "
            "its candidate pool; the data were mined with other pools, use another --workdir"
        )
    by_row = np.flatnonzero(known)
    by_row = by_row[np.argsort(row[by_row], kind="stable")]
    members = np.split(by_row, np.flatnonzero(np.diff(row[by_row])) + 1) if len(by_row) else []
    width = size or max(map(len, members), default=1)
    shape = (len(members), width)
    batch = GroupBatch(
        query_rows=np.array([row[m[0]] for m in members], np.int32),
        pointers=np.zeros((*shape, demo_ids.shape[1]), np.int32),
        rewards=np.zeros(shape, np.float32),
        behaviour_log_probs=np.zeros(shape, np.float32),
        mask=np.zeros(shape, bool),
        inclusion_log_probs=None if inclusion_log_probs is None else np.zeros(shape, np.float32),
    )
    for i, m in enumerate(members):
        m = m[:width]
        if inclusion_log_probs is not None:
            batch.inclusion_log_probs[i, : len(m)] = inclusion_log_probs[m]
        batch.pointers[i, : len(m)] = actions[m]
        batch.rewards[i, : len(m)] = rewards[m]
        batch.behaviour_log_probs[i, : len(m)] = log_probs[m]
        batch.mask[i, : len(m)] = True
    return batch


def mined_groups(
    stage: str, queries: PooledQueries, store: Store, reward: RewardConfig
) -> GroupBatch:
    """The kept pointers of a mining stage as training groups."""
    mined, records = _mined(stage, queries, store)
    kept = mined.kept == 1
    rewards = reward.of(columns(records))
    return group_batch(
        queries,
        mined.query_ids[kept],
        mined.pointers[kept],
        rewards[kept],
        mined.log_probs[kept],
    )


def mined_candidates(
    stage: str, queries: PooledQueries, store: Store, reward: RewardConfig, config: MiningConfig
) -> Candidates:
    """Every proposal of a mining stage as rows for the health figures.

    Answers that later phases asked for are left out, so that the figures stay those of the data
    that RCE learns from, however often they are measured.
    """
    mined, records = _mined(stage, queries, store)
    scores = columns(records)
    for name in ("accuracy", "similarity"):
        scores[name] = np.where(mined.kept == 1, scores[name], np.nan)
    return Candidates(
        query_id=mined.query_ids,
        source=np.array(mined.sources),
        gt_prob=scores["gt_prob"],
        accuracy=scores["accuracy"],
        reward=reward.of(scores),
        failed=np.array([record.eval_failed is not None for record in records], bool),
        pointer=mined.pointers,
        sampled=uniform_sample(mined.query_ids, mined.pointers, config.verify_uniform),
        position=positions_in_pool(queries, mined.query_ids, mined.pointers),
        similarity=scores["similarity"],
        reason=np.array([record.eval_failed or "" for record in records], str),
    )


def positions_in_pool(
    queries: PooledQueries, query_ids: np.ndarray, demo_ids: np.ndarray
) -> np.ndarray:
    """Actions int64 [n, S] of demonstration ids [n, S]; -1 where one is not in the query's pool."""
    order = np.argsort(queries.query_ids, kind="stable")
    row = order[np.searchsorted(queries.query_ids[order], query_ids)]
    found = np.full(demo_ids.shape, -1, np.int64)
    for shot in range(demo_ids.shape[1]):
        matches = (queries.pool_ids[row] == demo_ids[:, shot, None]) & (
            demo_ids[:, shot, None] >= 0
        )
        found[:, shot] = np.where(matches.any(axis=1), matches.argmax(axis=1), -1)
    return found


def _mined(stage, queries, store) -> tuple[Proposals, list[ScoreRecord]]:
    mined = store.get_proposals(stage, queries.query_ids)
    return mined, store.get_scores(mined.query_ids, mined.pointers)
