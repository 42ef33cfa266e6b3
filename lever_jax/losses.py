"""Losses of the selector: supervised, reward-weighted cross-entropy, GRPO, and KL divergences.

Every function takes ONE query group, `[G]` pointers of one query, and is lifted over groups with
`jax.vmap`; `mean_over_groups` then averages over the groups that counted. Pointers that do not
count are masked by `where`: their log-probabilities may be -inf or anything else, and reach
neither the value nor the gradient. A *counted* pointer that the policy can never draw (-inf, or
`masking.MASKED`) is a mistake of the caller and shows as an infinite or absurd loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lever_jax.rewards import is_flat

# exp(20) = 4.9e8 is far outside any clip range; beyond it float32 overflows and gradients are NaN.
_MAX_LOG_RATIO = 20.0


def _mask(where: jax.Array | None, like: jax.Array, *others: jax.Array) -> jax.Array:
    """The mask to use, after checking that nothing would broadcast by accident."""
    where = jnp.ones(like.shape, bool) if where is None else jnp.asarray(where)
    for other in (where, *others):
        if other.shape != like.shape:
            raise ValueError(f"shapes differ: {other.shape} beside log_probs {like.shape}")
    return where


def _masked_mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1)


def mean_over_groups(
    losses: jax.Array, counted: jax.Array, number: jax.Array | None = None
) -> jax.Array:
    """Mean loss of the groups that counted; 0 if none did.

    Args:
      losses: [B] loss of each group; ignored where counted is 0.
      counted: [B] 1.0 if the group counted, 0.0 if it was flat or padding.
      number: scalar, how many groups count in the whole batch that these are a part of; the
        results of all parts add up to its mean. By default they are all.

    Returns:
      Scalar: sum of the counted losses over their number. Flat groups are in neither.
    """
    total = jnp.sum(jnp.where(counted > 0, losses * counted, 0.0))
    number = jnp.sum(counted) if number is None else number
    return total / jnp.maximum(number, 1.0)


def supervised_loss(
    log_probs: jax.Array,
    *,
    weights: jax.Array | None = None,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Pointer cross-entropy against one target, or a weighted set of targets, of one query.

    L = -sum_i w_i * log pi(target_i) / sum_i w_i

    log pi of a pointer is the sum over its shots, so this is the cross-entropy of the whole
    pointer, not the mean over its shots.

    Args:
      log_probs: [G] log pi of each target pointer, in nats; G = 1 for a single target.
      weights: [G] >= 0, any scale. Equal by default.
      where: [G] bool, which targets count. All by default.

    Returns:
      Loss in nats, and 1.0 if any target had weight or 0.0 if none did.
    """
    weights = jnp.ones_like(log_probs) if weights is None else jnp.asarray(weights)
    where = _mask(where, log_probs, weights) & (weights > 0)
    weights = jnp.where(where, weights, 0.0)
    total = jnp.sum(weights)
    counted = total > 0
    nats = -jnp.sum(weights * jnp.where(where, log_probs, 0.0))
    return nats / jnp.where(counted, total, 1.0), counted.astype(log_probs.dtype)


