"""Local search: what stands next to the best pointers that have been scored.

The one source that needs scores: a good pointer has better neighbours than a random one, whatever
the policy believes, so a few evaluations around the best ones find what the policy cannot yet see.
"""

import jax
import jax.numpy as jnp

from lever_jax.masking import gumbel, masked_top_k
from lever_jax.policy import Encoding, Params, Policy, pointer_log_probs
from lever_jax.sampling.mixture import distinct
from lever_jax.sampling.rollouts import as_rollouts
from lever_jax.sampling.uniform import sample_uniform_distinct
from lever_jax.types import Rollouts, source_index

PARENTS = 2
"""The best pointers that are mutated: more than one, so that their picks combine, and few, so that
the mutants stay near the best. Chosen by a simulation on stored scores of the embedded world."""

FALLBACK = 8
"""Parents where the neighbours of the very best are used up, as in small pools."""

TRIES = 4
"""Mutants made for each one wanted; those already scored, or made before, are dropped. So many are
made of the best parents, and then as many of the fallback's."""


def local_search(
    policy: Policy,
    params: Params,
    key: jax.Array,
    encoding: Encoding,
    mask: jax.Array,
    scored: Rollouts,
    scores: jax.Array,
    *,
    num: int,
) -> Rollouts:
    """New pointers near the best scored ones, best parents first.

    A mutant is its parent with one pick replaced (half of them; by a pick of another of the best
    pointers, or by any candidate), two picks swapped, or all picks in another order. What
    duplicates leave open is filled with random pointers.

    Args:
      policy: the four functions.
      params: its parameters.
      key: of this query.
      encoding: of the query and its pool.
      mask: [K] bool, which candidates there are.
      scored: Rollouts [N] that were scored; no mutant is one of them.
      scores: [N], higher is better; NaN where a prompt could not be scored.
      num: G, how many pointers.

    Returns:
      Rollouts [num], all different and none of `scored`; the mask is false on the rows past the
      last pointer. No distribution drew the mutants: their log_probs are the policy's.
    """
    shots = scored.pointers.shape[1]
    key, spare_key = jax.random.split(key)
    known = scored.mask & jnp.isfinite(scores)
    _, best, found = masked_top_k(scores, known, FALLBACK)
    parents = jnp.maximum(scored.pointers[best], 0)

    def one_mutant(row):
        among = found & (jnp.arange(FALLBACK) < jnp.where(row < TRIES * num, PARENTS, FALLBACK))
        parent = row % jnp.maximum(jnp.sum(among), 1)
        return _mutate(jax.random.fold_in(key, row), parents, among, parent, mask)

    mutants = jax.vmap(one_mutant)(jnp.arange(2 * TRIES * num))
    possible = jnp.any(found) & (jnp.sum(mask) >= shots)
    mutants = as_rollouts(mutants, 0.0, source_index("local_search"), possible)
    # So many different ones that `num` are left if all that were scored are among them.
    spare = sample_uniform_distinct(spare_key, mask, num=num + len(scored.mask), shots=shots)
    drawn = jax.tree.map(lambda *xs: jnp.concatenate(xs), mutants, spare)
    drawn = distinct(drawn, num, besides=scored)
    own, _ = pointer_log_probs(policy, params, encoding, mask, drawn.pointers)
    mutant = drawn.sources == source_index("local_search")
    return drawn._replace(log_probs=jnp.where(mutant, own, drawn.log_probs))


def _mutate(key, parents, found, row, mask):
    """A neighbour [S] of parent `row` of parents [P, S], of which `found` [P] say which count."""
    parent, shots = parents[row], parents.shape[1]
    how, place, donor, order = jax.random.split(key, 4)
    used = jnp.zeros(mask.shape, bool).at[parent].set(True)
    # A pick of the other parents, if any is new to this one; else any candidate that is.
    held = jnp.zeros(mask.shape, jnp.int32).at[parents].add(found[:, None].astype(jnp.int32)) > 0
    free = mask & ~used
    shared = free & held
    how = jax.random.uniform(how, (2,))
    among = jnp.where(jnp.any(shared) & (how[1] < 0.5), shared, free)
    noise = gumbel(donor, 1, mask.shape[0])[0]
    fresh = jnp.argmax(jnp.where(among, noise, -jnp.inf)).astype(jnp.int32)
    place = jax.random.randint(place, (), 0, shots)
    replaced = parent.at[place].set(fresh)
    if shots == 1:
        return replaced
    turned = jax.random.permutation(order, shots)
    swapped = parent.at[turned[:2]].set(parent[turned[1::-1]])
    moved = jnp.where(how[0] < 0.75, swapped, parent[turned])
    return jnp.where((how[0] < 0.5) & jnp.any(free), replaced, moved)
