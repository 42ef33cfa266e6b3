"""Puts what a sampler found into `Rollouts`, blank rows the same way everywhere."""

import jax
import jax.numpy as jnp

from lever_jax.masking import MASKED
from lever_jax.types import Rollouts


def as_rollouts(
    pointers: jax.Array, log_probs: jax.Array, source: int, found: jax.Array
) -> Rollouts:
    """Rollouts of one source.

    Args:
      pointers: [G, S] actions.
      log_probs: [G] in nats.
      source: index into `SOURCES`.
      found: [G] or scalar bool. Other rows are blanked: pointer -1, log-probability `MASKED`, which
        is also what the policy gives such a pointer.
    """
    num = pointers.shape[0]
    found = jnp.broadcast_to(found, (num,))
    return Rollouts(
        pointers=jnp.where(found[:, None], pointers, -1).astype(jnp.int32),
        log_probs=jnp.where(found, log_probs, MASKED),
        sources=jnp.full((num,), source, jnp.int32),
        mask=found,
    )
