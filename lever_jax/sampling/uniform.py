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

    def one_pointer(fractions):
        def step(available, fraction):
            action = _nth(available, _part(fraction, jnp.sum(available)))
            return remove(available, action), action

        return jax.lax.scan(step, mask, fractions)[1]

    pointers = jax.vmap(one_pointer)(jax.random.uniform(key, (num, shots)))
    return _as_uniform(pointers, mask, jnp.sum(mask) >= shots)


def sample_uniform_distinct(
    key: jax.Array, mask: jax.Array, *, num: int, shots: int, shorter: bool = False
) -> Rollouts:
    """Pointers that are all different, each equally probable on its own.

    Row i is the number i in the mixed base n, n-1, ..., n-S+1, read as positions among the
    candidates that are left; each position is turned by a random shift that depends on the picks
    before. That maps the numbers one to one onto the pointers: the first `num` are different
    without comparing any, and every pointer comes exactly once if there are no more than `num`.

    Args:
      key: of this query. Row i depends on the key and i alone, so more draws only append.
      mask: [K] bool, which candidates there are.
      num: G, how many pointers.
      shots: S.
      shorter: whether pointers may end early, as those of a policy that stops: then lengths S to 1
        come in turn, as far as the pool goes, so that short pointers are not lost among the many
        long ones. log_probs are those of a uniform length and a uniform pointer of it.

    Returns:
      Rollouts [num], as `sample_uniform`; the mask is false on the rows past the last pointer.
    """
    if shorter:
        return _of_all_lengths(key, mask, num, shots)
    fractions = jax.random.uniform(key, (num, shots))

    def one_pointer(number):
        def step(carry, fractions):
            # `prefix` numbers the picks so far: `number` modulo the product of the bases so far.
            available, rest, base = carry
            prefix = number % base
            left = jnp.maximum(jnp.sum(available), 1)
            action = _nth(available, (rest + _part(fractions[prefix], left)) % left)
            # A base beyond `num` changes no remainder; stopping there avoids overflow.
            base = jnp.minimum(base * left, num)
            return (remove(available, action), rest // left, base), action

        start = (mask, number, jnp.int32(1))
        (_, beyond, _), actions = jax.lax.scan(step, start, fractions.T)
        return actions, beyond == 0

    pointers, exists = jax.vmap(one_pointer)(jnp.arange(num, dtype=jnp.int32))
    return _as_uniform(pointers, mask, exists & (jnp.sum(mask) >= shots))


def _of_all_lengths(key, mask, num, shots):
    drawn = []
    for length in range(shots, 0, -1):
        own = jax.random.fold_in(key, length)
        found = sample_uniform_distinct(own, mask, num=num, shots=length)
        blank = ((0, 0), (0, shots - length))
        drawn.append(found._replace(pointers=jnp.pad(found.pointers, blank, constant_values=-1)))
    turns = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *drawn)  # [num, S, ...]
    turns = jax.tree.map(lambda x: x.reshape(num * shots, *x.shape[2:]), turns)
    order = jnp.argsort(~turns.mask, stable=True)[:num]
    turns = jax.tree.map(lambda x: x[order], turns)
    lengths = jnp.clip(jnp.sum(mask), 1, shots).astype(jnp.float32)
    log_probs = jnp.where(turns.mask, turns.log_probs - jnp.log(lengths), turns.log_probs)
    return turns._replace(log_probs=log_probs)


def _part(fraction: jax.Array, count: jax.Array) -> jax.Array:
    """A fraction in [0, 1) of a count, as a whole number in [0, count)."""
    return jnp.minimum((fraction * count).astype(jnp.int32), jnp.maximum(count, 1) - 1)


def _nth(available: jax.Array, n: jax.Array) -> jax.Array:
    """The n-th (from 0) action of an availability mask [K]."""
    return jnp.argmax(jnp.cumsum(available) > n).astype(jnp.int32)


def _as_uniform(pointers, mask, found):
    left = jnp.sum(mask) - jnp.arange(pointers.shape[1])
    log_prob = -jnp.sum(jnp.log(jnp.maximum(left, 1).astype(jnp.float32)))
    return as_rollouts(pointers, log_prob, source_index("random"), found)
