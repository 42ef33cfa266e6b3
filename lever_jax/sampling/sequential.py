"""Draws pointers one pick at a time, each independent of the others.

Temperature and top-p sampling differ only in the behaviour: what they make of the policy's logits
before each pick.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lever_jax.actions import action_noise, as_pointers, can_point, first_actions, remaining
from lever_jax.masking import first_largest
from lever_jax.policy import Encoding, Params, Policy, pick_in_turn
from lever_jax.sampling.rollouts import as_rollouts
from lever_jax.types import Rollouts

Behaviour = Callable[[jax.Array, jax.Array], jax.Array]


def draw_sequentially(
    policy: Policy,
    params: Params,
    key: jax.Array,
    encoding: Encoding,
    mask: jax.Array,
    *,
    num: int,
    shots: int,
    behaviour: Behaviour,
    source: int,
) -> Rollouts:
    """Independent pointers; one may come more than once, a candidate within a pointer never.

    Args:
      policy: the four functions.
      params: its parameters.
      key: of this query. Row i depends on the key and i alone, so more draws only append.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      num: G, how many pointers.
      shots: S.
      behaviour: (logits [A], available [A] bool) -> log-probabilities [A] of the next pick.
      source: index into `SOURCES`.

    Returns:
      Rollouts [num]; log_probs are the behaviour's.
    """
    candidates, possible = mask.shape[0], can_point(policy.stops, mask, shots)
    mask = first_actions(policy.stops, mask)

    def pick(noise, state, available):
        log_probs = behaviour(policy.logits(params, encoding, state), available)
        # Never a masked one while another is left: no noise is as large as `MASKED` is low.
        action = first_largest(log_probs + noise)
        return action, log_probs[action]

    def one_pointer(key):
        noise = action_noise(policy.stops, key, shots, mask.shape[0])

        def step(carry, noise):
            state, available, previous = carry
            state = policy.update(params, encoding, state, previous)
            available = remaining(policy.stops, available, previous)
            action, log_prob = pick(noise, state, available)
            return (state, available, action), (action, log_prob)

        state = policy.start(params, encoding)
        first = pick(noise[0], state, mask)
        actions, log_probs = pick_in_turn(step, (state, mask, first[0]), first, noise[1:])
        return actions, jnp.sum(log_probs)

    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num))
    pointers, log_probs = jax.vmap(one_pointer)(keys)
    pointers = as_pointers(policy.stops, pointers, candidates)
    return as_rollouts(pointers, log_probs, source, possible)
