"""Draws from the policy without replacement: stochastic beam search.

A draw of whole pointers whose log-probabilities are perturbed by Gumbel noise, keeping the largest,
is a sample without replacement; the noise of a prefix is the maximum over its continuations, so a
beam search finds that sample without ever listing all pointers. No VLM call is spent on a pointer
twice, and inclusion probabilities correct for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lever_jax.actions import action_noise
from lever_jax.masking import gumbel, is_masked
from lever_jax.policy import Encoding, Params, Policy
from lever_jax.sampling.rollouts import as_rollouts
from lever_jax.sampling.search import search
from lever_jax.types import Rollouts, source_index


class StochasticBeam(NamedTuple):
    """A sample without replacement, in the order of its perturbed log-probabilities.

    Attributes:
      rollouts: [G] all different; log_probs are the policy's. The first row is distributed as one
        draw from the policy, the second as one from what is left, and so on.
      perturbed: [G] perturbed log-probabilities, descending.
      threshold: scalar, the (G+1)-th largest perturbed log-probability; `MASKED` where there are
        no more than G pointers.
    """

    rollouts: Rollouts
    perturbed: jax.Array
    threshold: jax.Array


def stochastic_beam_search(
    policy: Policy,
    params: Params,
    key: jax.Array,
    encoding: Encoding,
    mask: jax.Array,
    *,
    num: int,
    shots: int,
) -> StochasticBeam:
    """Draws `num` different pointers from the policy, without replacement.

    Args:
      policy: the four functions.
      params: its parameters.
      key: of this query.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      num: G, how many pointers.
      shots: S.

    Returns:
      The sample. The mean of f under the policy is estimated without bias by
      sum_i exp(log_probs_i - inclusion_log_probs_i) f_i.

    References: Kool, van Hoof & Welling, Stochastic beams and where to find them, 2019.
    """
    root_key, key = jax.random.split(key)
    found = search(
        policy,
        params,
        key,
        encoding,
        mask,
        width=num + 1,
        shots=shots,
        score=functools.partial(_perturb, policy.stops),
        root_score=gumbel(root_key, 1, 1)[0, 0],
    )
    rollouts = as_rollouts(found.pointers, found.log_probs, source_index("sbs"), found.mask)
    return StochasticBeam(
        rollouts=jax.tree.map(lambda x: x[:num], rollouts),
        perturbed=found.scores[:num],
        threshold=found.scores[num],
    )


def inclusion_log_probs(log_probs: jax.Array, threshold: jax.Array) -> jax.Array:
    """Log-probability that a pointer's perturbed log-probability exceeds the threshold.

    log(1 - exp(-exp(log_prob - threshold)))

    Args:
      log_probs: [G] policy log-probabilities in nats.
      threshold: scalar, `StochasticBeam.threshold`.

    Returns:
      [G] in nats, at most 0. For the weights of an estimator; not to be differentiated.
    """
    gap = jax.lax.stop_gradient(log_probs - threshold)
    inclusion = jnp.log(-jnp.expm1(-jnp.exp(jnp.clip(gap, -15.0, 15.0))))
    return jnp.where(gap < -15.0, gap, inclusion)


def _perturb(stops: bool, key: jax.Array, log_probs: jax.Array, largest: jax.Array) -> jax.Array:
    """Gumbels around log_probs [n, A], given that the maximum of each row is `largest` [n]."""
    noise = action_noise(stops, key, *log_probs.shape)
    noisy = jnp.where(is_masked(log_probs), -jnp.inf, log_probs + noise)
    highest = jnp.max(noisy, axis=-1, keepdims=True)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    # -log(exp(-largest) - exp(-highest) + exp(-noisy)), as appendix B.3 of the paper has it.
    largest = largest[:, None]
    v = largest - noisy + _log1mexp(highest - noisy)
    return largest - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(-x)) for x >= 0; -inf at 0."""
    small = x < 0.6931472
    return jnp.where(
        small,
        jnp.log(-jnp.expm1(-jnp.where(small, x, 1.0))),
        jnp.log1p(-jnp.exp(-jnp.where(small, 1.0, x))),
    )
