import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lever_jax import masking
from lever_jax.masking import MASKED


def test_log_softmax_renormalises_over_what_is_left():
    logits = jnp.log(jnp.array([1.0, 2.0, 3.0, 4.0]))
    mask = jnp.array([True, False, True, False])
    log_probs = masking.masked_log_softmax(logits, mask)
    np.testing.assert_allclose(log_probs[jnp.array([0, 2])], np.log([1 / 4, 3 / 4]), rtol=1e-6)
    assert log_probs[1] == log_probs[3] == MASKED
    np.testing.assert_array_equal(jnp.exp(log_probs)[jnp.array([1, 3])], 0.0)


def test_rows_do_not_leak_into_each_other():
    logits = jax.random.normal(jax.random.key(0), (4, 5))
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, (4, 5))
    together = masking.masked_log_softmax(logits, mask)
    for row in range(4):
        alone = masking.masked_log_softmax(logits[row], mask[row])
        np.testing.assert_array_equal(together[row], alone)


@pytest.mark.parametrize("masked_value", [0.0, 1e30, -jnp.inf, jnp.inf, jnp.nan])
def test_what_is_masked_has_no_influence(masked_value):
    mask = jnp.array([True, True, False])
    logits = jnp.array([0.5, -0.5, masked_value])
    expected = masking.masked_log_softmax(jnp.array([0.5, -0.5]), jnp.ones(2, bool))
    np.testing.assert_allclose(masking.masked_log_softmax(logits, mask)[:2], expected, rtol=1e-6)


@pytest.mark.parametrize("mask", ["1111", "1010", "0001", "0000"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_values_and_gradients_are_finite_everywhere(mask, scale):
    mask = jnp.array([bit == "1" for bit in mask])
    logits = scale * jnp.array([0.3, -2.0, 5.0, 0.0])

    def total(logits):
        log_probs = masking.masked_log_softmax(logits, mask)
        other = masking.masked_log_softmax(2.0 * logits, mask)
        kl = jnp.sum(jnp.exp(log_probs) * (log_probs - other))
        return masking.masked_entropy(log_probs) + kl + jnp.sum(jnp.where(mask, log_probs, 0.0))

    value, gradient = jax.value_and_grad(total)(logits)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[~mask], 0.0)


def test_nothing_left():
    log_probs = masking.masked_log_softmax(jnp.ones(3), jnp.zeros(3, bool))
    np.testing.assert_array_equal(log_probs, MASKED)
    assert masking.masked_entropy(log_probs) == 0.0
    assert jnp.all(masking.is_masked(log_probs))


def test_entropy_of_equals_is_log_of_their_number():
    mask = jnp.array([True, True, True, False])
    log_probs = masking.masked_log_softmax(jnp.zeros(4), mask)
    np.testing.assert_allclose(masking.masked_entropy(log_probs), np.log(3), rtol=1e-6)


def test_top_k_takes_the_first_of_equals_and_says_what_is_missing():
    scores = jnp.array([1.0, jnp.nan, 2.0, 2.0, 9.0])
    mask = jnp.array([True, False, True, True, False])
    values, indices, found = masking.masked_top_k(scores, mask, 7)
    np.testing.assert_array_equal(indices, [2, 3, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(values, [2.0, 2.0, 1.0] + [MASKED] * 4)
    np.testing.assert_array_equal(found, [True] * 3 + [False] * 4)


def test_top_k_of_rows_with_different_masks():
    scores = jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    mask = jnp.array([[True, True, True], [False, True, True], [False, False, False]])
    _, indices, found = masking.masked_top_k(scores, mask, 2)
    np.testing.assert_array_equal(indices, [[0, 1], [1, 2], [0, 0]])
    np.testing.assert_array_equal(found, [[True, True], [True, True], [False, False]])


def test_noise_does_not_depend_on_the_padding():
    key = jax.random.key(3)
    np.testing.assert_array_equal(masking.gumbel(key, 3, 5), masking.gumbel(key, 3, 11)[:, :5])


def test_remove():
    mask = jnp.array([True, False, True])
    np.testing.assert_array_equal(masking.remove(mask, jnp.int32(2)), [True, False, False])
    for outside in (-1, 3):
        np.testing.assert_array_equal(masking.remove(mask, jnp.int32(outside)), mask)


@pytest.mark.parametrize("shape", [(1,), (5,), (64, 33), (3, 4, 2)])
def test_the_first_of_the_largest_is_numpys(shape):
    rng = np.random.default_rng()
    ties = rng.integers(0, 4, shape).astype(np.float32)
    for scores in (ties, rng.normal(size=shape).astype(np.float32), np.full(shape, -np.inf)):
        got = jax.jit(masking.first_largest)(scores)
        np.testing.assert_array_equal(got, np.argmax(scores, axis=-1))
        assert got.dtype == jnp.int32
    assert 0 <= masking.first_largest(jnp.full(3, jnp.nan)) < 3  # never outside
