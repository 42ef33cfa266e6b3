"""The actions of a policy: the candidates and, where it can stop, the end.

Without a stop the A actions are the K candidates of the pool. A policy that stops has one more, at
position K. It is open from the second pick on, so that at least one demonstration is shown, and
once it is taken nothing else is left: the shots after it cost nothing (log-probability 0). So all
that samples or reads pointers is the same with a stop and without; only what is open differs, and
that is decided here. Outside of samplers a pointer that ended has -1 in the rest of its S places.
"""

import jax
import jax.numpy as jnp

from lever_jax.masking import gumbel, remove


def first_actions(stops: bool, mask: jax.Array) -> jax.Array:
    """The actions [A] open at the first pick: the candidates of the mask [K], never the end."""
    return jnp.pad(mask, (0, 1)) if stops else mask


def remaining(stops: bool, available: jax.Array, action: jax.Array) -> jax.Array:
    """The actions [A] open after an action; one outside [0, A) takes nothing away."""
    left = remove(available, action)
    if not stops:
        return left
    end = available.shape[-1] - 1
    return (left & (action != end)) | (jnp.arange(end + 1) == end)


def action_noise(stops: bool, key: jax.Array, rows: int, actions: int) -> jax.Array:
    """Standard Gumbel noise [rows, A] that does not depend on how far the pool is padded."""
    noise = gumbel(key, rows, actions)
    return jnp.roll(noise, -1, axis=-1) if stops else noise  # The end's own comes first.


def as_actions(stops: bool, pointers: jax.Array, candidates: int) -> jax.Array:
    """Pointers [..., S] with -1 after their end as actions in [0, A); others are outside it."""
    if not stops:
        return pointers
    return jnp.where(pointers == -1, candidates, jnp.where(pointers < candidates, pointers, -1))


def as_pointers(stops: bool, actions: jax.Array, candidates: int) -> jax.Array:
    """Actions [..., S] as pointers, -1 in place of the end."""
    return jnp.where(actions < candidates, actions, -1) if stops else actions


def can_point(stops: bool, mask: jax.Array, shots: int) -> jax.Array:
    """Whether a pool of this mask [K] has any pointer: S candidates, or one where it may stop."""
    return jnp.sum(mask) >= (1 if stops else shots)
