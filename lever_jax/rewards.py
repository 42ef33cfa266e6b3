"""Scores to rewards: what the vision-language model says, turned into what training sees.

A *score* is a measurement (`vqa_gt_prob`, VQA accuracy, similarity of the answer to the ground
truths); a *reward* is a choice made from it. Every mode is one small named function of the same
four arguments, and `compute_rewards` picks one by name. All of it works on NumPy and on JAX
arrays, on any shape, and keeps NaN: a pointer whose answer was never generated (accuracy NaN) has
no reward, rather than a low one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lever_jax.errors import InputError

Array = Any  # np.ndarray or jax.Array


def _namespace(*arrays: Array):
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def hard(accuracy: Array) -> Array:
    """1.0 where the answer counts as right (accuracy > 0), else 0.0; NaN stays NaN."""
    xp = _namespace(accuracy)
    accuracy = xp.asarray(accuracy)
    return xp.where(xp.isnan(accuracy), accuracy, (accuracy > 0).astype(accuracy.dtype))


def hard01_plus_gtprob(accuracy: Array, gt_prob: Array, hard_weight: float, soft_weight: float):
    """hard_weight * hard + soft_weight * gt_prob."""
    return hard_weight * hard(accuracy) + soft_weight * gt_prob


def hard01_plus_gtprob_separated(
    accuracy: Array, gt_prob: Array, hard_weight: float, soft_weight: float
):
    """2 * hard_weight * hard + soft_weight * gt_prob.

    The doubled step keeps every positive above every negative as long as
    soft_weight < 2 * hard_weight, gt_prob being at most 1.
    """
    return 2 * hard_weight * hard(accuracy) + soft_weight * gt_prob


def acc_plus_gtprob(accuracy: Array, gt_prob: Array, hard_weight: float, soft_weight: float):
    """hard_weight * accuracy + soft_weight * gt_prob."""
    return hard_weight * accuracy + soft_weight * gt_prob


def hard_plus_soft(accuracy: Array, gt_prob: Array, hard_weight: float, soft_weight: float):
    """hard_weight * hard + soft_weight * accuracy; gt_prob is not looked at."""
    del gt_prob
    return hard_weight * hard(accuracy) + soft_weight * accuracy


def hard_only(accuracy: Array, gt_prob: Array, hard_weight: float, soft_weight: float):
    """hard_weight * hard."""
    del gt_prob, soft_weight
    return hard_weight * hard(accuracy)


def soft_only(accuracy: Array, gt_prob: Array, hard_weight: float, soft_weight: float):
    """soft_weight * accuracy."""
    del gt_prob, hard_weight
    return soft_weight * accuracy


REWARD_MODES: dict[str, Callable[[Array, Array, float, float], Array]] = {
    "hard01_plus_gtprob": hard01_plus_gtprob,
    "hard01_plus_gtprob_separated": hard01_plus_gtprob_separated,
    "acc_plus_gtprob": acc_plus_gtprob,
    "hard_plus_soft": hard_plus_soft,
    "hard_only": hard_only,
    "soft_only": soft_only,
}


def compute_rewards(
    mode: str,
    *,
    accuracy: Array,
    gt_prob: Array,
    similarity: Array | None = None,
    hard_weight: float = 2.0,
    soft_weight: float = 1.0,
    similarity_weight: float = 0.0,
) -> Array:
    """Rewards of scored pointers under a named mode.

    r = mode(accuracy, gt_prob) + similarity_weight * similarity * [hard = 0]

    Args:
      mode: a name in `REWARD_MODES`.
      accuracy: [...] VQA accuracy in [0, 1]; NaN where no answer was generated.
      gt_prob: [...] `vqa_gt_prob` in [0, 1]; NaN where the prompt could not be scored.
      similarity: [...] best cosine of the answer and the ground truths, in [-1, 1]. It counts
        only where hard = 0, so that it can order wrong answers and never outweighs a right one
        that is already paid for. May be None when similarity_weight is 0.
      hard_weight: weight of the term that says right or wrong.
      soft_weight: weight of the graded term.
      similarity_weight: weight of the similarity; 0 leaves it out.

    Returns:
      [...] rewards, of the inputs' kind (NumPy or JAX). NaN where a score that the mode uses, or
      the accuracy, is NaN.

    Raises:
      InputError: unknown mode, or similarity_weight set without similarities.
    """
    if mode not in REWARD_MODES:
        raise InputError(
            f"--reward_mode={mode} is not a reward mode; use one of {', '.join(REWARD_MODES)}"
        )
    xp = _namespace(accuracy, gt_prob, similarity)
    accuracy, gt_prob = xp.asarray(accuracy), xp.asarray(gt_prob)
    rewards = REWARD_MODES[mode](accuracy, gt_prob, hard_weight, soft_weight)
    if similarity_weight == 0:
        return rewards
    if similarity is None:
        raise InputError(
            f"--similarity_weight={similarity_weight} needs the similarity of every generated "
            "answer, and these records have none; set it to 0 or mine again"
        )
    similarity = xp.asarray(similarity)
    shaping = xp.where(hard(accuracy) == 0, similarity, xp.zeros_like(similarity))
    return rewards + similarity_weight * shaping


def is_flat(rewards: Array, where: Array | None = None, min_range: float = 1e-6) -> Array:
    """Whether a group's rewards teach nothing: max - min < min_range, or all are equal.

    Args:
      rewards: [G] the rewards actually trained on.
      where: [G] bool, which pointers count. All by default.
      min_range: in units of the reward.

    Returns:
      Boolean scalar. An empty group is flat. A NaN among the counted rewards makes the answer
      False, so that the mistake reaches the loss and stops the run instead of dropping the group.
    """
    xp = _namespace(rewards, where)
    rewards = xp.asarray(rewards)
    where = xp.ones(rewards.shape, bool) if where is None else xp.asarray(where)
    highest = xp.max(xp.where(where, rewards, -xp.inf), initial=-xp.inf)
    lowest = xp.min(xp.where(where, rewards, xp.inf), initial=xp.inf)
    return is_flat_between(lowest, highest, min_range)


def is_flat_between(lowest: Array, highest: Array, min_range: float) -> Array:
    """Whether groups teach nothing whose lowest and highest rewards these are, of any one shape.

    Equals are flat where min_range is 0, too: rounding alone would make their advantages.
    """
    return (highest - lowest < min_range) | (highest <= lowest)
