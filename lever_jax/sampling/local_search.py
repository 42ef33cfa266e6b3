"""Local search: what stands next to the best pointers that have been scored.

The one source that needs scores: a good pointer has better neighbours than a random one, whatever
the policy believes, so a few evaluations around the best ones find what the policy cannot yet see.
"""

import jax
import jax.numpy as jnp

from lever_jax.actions import can_point
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
    pointers, or by any candidate), two picks swapped, or all picks in another order. Where the
    policy stops, a quarter has a pick more at its end, or one less. What duplicates leave open is
    filled with random pointers.

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
    parents = jnp.where(found[:, None], scored.pointers[best], 0)

    def one_mutant(row):
        among = found & (jnp.arange(FALLBACK) < jnp.where(row < TRIES * num, PARENTS, FALLBACK))
        parent = row % jnp.maximum(jnp.sum(among), 1)
        mutate = _mutate_any_length if policy.stops else _mutate
        return mutate(jax.random.fold_in(key, row), parents, among, parent, mask)

    mutants = jax.vmap(one_mutant)(jnp.arange(2 * TRIES * num))
    possible = jnp.any(found) & can_point(policy.stops, mask, shots)
    mutants = as_rollouts(mutants, 0.0, source_index("local_search"), possible)
    # So many different ones that `num` are left if all that were scored are among them.
    rows = {"num": num + len(scored.mask), "shots": shots, "shorter": policy.stops}
    spare = sample_uniform_distinct(spare_key, mask, **rows)
    drawn = jax.tree.map(lambda *xs: jnp.concatenate(xs), mutants, spare)
    drawn = distinct(drawn, num, besides=scored)
    own, _ = pointer_log_probs(policy, params, encoding, mask, drawn.pointers)
    mutant = drawn.sources == source_index("local_search")
    return drawn._replace(log_probs=jnp.where(mutant, own, drawn.log_probs))


def _mutate(key, parents, found, row, mask):
    """A neighbour [S] of parent `row` of parents [P, S], of which `found` [P] say which count."""
    parent, shots = parents[row], parents.shape[1]
    how, place, donor, order = jax.random.split(key, 4)
    how = jax.random.uniform(how, (2,))
    fresh, free = _new_pick(donor, parents, found, parent, mask, how[1] < 0.5)
    place = jax.random.randint(place, (), 0, shots)
    replaced = parent.at[place].set(fresh)
    if shots == 1:
        return replaced
    turned = jax.random.permutation(order, shots)
    swapped = parent.at[turned[:2]].set(parent[turned[1::-1]])
    moved = jnp.where(how[0] < 0.75, swapped, parent[turned])
    return jnp.where((how[0] < 0.5) & free, replaced, moved)


def _mutate_any_length(key, parents, found, row, mask):
    """As `_mutate`, of parents with -1 after their end; their length may change by one, too."""
    parent, places = parents[row], jnp.arange(parents.shape[1])
    length, shots = jnp.sum(parent >= 0), len(places)
    how, place, donor, order = jax.random.split(key, 4)
    how = jax.random.uniform(how, (3,))
    fresh, free = _new_pick(donor, parents, found, parent, mask, how[1] < 0.5)
    place = jax.random.randint(place, (), 0, jnp.maximum(length, 1))
    replaced = parent.at[place].set(fresh)
    longer = jnp.where(places == length, fresh, parent)
    shorter = jnp.where(places < place, parent, jnp.append(parent[1:], -1))
    can_grow, can_shrink = (length < shots) & free, length > 1
    grow = can_grow & ((how[2] < 0.5) | ~can_shrink)
    resized = jnp.where(grow, longer, jnp.where(can_shrink, shorter, parent))
    if shots == 1:
        return replaced
    turned = jnp.argsort(jnp.where(places < length, jax.random.uniform(order, (shots,)), 2.0))
    swapped = parent.at[turned[:2]].set(parent[turned[1::-1]])
    moved = jnp.where(how[2] < 0.5, swapped, parent[turned])
    moved = jnp.where((how[0] < 0.75) | (length < 2), resized, moved)
    return jnp.where((how[0] < 0.5) & free, replaced, moved)


def _new_pick(key, parents, found, parent, mask, shared):
    """A candidate that `parent` [S] has not, and whether there is one.

    If `shared`, one that another of the parents [P, S] holds, as far as any is new to this one.
    """
    place = lambda pointers: jnp.where(pointers < 0, mask.shape[0], pointers)  # noqa: E731
    used = jnp.zeros(mask.shape, bool).at[place(parent)].set(True, mode="drop")
    count = jnp.zeros(mask.shape, jnp.int32)
    held = count.at[place(parents)].add(found[:, None].astype(jnp.int32), mode="drop") > 0
    free = mask & ~used
    among = jnp.where(jnp.any(free & held) & shared, free & held, free)
    noise = gumbel(key, 1, mask.shape[0])[0]
    fresh = jnp.argmax(jnp.where(among, noise, -jnp.inf)).astype(jnp.int32)
    return fresh, jnp.any(free)
