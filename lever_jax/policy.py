"""What a selector is to everything else: four pure functions, and the log-probabilities they give.

A policy reads the query and its pool once (`encode`) and then points at one candidate after another
(`start`, then `logits` and `update` in turn). The distribution over pointers is Plackett-Luce: each
pick is renormalised over the candidates that are left, and over the end where the policy can stop
(`actions.py`: the A actions are the K candidates, or those and the end). Samplers and losses use
nothing else, so they never import a network library, and the policy that samples is the policy
that is trained.

Everything is for one query; lift it with `jax.vmap(fn, in_axes=(None, 0, 0, ...))`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lever_jax.actions import as_actions, first_actions, remaining
from lever_jax.masking import MASKED, masked_log_softmax
from lever_jax.types import CandidatePool

Params = Any
Encoding = Any
State = Any


class Policy(NamedTuple):
    """A selector as pure, unbatched functions.

    Attributes:
      encode: (params, query [D], pool) -> encoding. Once a query. With `dropout` it also takes a
        key, which training steps give and nothing else does.
      start: (params, encoding) -> state before the first pick.
      logits: (params, encoding, state) -> [A], unmasked: the caller masks.
      update: (params, encoding, state, action) -> state after that pick; anything after the end.
      stops: whether it has an end, so that pointers may have fewer than S picks.
      dropout: whether training leaves out parts of the encoding at random.
    """

    encode: Callable[..., Encoding]
    start: Callable[[Params, Encoding], State]
    logits: Callable[[Params, Encoding, State], jax.Array]
    update: Callable[[Params, Encoding, State, jax.Array], State]
    stops: bool = False
    dropout: bool = False


def step_log_probs(
    policy: Policy, params: Params, encoding: Encoding, state: State, available: jax.Array
) -> jax.Array:
    """Log-probabilities of the next pick, [A], over the actions that are `available` [A]."""
    return masked_log_softmax(policy.logits(params, encoding, state), available)


def pick_in_turn(step: Callable, carry: Any, first: Any, inputs: jax.Array) -> Any:
    """Results of all picks, stacked: of the first, which is done, and of `step` for each input.

    The second pick, too, stands outside the scan: under vmap, what can be computed from the state
    before the first one is then computed once for all pointers.

    Args:
      step: (carry, input) -> (carry, result), as of `jax.lax.scan`.
      carry: after the first pick.
      first: its result, a tree.
      inputs: [S - 1, ...] of the picks after it.
    """
    begun = [first]
    if len(inputs):
        carry, second = step(carry, inputs[0])
        begun.append(second)
    _, rest = jax.lax.scan(step, carry, inputs[1:])
    begun = jax.tree.map(lambda *x: jnp.stack(x), *begun)
    return jax.tree.map(lambda *x: jnp.concatenate(x), begun, rest)


def pointer_log_probs(
    policy: Policy, params: Params, encoding: Encoding, mask: jax.Array, pointers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of given pointers, from an encoding.

    log pi(pointer) = sum_t log pi(action_t | action_1 ... action_{t-1})

    Args:
      policy: the four functions.
      params: its parameters.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      pointers: [G, S] int32 actions; -1 after the end of a pointer, where the policy stops.

    Returns:
      log_probs [G] in nats, and step_log_probs [G, S, A]: the distribution each pick was drawn
      from. A pointer that cannot be drawn (an action repeated, masked or outside [0, K); a pick
      after the end; S picks where the pool has fewer candidates) has log-probability `MASKED`,
      with a gradient of 0: leave it out by the rollouts' mask.
    """
    pointers = as_actions(policy.stops, pointers, mask.shape[0])
    mask = first_actions(policy.stops, mask)
    size = mask.shape[0]

    def read(state, available, action):
        log_probs = step_log_probs(policy, params, encoding, state, available)
        index = jnp.clip(action, 0, size - 1)
        possible = (action == index) & available[index]
        return jnp.where(possible, log_probs[index], MASKED), possible, log_probs

    def one_pointer(pointer):
        def step(carry, action):
            state, available, previous = carry
            state = policy.update(params, encoding, state, jnp.clip(previous, 0, size - 1))
            available = remaining(policy.stops, available, previous)
            return (state, available, action), read(state, available, action)

        state = policy.start(params, encoding)
        carry, first = (state, mask, pointer[0]), read(state, mask, pointer[0])
        picked, possible, log_probs = pick_in_turn(step, carry, first, pointer[1:])
        return jnp.where(jnp.all(possible), jnp.sum(picked), MASKED), log_probs

    return jax.vmap(one_pointer)(pointers)


def sequence_log_probs(
    policy: Policy, params: Params, query: jax.Array, pool: CandidatePool, pointers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`pointer_log_probs` from the query [D] and its pool, encoded once for all pointers [G, S]."""
    encoding = policy.encode(params, query, pool)
    return pointer_log_probs(policy, params, encoding, pool.mask, pointers)
