"""The order in which retrieval would show demonstrations."""

import jax
import jax.numpy as jnp

from lever_jax.sampling.rollouts import as_rollouts
from lever_jax.types import Rollouts, source_index


def similarity_order(mask: jax.Array, *, num: int, shots: int) -> Rollouts:
    """Runs of neighbours in the pool, which stands most similar first.

    Row j holds the candidates ranked j to j+S-1, the most similar of them last, next to the
    question. So row 0 is what similarity retrieval shows.

    Args:
      mask: [K] bool, which candidates there are.
      num: G, how many pointers.
      shots: S.

    Returns:
      Rollouts [num]; the mask is false on the rows past the last run. There is no distribution:
      log_probs are 0.
    """
    count = jnp.sum(mask)
    by_rank = jnp.argsort(~mask, stable=True)
    first = jnp.arange(num)
    ranks = first[:, None] + jnp.arange(shots)[::-1]
    pointers = by_rank[jnp.minimum(ranks, mask.shape[0] - 1)]
    found = first + shots <= count
    return as_rollouts(pointers, jnp.zeros(num), source_index("retrieval"), found)
