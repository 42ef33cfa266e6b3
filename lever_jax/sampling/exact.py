"""Two shots, exactly: the whole distribution over pointers in one call.

With S = 2 there are K (K - 1) pointers, K more where the policy can stop after the first: few
enough to list. The searches and samplers are held to what is computed here, and where K is small
nothing need be sampled at all.
"""

import jax
import jax.numpy as jnp

from lever_jax.actions import as_pointers, first_actions, remaining
from lever_jax.masking import MASKED, is_masked, masked_entropy, masked_top_k
from lever_jax.policy import Encoding, Params, Policy, step_log_probs
from lever_jax.sampling.rollouts import as_rollouts
from lever_jax.sampling.top_p import nucleus
from lever_jax.types import Rollouts, source_index


def pair_log_probs(
    policy: Policy, params: Params, encoding: Encoding, mask: jax.Array
) -> jax.Array:
    """Log-probabilities of all pointers of two shots.

    log pi(a, b) = log pi(a) + log pi(b | a)

    Args:
      policy: the four functions.
      params: its parameters.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.

    Returns:
      [K, A] in nats, by first and second action, the end last where the policy has one; `MASKED`
      where there is no such pointer, so all of it in a pool of fewer than two candidates that
      does not stop.
    """
    actions, opening = jnp.arange(mask.shape[0]), first_actions(policy.stops, mask)
    state = policy.start(params, encoding)
    first = step_log_probs(policy, params, encoding, state, opening)[: mask.shape[0]]
    after = jax.vmap(lambda action: remaining(policy.stops, opening, action))(actions)  # [K, A]

    def second(action, available):
        next_state = policy.update(params, encoding, state, action)
        return step_log_probs(policy, params, encoding, next_state, available)

    joint = first[:, None] + jax.vmap(second)(actions, after)
    return jnp.where(mask[:, None] & after, joint, MASKED)


def exact_beam(log_probs: jax.Array, *, num: int) -> Rollouts:
    """The most probable pointers, best first; equals in the order of the pool.

    Args:
      log_probs: [K, A] from `pair_log_probs`.
      num: how many.

    Returns:
      Rollouts [num], tagged as beams; log_probs are the policy's.
    """
    candidates, size = log_probs.shape
    flat = log_probs.reshape(-1)
    values, best, found = masked_top_k(flat, ~is_masked(flat), num)
    pointers = jnp.stack([best // size, best % size], axis=-1)
    pointers = as_pointers(size > candidates, pointers, candidates)
    return as_rollouts(pointers, values, source_index("beam"), found)


def exact_entropy(log_probs: jax.Array) -> jax.Array:
    """Entropy of the whole pointer, in nats; 0 where there is none.

    Args:
      log_probs: [K, A] from `pair_log_probs`.
    """
    return masked_entropy(log_probs.reshape(-1))


def exact_top_p(log_probs: jax.Array, p: float | jax.Array) -> jax.Array:
    """The nucleus over whole pointers: the most probable ones that reach `p` together.

    A nucleus of each pick, as `sample_top_p` has it, is another set: it cuts twice.

    Args:
      log_probs: [K, A] from `pair_log_probs`.
      p: in (0, 1].

    Returns:
      bool [K, A]; equals stand or fall together.
    """
    inside = nucleus(log_probs.reshape(-1), p).reshape(log_probs.shape)
    return inside & ~is_masked(log_probs)
