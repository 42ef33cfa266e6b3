"""Local search: neighbours of the best scored pointers and nothing else, new ones only."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lever_jax import sampling
from lever_jax.masking import MASKED
from lever_jax.sampling.local_search import FALLBACK, PARENTS
from lever_jax.types import SOURCES, CandidatePool, Rollouts, source_index


def scored_group(pointers, rows):
    """Rollouts [rows] of these pointers, blank after them."""
    blank = rows - len(pointers)
    shots = len(pointers[0])
    return Rollouts(
        jnp.array([*pointers, *[[-1] * shots] * blank], jnp.int32),
        jnp.zeros(rows),
        jnp.full(rows, source_index("random")),
        jnp.arange(rows) < len(pointers),
    )


def search(table, params, mask, scored, scores, num, draws=1):
    """Rollouts [draws, num], each from a key of its own."""

    @jax.jit
    def run(keys, scored, scores):
        draw = lambda key: sampling.local_search(  # noqa: E731
            table.policy, None, key, jnp.asarray(params), jnp.asarray(mask), scored, scores,
            num=num,
        )  # fmt: skip
        return jax.vmap(draw)(keys)

    keys = jax.random.split(jax.random.key(0), draws)
    return jax.tree.map(np.asarray, run(keys, scored, jnp.asarray(scores, jnp.float32)))


def one(rollouts, row=0):
    return jax.tree.map(lambda x: x[row], rollouts)


def neighbours(pointer, candidates):
    """By hand: one pick replaced, or the same picks in any other order."""
    for place in range(len(pointer)):
        for new in set(candidates) - set(pointer):
            yield (*pointer[:place], new, *pointer[place + 1 :])
    yield from set(itertools.permutations(pointer)) - {tuple(pointer)}


def names(rollouts):
    return [SOURCES[i] if found else None for i, found in zip(rollouts.sources, rollouts.mask)]


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_every_mutant_is_a_new_neighbour_of_one_of_the_best(table, shots):
    candidates = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    mask = np.isin(np.arange(12), candidates)
    params = table.params(seed=1, candidates=12, shots=shots)
    rng = np.random.default_rng(shots)
    every = list(itertools.permutations(candidates, shots))
    size = 20 if shots > 1 else 9
    tried = [every[i] for i in rng.permutation(len(every))[:size]]
    scores = rng.random(24)  # the blank rows seem to score as well
    scores[3] = np.nan  # this one failed: no parent, but not tried again either
    scored = scored_group(tried, 24)
    order = sorted((i for i in range(size) if i != 3), key=lambda i: -scores[i])
    allowed = {n for i in order[:FALLBACK] for n in neighbours(tried[i], candidates)}

    seen = set()
    everything = search(table, params, mask, scored, scores, num=6, draws=30)
    for row in range(30):
        drawn = one(everything, row)
        new = [tuple(pointer) for pointer in drawn.pointers[drawn.mask].tolist()]
        assert len(set(new)) == len(new)
        assert not set(new) & set(tried)
        sources = names(drawn)
        mutants = [p for p, name in zip(new, sources) if name == "local_search"]
        assert set(mutants) <= allowed
        seen |= set(mutants)
        if shots > 1:
            assert sources == ["local_search"] * 6
    if shots == 2:  # and of the very best, hardly any neighbour is out of reach
        near = {n for i in order[:PARENTS] for n in neighbours(tried[i], candidates)}
        assert len(seen & near) > 0.5 * len(near - set(tried))
        assert len(seen & near) > 0.9 * len(seen)

    expected = table.enumerate(params, mask)
    for pointer, log_prob, name in zip(drawn.pointers.tolist(), drawn.log_probs, sources):
        if name == "local_search":
            np.testing.assert_allclose(log_prob, np.log(expected[tuple(pointer)]), atol=1e-5)


def test_small_pools_are_exhausted_and_nothing_comes_twice(table):
    """Whatever is left is found: mutants, then random pointers, then blank rows."""
    params, every = table.params(seed=2, candidates=4), list(itertools.permutations(range(4), 2))
    mask = np.ones(4, bool)
    for tried in (every[:1], every[:5], every[:11], every):
        scored, scores = scored_group(tried, 12), np.linspace(1, 0, 12)
        drawn = one(search(table, params, mask, scored, scores, num=16))
        new = [tuple(pointer) for pointer in drawn.pointers[drawn.mask].tolist()]
        assert sorted([*new, *tried]) == every
        np.testing.assert_array_equal(drawn.pointers[~drawn.mask], -1)
        np.testing.assert_array_equal(drawn.log_probs[~drawn.mask], MASKED)


def test_without_a_score_it_draws_at_random(table):
    params, mask = table.params(seed=2), np.ones(6, bool)
    scored = scored_group([(0, 1), (1, 0)], 4)
    drawn = one(search(table, params, mask, scored, [np.nan] * 4, num=8))
    assert names(drawn) == ["random"] * 8
    np.testing.assert_allclose(drawn.log_probs, -math.log(30), rtol=1e-6)


def test_a_pool_short_of_candidates_gives_nothing(table):
    params, mask = table.params(seed=2), np.arange(6) < 1
    scored = scored_group([(0, 1)], 4)._replace(mask=jnp.zeros(4, bool))
    drawn = one(search(table, params, mask, scored, np.zeros(4), num=3))
    assert not drawn.mask.any()


def test_all_picks_in_the_pool_leaves_reordering(table):
    """S = K: no pick can be replaced."""
    params, mask = table.params(seed=3, candidates=4, shots=4), np.ones(4, bool)
    drawn = one(search(table, params, mask, scored_group([(0, 1, 2, 3)], 2), [0.5, 0.0], num=12))
    new = {tuple(pointer) for pointer in drawn.pointers.tolist()}
    assert drawn.mask.all()
    assert len(new) == 12
    assert all(sorted(pointer) == [0, 1, 2, 3] for pointer in new)
    assert names(drawn).count("local_search") >= 6


@pytest.mark.slow
@pytest.mark.parametrize(("candidates", "shots"), [(200, 3), (1024, 8)])
def test_large_pools_and_other_queries_change_nothing(selector, candidates, shots):
    policy, params = selector
    keys = jax.random.split(jax.random.key(0), 3)
    queries = jax.random.normal(keys[0], (3, 12))
    pools = jax.random.normal(keys[1], (3, candidates, 12))
    masks = jnp.arange(candidates) < jnp.array([candidates, candidates - 7, shots])[:, None]

    @jax.jit
    def run(ids, queries, pools, masks):
        def one(query_id, query, pool, mask):
            key = jax.random.fold_in(jax.random.key(5), query_id)
            encoding = policy.encode(params, query, CandidatePool(pool, mask))
            scored = sampling.sample_uniform_distinct(key, mask, num=12, shots=shots)
            scores = jnp.linspace(0.0, 1.0, 12)
            drawn = sampling.local_search(
                policy, params, key, encoding, mask, scored, scores, num=16
            )
            return scored, drawn

        return jax.vmap(one)(ids, queries, pools, masks)

    ids = jnp.arange(3)
    scored, drawn = run(ids, queries, pools, masks)
    for row in range(3):
        known = {tuple(p) for p in scored.pointers[row][scored.mask[row]].tolist()}
        new = drawn.pointers[row][drawn.mask[row]]
        assert len({tuple(p) for p in new.tolist()} - known) == len(new)
        assert len(new) == min(16, math.perm(int(masks[row].sum()), shots) - len(known))
        assert all(len(set(p)) == shots and bool(masks[row][p].all()) for p in np.asarray(new))
    order = jnp.array([2, 0, 0])
    again = run(ids[order], queries[order], pools[order], masks[order])[1]
    for old, new in zip(jax.tree.leaves(drawn), jax.tree.leaves(again)):
        np.testing.assert_array_equal(old[order], new)
