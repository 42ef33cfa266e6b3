import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lever_jax import types
from lever_jax.errors import InputError
from lever_jax.masking import MASKED, masked_log_softmax
from lever_jax.policy import pointer_log_probs, sequence_log_probs
from lever_jax.sampling import sample_temperature
from lever_jax.types import CandidatePool

PAIRS = np.array(list(itertools.permutations(range(6), 2)), np.int32)


@pytest.fixture(scope="module")
def read(selector):
    """log pi [B, 30] of every pair, and the distributions, for a batch of queries."""
    policy, _ = selector

    @jax.jit
    def read(params, queries, pools):
        one = lambda query, pool: sequence_log_probs(policy, params, query, pool, PAIRS)  # noqa: E731
        return jax.vmap(one)(queries, pools)

    return read


def test_agrees_with_enumeration(table):
    params = table.params(seed=0)
    mask = np.array([True, True, False, True, True, True])
    expected = table.enumerate(params, mask)
    log_probs, _ = pointer_log_probs(
        table.policy, params, jnp.asarray(params), jnp.asarray(mask), PAIRS
    )
    for pair, log_prob in zip(PAIRS, log_probs):
        if tuple(pair) in expected:
            np.testing.assert_allclose(log_prob, np.log(expected[tuple(pair)]), atol=1e-5)
        else:
            assert log_prob == MASKED


def test_agrees_with_enumeration_for_many_shots(table):
    params = table.params(seed=1, candidates=5, shots=4)
    expected = table.enumerate(params, [True] * 5)
    pointers = np.array(list(expected), np.int32)
    log_probs, steps = pointer_log_probs(
        table.policy, params, jnp.asarray(params), jnp.ones(5, bool), pointers
    )
    np.testing.assert_allclose(jnp.exp(log_probs), list(expected.values()), rtol=2e-5)
    assert steps.shape == (120, 4, 5)
    np.testing.assert_allclose(jnp.exp(steps).sum(-1), 1.0, rtol=1e-5)
    picked = jnp.take_along_axis(steps, pointers[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(picked.sum(-1), log_probs, rtol=1e-6)


def test_all_pointers_of_a_query_sum_to_one_under_every_mask(selector, read, batch):
    _, params = selector
    queries, pools = batch
    log_probs, _ = read(params, queries, pools)
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1)[:3], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(log_probs[3], MASKED)  # one candidate, two shots
    for row in range(4):
        allowed = np.asarray(pools.mask)[row][PAIRS].all(-1) & (row != 3)
        np.testing.assert_array_equal(log_probs[row] > MASKED / 2, allowed)


def test_queries_of_a_batch_do_not_leak_into_each_other(selector, read, batch):
    _, params = selector
    queries, pools = batch
    together, _ = read(params, queries, pools)
    others = jax.tree.map(lambda x: x[jnp.array([0, 3, 3, 2])], (queries, pools))
    changed, _ = read(params, *others)
    np.testing.assert_array_equal(together[0], changed[0])


def test_permuting_the_pool_permutes_the_pointers(selector, read, batch):
    _, params = selector
    queries, pools = batch
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = CandidatePool(pools.embeddings[:, order], pools.mask[:, order])
    before, _ = read(params, queries, pools)
    after, _ = read(params, queries, moved)
    position = {tuple(pair): i for i, pair in enumerate(PAIRS.tolist())}
    same = [position[tuple(pair)] for pair in order[PAIRS].tolist()]
    np.testing.assert_allclose(after, before[:, np.array(same)], atol=2e-5)


@pytest.mark.parametrize("garbage", [0.0, 1e4, np.nan])
def test_padding_changes_nothing(selector, read, batch, garbage):
    _, params = selector
    queries, pools = batch
    padded = CandidatePool(
        jnp.pad(pools.embeddings, ((0, 0), (0, 3), (0, 0)), constant_values=garbage),
        jnp.pad(pools.mask, ((0, 0), (0, 3))),
    )
    before, _ = read(params, queries, pools)
    after, _ = read(params, queries, padded)
    np.testing.assert_allclose(before, after, atol=2e-5)


def test_pointers_that_cannot_be_drawn(selector, batch):
    policy, params = selector
    query, pool = jax.tree.map(lambda x: x[1], batch)  # candidates 0, 2, 3, 5
    pointers = jnp.array([[0, 2], [0, 0], [0, 1], [1, 0], [0, 6], [-1, -1], [0, -1]])

    @jax.jit
    def read(params):
        def total(params):
            log_probs, steps = sequence_log_probs(policy, params, query, pool, pointers)
            return jnp.sum(log_probs[1:]), (log_probs, steps)

        return jax.grad(total, has_aux=True)(params)

    gradient, (log_probs, steps) = read(params)
    assert log_probs[0] > -100.0
    np.testing.assert_array_equal(log_probs[1:], MASKED)
    assert jnp.all(jnp.isfinite(steps))
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0.0)


def test_gradient_is_finite_for_every_mask_and_a_pool_of_equals(selector, read, batch):
    _, params = selector
    zeros = jnp.zeros((2, 12))
    equals = CandidatePool(
        jnp.tile(jnp.array([0.0, 7.3])[:, None, None], (1, 6, 12)), jnp.ones((2, 6), bool)
    )
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), batch, (zeros, equals))

    @jax.jit
    @jax.grad
    def gradient(params):
        log_probs, steps = read(params, *rows)
        entropy = -jnp.sum(jnp.exp(steps) * steps)
        return entropy + jnp.sum(jnp.where(log_probs > MASKED / 2, log_probs, 0.0))

    for leaf in jax.tree.leaves(gradient(params)):
        assert jnp.all(jnp.isfinite(leaf))


def test_behaviour_log_probs_are_those_the_loss_computes(selector, batch):
    policy, params = selector

    @jax.jit
    @jax.vmap
    def draw(key, query, pool):
        encoding = policy.encode(params, query, pool)
        return sample_temperature(policy, params, key, encoding, pool.mask, num=32, shots=3)

    @jax.jit
    @jax.vmap
    def recompute(query, pool, pointers):
        return sequence_log_probs(policy, params, query, pool, pointers)[0]

    rollouts = draw(jax.random.split(jax.random.key(5), 4), *batch)
    np.testing.assert_array_equal(rollouts.mask.all(-1), [True, True, True, False])
    np.testing.assert_allclose(recompute(*batch, rollouts.pointers), rollouts.log_probs, atol=1e-5)


def test_one_distribution_a_step(table):
    params = table.params(seed=3)
    mask = jnp.ones(6, bool)
    _, steps = pointer_log_probs(table.policy, params, jnp.asarray(params), mask, PAIRS)
    np.testing.assert_allclose(steps[7, 0], masked_log_softmax(params[0, 6], mask), atol=1e-6)
    first = PAIRS[7, 0]
    expected = masked_log_softmax(params[1, first], mask.at[first].set(False))
    np.testing.assert_allclose(steps[7, 1], expected, atol=1e-6)


def test_source_names():
    assert types.SOURCES[:7] == (
        "beam",
        "sample(temp=1.0)",
        "top_p(p=0.9)",
        "random",
        "retrieval",
        "local_search",
        "policy",
    )
    assert types.source_names(temperature=2, top_p=0.5)[1:3] == ("sample(temp=2.0)", "top_p(p=0.5)")
    assert types.source_index("top_p") == types.source_index("top_p(p=0.9)") == 2
    with pytest.raises(InputError, match=r"unknown proposal source 'beem'.*retrieval"):
        types.source_index("beem")
