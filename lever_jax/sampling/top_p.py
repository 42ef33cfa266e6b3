"""Independent draws from the policy's nucleus."""

import jax
import jax.numpy as jnp

from lever_jax.masking import masked_log_softmax
from lever_jax.policy import Encoding, Params, Policy
from lever_jax.sampling.sequential import draw_sequentially
from lever_jax.types import Rollouts, source_index


def nucleus(log_probs: jax.Array, p: float | jax.Array) -> jax.Array:
    """Which actions [K] are in the nucleus of log-probabilities [K].

    An action is in it where all actions more probable than it have less than p together; so the
    most probable always is, and equals stand or fall together, whatever their order in the pool.

    The least probable action of the nucleus is found by bisection, which a CPU does several times
    faster than a sort: floats that are not negative have the order of their bits.
    """
    probs = jnp.exp(log_probs)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_, span):
        low, high = span  # Outside the nucleus, and the most probable inside, as far as known.
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits > middle, probs, 0.0)) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    span = jnp.int32(-1), jnp.max(bits)
    _, least = jax.lax.fori_loop(0, 31, halve, span)
    return bits >= least


def sample_top_p(
    policy: Policy,
    params: Params,
    key: jax.Array,
    encoding: Encoding,
    mask: jax.Array,
    *,
    num: int,
    shots: int,
    p: float | jax.Array = 0.9,
) -> Rollouts:
    """Independent pointers, every pick from the nucleus of the policy over what is left.

    Args:
      policy: the four functions.
      params: its parameters.
      key: of this query.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      num: G, how many pointers.
      shots: S.
      p: in (0, 1], the probability that the nucleus of each pick must reach.

    Returns:
      Rollouts [num]; log_probs are those of the nucleus, renormalised.

    References: Holtzman et al., The curious case of neural text degeneration, 2020.
    """

    def behaviour(logits, available):
        log_probs = masked_log_softmax(logits, available)
        return masked_log_softmax(log_probs, available & nucleus(log_probs, p))

    return draw_sequentially(
        policy,
        params,
        key,
        encoding,
        mask,
        num=num,
        shots=shots,
        behaviour=behaviour,
        source=source_index("top_p"),
    )
