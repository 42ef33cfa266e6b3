"""The search that beam search and stochastic beam search share: grow, score, keep the best."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lever_jax.actions import as_pointers, first_actions, remaining
from lever_jax.masking import MASKED, masked_top_k
from lever_jax.policy import Encoding, Params, Policy, State, step_log_probs

Score = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Found(NamedTuple):
    """The pointers that a search kept, best first.

    Attributes:
      pointers: [W, S] int32 actions, -1 after the end.
      log_probs: [W] under the policy.
      scores: [W] what the search ranked them by.
      mask: [W] bool, which rows are pointers.
    """

    pointers: jax.Array
    log_probs: jax.Array
    scores: jax.Array
    mask: jax.Array


class _Beams(NamedTuple):
    """Prefixes of one length: n of them, n = 1 before the first pick and W after."""

    pointers: jax.Array  # [n, S]
    available: jax.Array  # [n, A]
    state: State  # leaves [n, ...]; before the last action of the prefix
    log_probs: jax.Array  # [n]
    scores: jax.Array  # [n]
    mask: jax.Array  # [n]


def search(
    policy: Policy,
    params: Params,
    key: jax.Array,
    encoding: Encoding,
    mask: jax.Array,
    *,
    width: int,
    shots: int,
    score: Score,
    root_score: jax.Array,
) -> Found:
    """The `width` prefixes that score best, grown one pick at a time.

    Args:
      policy: the four functions.
      params: its parameters.
      key: of this query.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      width: W, how many prefixes are kept.
      shots: S.
      score: (key, log_probs [n, A] of the continuations of n prefixes, scores [n] of these) ->
        scores [n, A] of the continuations.
      root_score: score of the empty prefix.

    Returns:
      The pointers found [W], best first; equals in the order of their prefixes, then of the pool.
    """
    candidates, mask = mask.shape[0], first_actions(policy.stops, mask)
    size = mask.shape[0]
    after = functools.partial(remaining, policy.stops)

    def grow(beams, key, shot):
        step = jax.vmap(step_log_probs, in_axes=(None, None, None, 0, 0))
        log_probs = step(policy, params, encoding, beams.state, beams.available)
        log_probs = beams.log_probs[:, None] + log_probs  # [n, A]
        scores = score(key, log_probs, beams.scores)
        possible = beams.mask[:, None] & beams.available
        scores, best, found = masked_top_k(scores.reshape(-1), possible.reshape(-1), width)
        parent, action = best // size, (best % size).astype(jnp.int32)
        return _Beams(
            pointers=beams.pointers[parent].at[:, shot].set(action),
            available=beams.available[parent],
            state=jax.tree.map(lambda x: x[parent], beams.state),
            log_probs=jnp.where(found, log_probs.reshape(-1)[best], MASKED),
            scores=scores,
            mask=found,
        )

    def take(beams, action, common=None):
        state, axis = (beams.state, 0) if common is None else (common, None)
        update = jax.vmap(policy.update, in_axes=(None, None, axis, 0))
        return beams._replace(
            state=update(params, encoding, state, action),
            available=jax.vmap(after)(beams.available, action),
        )

    def step(beams, key_and_shot):
        key, shot = key_and_shot
        beams = take(beams, beams.pointers[:, shot - 1])
        return grow(beams, key, shot), None

    start = policy.start(params, encoding)
    root = _Beams(
        pointers=jnp.zeros((1, shots), jnp.int32),
        available=mask[None],
        state=jax.tree.map(lambda x: x[None], start),
        log_probs=jnp.zeros(1),
        scores=root_score[None],
        mask=jnp.ones(1, bool),
    )
    keys = jax.random.split(key, shots)
    # The first pick stands outside the scan: it has one prefix to grow, not W. So does the second:
    # what can be computed from the state before the first one is computed once for all prefixes.
    beams = grow(root, keys[0], 0)
    if shots > 1:
        beams = grow(take(beams, beams.pointers[:, 0], start), keys[1], 1)
    beams, _ = jax.lax.scan(step, beams, (keys[2:], jnp.arange(2, shots)))
    pointers = as_pointers(policy.stops, beams.pointers, candidates)
    return Found(pointers, beams.log_probs, beams.scores, beams.mask)
