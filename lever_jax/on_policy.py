"""On-policy groups for GRPO: drawn from the policy, then judged by the VLM through both stages.

The two halves are apart because they wait for different things: `draw` for the device that the
selector runs on, `judge` for the VLM and the store. So one round can be drawn while another is
judged.
"""

from typing import NamedTuple

import jax
import numpy as np

from lever_jax.errors import InputError
from lever_jax.mining import MiningConfig, RewardConfig, choose, group_batch
from lever_jax.policy import Params
from lever_jax.pooled import PooledQueries
from lever_jax.proposing import Proposer
from lever_jax.scoring import ScoringService, columns
from lever_jax.training import GroupBatch
from lever_jax.types import Rollouts

VERIFY = ("all", "top_m")


class Drawn(NamedTuple):
    """A group a query, drawn from the policy and not judged yet.

    Attributes:
      rows: int [n] which queries.
      rollouts: [n, G] the pointers, on the host.
      inclusion_log_probs: [n, G] of draws without replacement, else None.
      draws: of `training.DRAWS`.
    """

    rows: np.ndarray
    rollouts: Rollouts
    inclusion_log_probs: np.ndarray | None
    draws: str


def draw(
    proposer: Proposer,
    params: Params,
    key: jax.Array,
    rows: np.ndarray,
    *,
    shots: int,
    group_size: int,
    draws: str = "iid",
) -> Drawn:
    """Draws a group a query from the policy.

    Args:
      proposer: of the training queries.
      params: of the policy that draws.
      key: of the round.
      rows: int [n] which queries.
      shots: S.
      group_size: G; equal i.i.d. draws are scored once and count twice.
      draws: `iid`, or without replacement.
    """
    rows, options = np.asarray(rows), {"shots": shots, "num": group_size}
    if draws == "iid":
        return Drawn(rows, proposer.on_policy(params, key, rows, **options), None, draws)
    return Drawn(rows, *proposer.without_replacement(params, key, rows, **options), draws)


def judge(
    queries: PooledQueries,
    drawn: Drawn,
    service: ScoringService,
    reward: RewardConfig,
    *,
    verify: str,
    config: MiningConfig,
    label: str,
) -> tuple[GroupBatch, dict[str, np.ndarray]]:
    """Has the VLM judge what was drawn.

    Args:
      queries: with their pools.
      drawn: from `draw`.
      service: scores and answers, through the store.
      reward: how scores become rewards.
      verify: `all` answers every pointer; `top_m` only the best and the lowest ones, and leaves
        the rest out of the group, which biases the gradient. Draws without replacement want `all`.
      config: `verify_best` and `verify_low` for `top_m`.
      label: of the progress bar.

    Returns:
      Groups [n, G], and the scores of the draws, flat.

    Raises:
      InputError: an unknown `verify`, or one that does not go with how the groups were drawn.
    """
    if verify not in VERIFY:
        raise InputError(f"--verify={verify} is not one of {', '.join(VERIFY)}")
    if drawn.draws != "iid" and verify != "all":
        raise InputError(
            f"--draws={drawn.draws} weighs every pointer by its probability of being drawn; with "
            f"--verify={verify} some are left out by their score. Use --verify=all or --draws=iid"
        )
    rollouts, inclusion = drawn.rollouts, drawn.inclusion_log_probs
    group, place = np.nonzero(rollouts.mask)
    inclusion = None if inclusion is None else inclusion[group, place]
    owner = drawn.rows[group]
    ids = queries.demo_ids(owner, rollouts.pointers[group, place])
    owner_ids = queries.query_ids[owner]
    if verify == "top_m":
        gt_prob = columns(service.score(owner_ids, ids, label=label))["gt_prob"]
        chosen = choose(group, gt_prob, config.verify_best, config.verify_low)
        owner_ids, ids, group, place = (x[chosen] for x in (owner_ids, ids, group, place))
    scores = columns(service.verify(owner_ids, ids, label=label))
    rewards = reward.of(scores)
    batch = group_batch(
        queries,
        owner_ids,
        ids,
        rewards,
        rollouts.log_probs[group, place],
        size=rollouts.mask.shape[1],
        inclusion_log_probs=inclusion,
    )
    return batch, {**scores, "reward": rewards}
