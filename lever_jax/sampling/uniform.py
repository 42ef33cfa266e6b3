"""Random pointers: the baseline that knows nothing, and what fills a group that is not full."""

import jax
import jax.numpy as jnp

from lever_jax.masking import remove
from lever_jax.sampling.rollouts import as_rollouts
from lever_jax.types import Rollouts, source_index


def sample_uniform(key: jax.Array, mask: jax.Array, *, num: int, shots: int) -> Rollouts:
    """Independent pointers, each equally probable.

    Args:
      key: of this query. Row i depends on the key and i alone, so more draws only append.
      mask: [K] bool, which candidates there are.
      num: G, how many pointers.
      shots: S.

    Returns:
      Rollouts [num]; log_probs are -log(n (n-1) ... (n-S+1)) for n candidates.
    """

    def one_pointer(key):
        def step(available, key):
            left = jnp.sum(available)
            action = _nth(available, jax.random.randint(key, (), 0, jnp.maximum(left, 1)))
            return remove(available, action), action

        _, actions = jax.lax.scan(step, mask, jax.random.split(key, shots))
        return actions

    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num))
    return _as_uniform(jax.vmap(one_pointer)(keys), mask, jnp.sum(mask) >= shots)


def sample_uniform_distinct(key: jax.Array, mask: jax.Array, *, num: int, shots: int) -> Rollouts:
    """Pointers that are all different, each equally probable on its own.

    Row i is the number i in the mixed base n, n-1, ..., n-S+1, read as positions among the
    candidates that are left; each position is turned by a random shift that depends on the picks
    before. That maps the numbers one to one onto the pointers: the first `num` are different
    without comparing any, and every pointer comes exactly once if there are no more than `num`.

    Args:
      key: of this query.
      mask: [K] bool, which candidates there are.
      num: G, how many pointers.
      shots: S.

    Returns:
      Rollouts [num], as `sample_uniform`; the mask is false on the rows past the last pointer.
    """

    def one_pointer(number):
        def step(carry, _):
            available, number, key = carry
            left = jnp.maximum(jnp.sum(available), 1)
            key, shift_key = jax.random.split(key)
            position = number % left
            shift = jax.random.randint(shift_key, (), 0, left)
            action = _nth(available, (position + shift) % left)
            key = jax.random.fold_in(key, position)
            return (remove(available, action), number // left, key), action

        (_, beyond, _), actions = jax.lax.scan(step, (mask, number, key), length=shots)
        return actions, beyond == 0

    pointers, exists = jax.vmap(one_pointer)(jnp.arange(num, dtype=jnp.int32))
    return _as_uniform(pointers, mask, exists & (jnp.sum(mask) >= shots))


def _nth(available: jax.Array, n: jax.Array) -> jax.Array:
    """The n-th (from 0) action of an availability mask [K]."""
    return jnp.argmax(jnp.cumsum(available) > n).astype(jnp.int32)


def _as_uniform(pointers, mask, found):
    left = jnp.sum(mask) - jnp.arange(pointers.shape[1])
    log_prob = -jnp.sum(jnp.log(jnp.maximum(left, 1).astype(jnp.float32)))
    return as_rollouts(pointers, log_prob, source_index("random"), found)
