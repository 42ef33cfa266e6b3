"""The most probable pointers."""

import jax
import jax.numpy as jnp

from lever_jax.policy import Encoding, Params, Policy
from lever_jax.sampling.rollouts import as_rollouts
from lever_jax.sampling.search import search
from lever_jax.types import Rollouts, source_index


def beam_search(
    policy: Policy,
    params: Params,
    encoding: Encoding,
    mask: jax.Array,
    *,
    num: int,
    shots: int,
) -> Rollouts:
    """Beam search of width `num`; greedy where `num` is 1.

    Args:
      policy: the four functions.
      params: its parameters.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      num: W, the beams kept at every shot and the pointers returned.
      shots: S.

    Returns:
      Rollouts [num], most probable first, all different. No distribution drew them: log_probs are
      the policy's.
    """
    found = search(
        policy,
        params,
        jax.random.key(0),  # unused: nothing here is random
        encoding,
        mask,
        width=num,
        shots=shots,
        score=lambda key, log_probs, scores: log_probs,
        root_score=jnp.zeros(()),
    )
    return as_rollouts(found.pointers, found.log_probs, source_index("beam"), found.mask)
