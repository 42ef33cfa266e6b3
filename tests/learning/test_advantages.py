"""Advantages: by hand, against plain NumPy on fresh input, masked and flat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lever_jax import advantages
from lever_jax.advantages import ADVANTAGES
from lever_jax.errors import InputError

# Compiled whole: op by op, these tests take ten times as long.
compute_advantages = jax.jit(advantages.compute_advantages, static_argnums=0)

REWARDS = [3.0, 0.0, 1.0, 0.0]  # mean 1, deviations 2 -1 0 -1, variance 6 / 4
EXPECTED = {
    "group": [2 / 1.5**0.5, -1 / 1.5**0.5, 0.0, -1 / 1.5**0.5],
    "mean": [2.0, -1.0, 0.0, -1.0],
    "leave_one_out": [3 - (0 + 1 + 0) / 3, 0 - (3 + 1 + 0) / 3, 1 - 3 / 3, 0 - (3 + 0 + 1) / 3],
    "rank": [(3 - 0) / 3, (0 - 2) / 3, (2 - 1) / 3, (0 - 2) / 3],
}


def oracle(method, r):
    """One row without masks, by loops."""
    n = len(r)
    if n < 2 or r.max() - r.min() < 1e-6:
        return np.zeros(n)
    if method == "group":
        return (r - r.mean()) / np.std(r)
    if method == "mean":
        return r - r.mean()
    if method == "leave_one_out":
        return np.array([r[i] - np.delete(r, i).mean() for i in range(n)])
    return np.array([((r < x).sum() - (r > x).sum()) / (n - 1) for x in r])


def test_every_method_has_an_expectation():
    assert set(EXPECTED) == set(ADVANTAGES)


@pytest.mark.parametrize("method", EXPECTED)
def test_by_hand(method):
    np.testing.assert_allclose(
        compute_advantages(method, jnp.array(REWARDS)), EXPECTED[method], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("method", EXPECTED)
def test_rows_with_different_masks_do_not_leak(method):
    rng = np.random.default_rng()
    values = np.round(rng.normal(size=(20, 9)), 1).astype(np.float32)  # rounded: some ties
    where = rng.random((20, 9)) < 0.6
    where[0] = False
    where[1] = np.arange(9) == 4  # one pointer only
    values[2] = 2.5  # flat
    polluted = np.where(where, values, np.nan)  # whatever is masked must not matter
    got = jax.vmap(lambda r, w: compute_advantages(method, r, where=w))(polluted, where)
    for row in range(20):
        expected = np.zeros(9)
        expected[where[row]] = oracle(method, values[row, where[row]].astype(np.float64))
        np.testing.assert_allclose(got[row], expected, rtol=1e-4, atol=1e-5)
    assert not np.any(got[:3])


@pytest.mark.parametrize("method", EXPECTED)
def test_flat_by_min_range(method):
    values = jnp.array([1.0, 1.0, 1.01])
    assert not np.any(compute_advantages(method, values, min_range=0.1))
    assert np.any(compute_advantages(method, values, min_range=1e-3))
    assert not np.any(compute_advantages(method, jnp.ones(3), min_range=0.0))


def test_scale_and_shift():
    values = jnp.array(np.random.default_rng().normal(size=8), jnp.float32)
    for method in ("group", "rank"):
        np.testing.assert_allclose(
            compute_advantages(method, 7 * values + 3),
            compute_advantages(method, values),
            rtol=1e-3,
            atol=1e-5,
        )


def test_unknown_method():
    with pytest.raises(InputError, match=r"--advantage=gae .*group, mean, leave_one_out, rank"):
        compute_advantages("gae", jnp.ones(3))
