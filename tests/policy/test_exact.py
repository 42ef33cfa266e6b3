"""The exact joint of two shots against enumeration, and the samplers against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lever_jax import sampling
from lever_jax.masking import MASKED
from lever_jax.policy import pointer_log_probs
from lever_jax.types import CandidatePool

MASKS = np.array([[bit == "1" for bit in row] for row in ("111111", "011011", "000110", "000100")])


@pytest.fixture(scope="module")
def joints(table):
    """A table policy's joint [4, K, K] under each mask, and its enumeration."""
    params = table.params(seed=21, scale=1.5)
    run = jax.jit(
        jax.vmap(lambda m: sampling.pair_log_probs(table.policy, None, jnp.asarray(params), m))
    )
    every = [table.enumerate(params, mask) for mask in MASKS]
    return np.asarray(run(jnp.asarray(MASKS))), every, params


def test_the_joint_is_that_of_the_enumeration(joints):
    for joint, expected in zip(*joints[:2]):
        wanted = np.zeros((6, 6))
        for pointer, probability in expected.items():
            wanted[pointer] = probability
        np.testing.assert_allclose(np.exp(joint), wanted, atol=1e-6)
        np.testing.assert_array_equal(joint[wanted == 0], MASKED)


def test_the_joint_of_the_selector_is_that_of_its_pointers(selector, batch):
    policy, params = selector
    queries, pools = batch
    pairs = jnp.array([(a, b) for a in range(6) for b in range(6)])

    @jax.jit
    @jax.vmap
    def both(query, embeddings, mask):
        encoding = policy.encode(params, query, CandidatePool(embeddings, mask))
        joint = sampling.pair_log_probs(policy, params, encoding, mask)
        return joint, pointer_log_probs(policy, params, encoding, mask, pairs)[0].reshape(6, 6)

    joint, one_by_one = both(queries, pools.embeddings, pools.mask)
    np.testing.assert_allclose(joint, one_by_one, atol=1e-5)


def test_exact_beam_is_the_sorted_enumeration(joints):
    beam = jax.jit(jax.vmap(lambda joint: sampling.exact_beam(joint, num=40)))(joints[0])
    for row, expected in enumerate(joints[1]):
        ordered = sorted(expected, key=expected.get, reverse=True)
        found = np.asarray(beam.mask[row])
        assert found.sum() == len(ordered)
        assert list(map(tuple, np.asarray(beam.pointers[row])[found].tolist())) == ordered
        np.testing.assert_array_equal(beam.pointers[row][~found], -1)


def test_a_beam_as_wide_as_the_pool_is_exact(joints, table):
    run = lambda mask: sampling.beam_search(  # noqa: E731
        table.policy, None, jnp.asarray(joints[2]), mask, num=12, shots=2
    )
    searched = jax.jit(jax.vmap(run))(jnp.asarray(MASKS))
    exact = jax.vmap(lambda joint: sampling.exact_beam(joint, num=12))(jnp.asarray(joints[0]))
    np.testing.assert_array_equal(searched.pointers, exact.pointers)
    np.testing.assert_allclose(searched.log_probs, exact.log_probs, atol=1e-5)


def test_exact_entropy_by_hand(joints):
    entropies = [float(sampling.exact_entropy(jnp.asarray(joint))) for joint in joints[0]]
    wanted = [-sum(p * np.log(p) for p in each.values()) for each in joints[1]]
    np.testing.assert_allclose(entropies, wanted, atol=1e-5)
    assert entropies[-1] == 0.0  # a pool of one candidate has no pointer
    uniform = jnp.where(jnp.eye(6, dtype=bool), MASKED, -jnp.log(30.0))
    assert float(sampling.exact_entropy(uniform)) == pytest.approx(np.log(30), abs=1e-5)


@pytest.mark.parametrize("p", [0.3, 0.8, 1.0])
def test_exact_top_p_by_a_sorted_loop(joints, p):
    for joint, expected in zip(*joints[:2]):
        wanted, before = set(), 0.0
        for pointer in sorted(expected, key=expected.get, reverse=True):
            if before >= p - 1e-9:
                break
            wanted.add(pointer)
            before += expected[pointer]
        inside = np.asarray(sampling.exact_top_p(jnp.asarray(joint), p))
        assert set(zip(*(axis.tolist() for axis in np.nonzero(inside)))) == wanted


def test_equals_stand_or_fall_together():
    uniform = jnp.where(jnp.eye(3, dtype=bool), MASKED, -jnp.log(6.0))
    assert int(sampling.exact_top_p(uniform, 0.2).sum()) == 6
    assert sampling.exact_beam(uniform, num=3).pointers.tolist() == [[0, 1], [0, 2], [1, 0]]


def check_mixture(table, draws):
    """Every source of a mixture, first of its rows: the distribution is the source's own."""
    params, mask = table.params(seed=22), jnp.ones(6, bool)
    joint = sampling.pair_log_probs(table.policy, None, jnp.asarray(params), mask)
    expected = np.exp(np.asarray(joint, np.float64)).ravel()
    expected /= expected.sum()
    for source in ("sample", "policy", "sbs", "random"):
        run = lambda key: sampling.sample_mixture(  # noqa: E731
            table.policy, None, key, jnp.asarray(params), mask, num=2, shots=2,
            quotas={source: 2},  # noqa: B023
        )  # fmt: skip
        drawn = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(3), draws))
        pointers = np.asarray(drawn.pointers)
        assert np.asarray(drawn.mask).all()
        assert (pointers[:, 0] != pointers[:, 1]).any(-1).all()  # 100% unique in every group
        counts = np.bincount(pointers[:, 0] @ [6, 1], minlength=36)
        wanted = np.where(expected > 0, 1 / 30, 0) if source == "random" else expected
        cells = wanted > 0
        assert counts[~cells].sum() == 0
        assert stats.chisquare(counts[cells], draws * wanted[cells]).pvalue > 0.001


@pytest.mark.slow
def test_the_sources_of_a_mixture_against_the_joint_with_many_draws(table):
    check_mixture(table, 200_000)


def test_the_sources_of_a_mixture_against_the_joint(table):
    check_mixture(table, 20_000)