def rce_loss(
    log_probs: jax.Array,
    rewards: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
    min_range: float = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """Reward-weighted cross-entropy over the pointers of one query group.

    L = -sum_i softmax(r_i / temperature) * log pi(pointer_i)

    >>> loss, counted = rce_loss(jnp.log(jnp.array([0.5, 0.25])), jnp.array([1.0, 0.0]))
    >>> print(f"{loss:.3f} {counted:.0f}")
    0.880 1

    Args:
      log_probs: [G] log pi of each pointer, in nats.
      rewards: [G] rewards, any scale.
      temperature: > 0; lower trusts the reward more.
      where: [G] bool, which pointers count. All by default.
      min_range: a group whose max - min reward is below it is flat.

    Returns:
      Loss in nats, and 1.0 if the group counted or 0.0 if it was flat.

    References: Peters & Schaal, Reinforcement learning by reward-weighted
      regression, 2007.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    where = _mask(where, log_probs, rewards)
    counted = ~is_flat(rewards, where, min_range)
    where &= counted
    highest = jnp.max(jnp.where(where, rewards, -jnp.inf), initial=-jnp.inf)
    scaled = jnp.where(where, rewards - highest, 0.0) / temperature
    weights = jnp.where(where, jnp.exp(scaled), 0.0)
    weights /= jnp.where(counted, jnp.sum(weights), 1.0)
    loss = -jnp.sum(weights * jnp.where(where, log_probs, 0.0))
    return loss, counted.astype(log_probs.dtype)


class GrpoAux(NamedTuple):
    """What one group's GRPO loss did; scalars.

    Attributes:
      counted: 1.0 if any counted pointer has a non-zero advantage, else 0.0 (a flat group).
      clip_share: share of the counted pointers whose gradient the clip removed.
      ratio_mean: mean of pi / pi_behaviour over the counted pointers; 1 when on-policy.
    """

    counted: jax.Array
    clip_share: jax.Array
    ratio_mean: jax.Array


def grpo_loss(
    log_probs: jax.Array,
    behaviour_log_probs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, GrpoAux]:
    """Clipped policy-gradient loss over the pointers of one query group.

    L = -mean_i min(rho_i * A_i, clip(rho_i, 1 - clip_low, 1 + clip_high) * A_i)
    rho_i = pi(pointer_i) / pi_behaviour(pointer_i), one ratio for the whole pointer

    On-policy (rho = 1) its gradient is the policy gradient, -mean_i A_i * grad log pi(pointer_i).
    Average it over groups with `mean_over_groups(loss, aux.counted)`. It holds no KL term: add
    `kl_coef * exact_kl(...)`.

    Args:
      log_probs: [G] log pi of each pointer under the policy in training, in nats.
      behaviour_log_probs: [G] the same under the policy that drew them; no gradient.
      advantages: [G] from `compute_advantages`; no gradient.
      clip_low: in [0, 1); how far below 1 a ratio still pushes a bad pointer down.
      clip_high: >= 0; how far above 1 a ratio still pushes a good pointer up. Larger than
        clip_low lets rare pointers grow (DAPO's clip-higher).
      where: [G] bool, which pointers count. All by default.
      weights: [G] >= 0, of the pointers in the sum that stands in place of the mean, as draws
        without replacement want (`advantages.without_replacement`); no gradient.

    Returns:
      Loss in units of the advantage, and `GrpoAux`. A log-ratio beyond 20 nats counts as 20.

    References: Shao et al., DeepSeekMath, 2024, arXiv:2402.03300 (GRPO); Zheng et al., Group
      sequence policy optimization, 2025, arXiv:2507.18071 (ratio of whole sequences; theirs is
      length-normalised, ours is not); Yu et al., DAPO, 2025, arXiv:2503.14476 (asymmetric clip).
    """
    where = _mask(where, log_probs, behaviour_log_probs, advantages)
    behaviour_log_probs = jax.lax.stop_gradient(behaviour_log_probs)
    advantages = jnp.where(where, jax.lax.stop_gradient(advantages), 0.0)
    log_ratio = jnp.where(where, log_probs, 0.0) - jnp.where(where, behaviour_log_probs, 0.0)
    ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    removed = ((advantages > 0) & (ratio > 1.0 + clip_high)) | (
        (advantages < 0) & (ratio < 1.0 - clip_low)
    )
    aux = GrpoAux(
        counted=jnp.any(advantages != 0).astype(log_probs.dtype),
        clip_share=_masked_mean(removed.astype(log_probs.dtype), where),
        ratio_mean=_masked_mean(ratio, where),
    )
    aux = jax.tree.map(jax.lax.stop_gradient, aux)
    if weights is None:
        return -_masked_mean(objective, where), aux
    weights = jnp.where(where, jax.lax.stop_gradient(weights), 0.0)
    return -jnp.sum(weights * jnp.where(where, objective, 0.0)), aux


def exact_kl(
    log_p: jax.Array,
    log_q: jax.Array,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """KL(policy || reference) of one query group, summed exactly over the K actions of each step.

    KL = mean_i sum_s sum_k p(k | prefix_is) * (log p(k | prefix_is) - log q(k | prefix_is))

    Where the pointers are drawn i.i.d. from the policy, this is an unbiased estimate of the KL of
    whole pointers, of lower variance than any estimate from the drawn actions alone. Its gradient
    takes the visited prefixes as given.

    Args:
      log_p: [G, S, K] log-probabilities of the policy at every step of every pointer, in nats.
        Actions that are masked or already taken may be -inf or very negative, with any log_q.
      log_q: [G, S, K] the same prefixes under the reference policy.
      where: [G] or [G, S] bool, which pointers, or which of their steps, count. All by default.
      weights: [G] >= 0, any scale, of the pointers in the mean; equal by default. Draws without
        replacement need theirs, or the KL is that at prefixes the policy rarely visits.

    Returns:
      Scalar >= 0, in nats per pointer; 0 if nothing counts. Infinite, or
      absurdly large, if the reference excludes an action that the policy may take: the two were
      then masked differently.

    References: Amini, Vieira & Cotterell, Better estimation of the Kullback-Leibler divergence
      between language models, 2025, arXiv:2504.10637; Tang & Munos, On a few pitfalls in KL
      divergence gradient estimation for RL, 2025, arXiv:2506.09477.
    """
    if log_p.shape != log_q.shape:
        raise ValueError(f"shapes differ: log_p {log_p.shape} beside log_q {log_q.shape}")
    where = jnp.ones(log_p.shape[:1], bool) if where is None else jnp.asarray(where)
    if where.shape not in (log_p.shape[:1], log_p.shape[:2]):
        raise ValueError(f"where {where.shape} is neither [G] nor [G, S] of log_p {log_p.shape}")
    steps = where[:, None] if where.ndim == 1 else where  # [G, 1] or [G, S]
    # p * log p tends to 0 with p, but -inf * 0 is NaN, and so is its gradient: take such actions
    # out before the product, not after it.
    live = steps[..., None] & (jnp.exp(log_p) > 0)  # [G, S, K]
    safe_p = jnp.where(live, log_p, 0.0)
    safe_q = jnp.where(live, log_q, 0.0)
    terms = jnp.where(live, jnp.exp(safe_p) * (safe_p - safe_q), 0.0)
    counted = jnp.any(steps, axis=1)
    if weights is None:
        return jnp.sum(terms) / jnp.maximum(jnp.sum(counted), 1)
    weights = jnp.where(counted, jax.lax.stop_gradient(weights), 0.0)
    total = jnp.sum(weights)
    return jnp.sum(weights[:, None, None] * terms) / jnp.where(total > 0, total, 1.0)


def kl_k1(log_probs: jax.Array, ref_log_probs: jax.Array, where: jax.Array | None = None):
    """Sampled KL(policy || reference): mean of log pi - log pi_ref over the drawn pointers.

    Unbiased for pointers drawn i.i.d. from the policy, of high variance, may be negative. As a
    loss it is useless: its expected gradient is 0.

    Args:
      log_probs: [G] log pi of each drawn pointer, in nats.
      ref_log_probs: [G] the same under the reference policy.
      where: [G] bool, which pointers count. All by default.

    Returns:
      Scalar in nats.

    References: Schulman, Approximating KL divergence, 2020 (k1, k2 and k3); Tang & Munos, 2025,
      arXiv:2506.09477 (their gradients).
    """
    log_ratio, where = _log_ratio(log_probs, ref_log_probs, where)
    return _masked_mean(log_ratio, where)


def kl_k2(log_probs: jax.Array, ref_log_probs: jax.Array, where: jax.Array | None = None):
    """Sampled KL(policy || reference): mean of (log pi - log pi_ref)^2 / 2.

    Biased as a value, right to second order near pi = pi_ref, never negative. On-policy its
    gradient is an unbiased gradient of KL(policy || reference). Arguments as `kl_k1`.
    """
    log_ratio, where = _log_ratio(log_probs, ref_log_probs, where)
    return _masked_mean(0.5 * log_ratio**2, where)


def kl_k3(log_probs: jax.Array, ref_log_probs: jax.Array, where: jax.Array | None = None):
    """Sampled KL(policy || reference): mean of r - 1 - log r, with r = pi_ref / pi.

    Unbiased as a value, never negative, of low variance while the two are close. On-policy its
    gradient is that of KL(reference || policy), the other direction. Arguments as `kl_k1`; log r
    beyond 20 nats counts as 20 inside the exponential.
    """
    log_ratio, where = _log_ratio(log_probs, ref_log_probs, where)
    r = jnp.exp(jnp.minimum(-log_ratio, _MAX_LOG_RATIO))
    return _masked_mean(r - 1.0 + log_ratio, where)


def _log_ratio(log_probs, ref_log_probs, where):
    where = _mask(where, log_probs, ref_log_probs)
    ref_log_probs = jax.lax.stop_gradient(ref_log_probs)
    return jnp.where(where, log_probs, 0.0) - jnp.where(where, ref_log_probs, 0.0), where
