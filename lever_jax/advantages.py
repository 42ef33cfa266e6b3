"""Advantages: how much better a pointer did than the other pointers of its query.

GRPO needs no value network because the group itself is the baseline; the methods differ in how
they subtract and scale it. Every function takes the rewards of ONE group and is lifted over query
groups with `jax.vmap`. Masked pointers, and every pointer of a flat group, get exactly 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lever_jax.errors import InputError
from lever_jax.rewards import is_flat


def _centred(rewards: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rewards minus their masked mean, 0 where masked, and how many counted."""
    count = jnp.sum(where)
    mean = jnp.sum(jnp.where(where, rewards, 0.0)) / jnp.maximum(count, 1)
    return jnp.where(where, rewards - mean, 0.0), count


def group(rewards: jax.Array, where: jax.Array) -> jax.Array:
    """A_i = (r_i - mean(r)) / std(r), std dividing by n (not n - 1).

    References: Shao et al., DeepSeekMath, 2024, arXiv:2402.03300.
    """
    centred, count = _centred(rewards, where)
    std = jnp.sqrt(jnp.sum(centred**2) / jnp.maximum(count, 1))
    return centred / jnp.where(std == 0, 1.0, std)


def mean(rewards: jax.Array, where: jax.Array) -> jax.Array:
    """A_i = r_i - mean(r). Without the division, easy and hard queries keep their weight.

    References: Liu et al., Understanding R1-Zero-like training (Dr. GRPO), 2025,
      arXiv:2503.20783.
    """
    return _centred(rewards, where)[0]


def leave_one_out(rewards: jax.Array, where: jax.Array) -> jax.Array:
    """A_i = r_i - mean of the other rewards = n / (n - 1) * (r_i - mean(r)).

    The baseline does not contain r_i, so the policy gradient is unbiased for i.i.d. draws.

    References: Kool et al., Buy 4 REINFORCE samples, get a baseline for free, 2019; Ahmadian et
      al., Back to basics (RLOO), 2024, arXiv:2402.14740.
    """
    centred, count = _centred(rewards, where)
    return centred * count / jnp.maximum(count - 1, 1)


def rank(rewards: jax.Array, where: jax.Array) -> jax.Array:
    """A_i = (number of rewards below r_i - number above) / (n - 1), in [-1, 1]; ties share.

    Blind to the scale of the reward, so one outlier cannot set the scale of the whole group.
    """
    below_minus_above = jnp.sign(rewards[:, None] - rewards[None, :])  # [G, G]
    both = where[:, None] & where[None, :]
    total = jnp.sum(jnp.where(both, below_minus_above, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(where) - 1, 1)


ADVANTAGES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "group": group,
    "mean": mean,
    "leave_one_out": leave_one_out,
    "rank": rank,
}


def compute_advantages(
    method: str,
    rewards: jax.Array,
    *,
    where: jax.Array | None = None,
    min_range: float = 1e-6,
) -> jax.Array:
    """Advantages of the pointers of one query group.

    Args:
      method: a name in `ADVANTAGES`.
      rewards: [G] rewards, any scale; masked entries may hold anything, NaN included.
      where: [G] bool, which pointers count. All by default.
      min_range: a group whose max - min reward is below it is flat and gets zeros.

    Returns:
      [G] advantages; 0 where masked. They sum to 0 over the counted pointers.

    Raises:
      InputError: unknown method.
    """
    if method not in ADVANTAGES:
        raise InputError(
            f"--advantage={method} is not an advantage; use one of {', '.join(ADVANTAGES)}"
        )
    rewards = jnp.asarray(rewards, jnp.float32)
    where = jnp.ones(rewards.shape, bool) if where is None else jnp.asarray(where)
    advantages = ADVANTAGES[method](rewards, where)
    return jnp.where(where & ~is_flat(rewards, where, min_range), advantages, 0.0)


class Weighted(NamedTuple):
    """What a group drawn without replacement contributes; see `without_replacement`.

    Attributes:
      advantages: [G]; 0 where masked.
      weights: [G] of the pointers in the sum that estimates an expectation; 0 where masked.
    """

    advantages: jax.Array
    weights: jax.Array


def without_replacement(
    rewards: jax.Array,
    log_probs: jax.Array,
    inclusion_log_probs: jax.Array,
    *,
    where: jax.Array | None = None,
    normalised: bool = False,
    min_range: float = 1e-6,
) -> Weighted:
    """Advantages and weights of a group drawn by stochastic beam search.

    w_i = p_i / q_i, with q_i the probability that pointer i is in the sample
    A_i = r_i (1 - p_i + w_i) - sum_j w_j r_j

    sum_i w_i A_i grad log p_i is then the policy gradient without bias; for a sample of all
    pointers it is exact. Normalised, with W = sum_j w_j:

    weight_i = w_i / (W - w_i + p_i),  A_i = r_i - sum_j w_j r_j / W

    which is biased, but blind to a constant added to the rewards, and of lower variance.

    Args:
      rewards: [G] rewards, any scale; masked entries may hold anything, NaN included.
      log_probs: [G] under the policy that drew them, nats.
      inclusion_log_probs: [G] from `sampling.inclusion_log_probs`, nats.
      where: [G] bool, which pointers count. All by default.
      normalised: which of the two.
      min_range: a group whose max - min reward is below it is flat and gets zeros.

    References: Kool, van Hoof & Welling, Stochastic beams and where to find them, 2019,
      arXiv:1903.06059; Kool et al., Buy 4 REINFORCE samples, get a baseline for free, 2019;
      Estimating gradients for discrete random variables by sampling without replacement, 2020,
      arXiv:2002.06043.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    where = jnp.ones(rewards.shape, bool) if where is None else jnp.asarray(where)
    p = jnp.where(where, jnp.exp(jnp.where(where, log_probs, 0.0)), 0.0)
    ratio = jnp.where(where, log_probs, 0.0) - jnp.where(where, inclusion_log_probs, 0.0)
    w = jnp.where(where, jnp.exp(ratio), 0.0)
    rewards = jnp.where(where, rewards, 0.0)
    expected, total = jnp.sum(w * rewards), jnp.sum(w)
    if normalised:
        advantages = rewards - expected / jnp.where(total > 0, total, 1.0)
        # The sum with w_i replaced by p_i, which is what it would be if i had been certain.
        others = total - w + p
        weights = w / jnp.where(others > 0, others, 1.0)
    else:
        advantages, weights = rewards * (1.0 - p + w) - expected, w
    live = where & ~is_flat(rewards, where, min_range)
    return Weighted(jnp.where(live, advantages, 0.0), jnp.where(where, weights, 0.0))
