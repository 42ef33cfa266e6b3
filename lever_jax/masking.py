"""The one place that masks.

A masked entry has the log-probability `MASKED`: finite, so that no gradient becomes NaN, and so low
that its probability is exactly 0 in float32. Hence `exp(p) * p` and `exp(p) * (p - q)` are safe as
they stand on whatever these functions return, and sums over K need no mask of their own.

A row with nothing left is all `MASKED`: no distribution, probability and entropy 0, gradient 0.
"""

import jax
import jax.numpy as jnp

MASKED = -1e9
"""Log-probability of what cannot be chosen, in nats."""


def is_masked(log_probs: jax.Array) -> jax.Array:
    """Where log-probabilities, or sums of a few, stand for something that cannot be chosen."""
    return log_probs <= MASKED / 2


def masked_log_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-probabilities over the last axis, renormalised over what the mask leaves.

    Args:
      logits: [..., K] float32; anything, NaN included, where the mask is false.
      mask: [..., K] bool.

    Returns:
      [..., K] log-probabilities in nats, `MASKED` where the mask is false.
    """
    largest = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    shifted = jnp.where(mask, logits, largest) - largest
    total = jnp.sum(jnp.where(mask, jnp.exp(shifted), 0.0), axis=-1, keepdims=True)
    some = jnp.any(mask, axis=-1, keepdims=True)
    return jnp.where(mask, shifted - jnp.log(jnp.where(some, total, 1.0)), MASKED)


def masked_entropy(log_probs: jax.Array) -> jax.Array:
    """Entropy over the last axis of what `masked_log_softmax` returned.

    Args:
      log_probs: [..., K] log-probabilities, `MASKED` where there is nothing to choose.

    Returns:
      [...] entropy in nats, from 0 to log K.
    """
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def masked_top_k(
    scores: jax.Array, mask: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k best of the last axis, best first; of equals the one that stands first.

    Args:
      scores: [..., N] float32; anything, NaN included, where the mask is false.
      mask: [..., N] bool.
      k: how many; it may exceed N.

    Returns:
      Values [..., k] (`MASKED` where fewer than k are left), indices [..., k] (0 there) and which
      of them count [..., k].
    """
    missing = [(0, 0)] * (scores.ndim - 1) + [(0, max(k - scores.shape[-1], 0))]
    # Padded before, not after: what reads the result would else be compiled to slow code.
    scores, mask = jnp.pad(scores, missing), jnp.pad(mask, missing)
    values, indices = jax.lax.top_k(jnp.where(mask, scores, -jnp.inf), k)
    found = jnp.take_along_axis(mask, indices, axis=-1)
    return jnp.where(found, values, MASKED), jnp.where(found, indices, 0), found


def first_largest(scores: jax.Array) -> jax.Array:
    """Where the largest number of the last axis stands, the first of equals: int32 [...].

    As `jnp.argmax`, which takes XLA three times as long on a CPU; among NaN, somewhere.
    """
    size = scores.shape[-1]
    largest = scores == jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, jnp.arange(size), size - 1), axis=-1).astype(jnp.int32)


def gumbel(key: jax.Array, rows: int, size: int) -> jax.Array:
    """Standard Gumbel noise [rows, size], whose first columns do not depend on the size.

    So padding a pool changes no draw.
    """
    return jax.random.gumbel(key, (size, rows)).T


def remove(mask: jax.Array, action: jax.Array) -> jax.Array:
    """The mask [K] without one action; an action outside [0, K) removes nothing."""
    return mask & (jnp.arange(mask.shape[-1]) != action)
