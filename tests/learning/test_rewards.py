"""Rewards: every mode against visible arithmetic, NumPy and JAX alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lever_jax import rewards
from lever_jax.errors import InputError

ACCURACY = [0.0, 0.3, 1.0]
GT_PROB = [0.5, 0.25, 0.75]

# With hard_weight 2, soft_weight 0.5; hard is 0, 1, 1.
EXPECTED = {
    "hard01_plus_gtprob": [2 * 0 + 0.5 * 0.5, 2 * 1 + 0.5 * 0.25, 2 * 1 + 0.5 * 0.75],
    "hard01_plus_gtprob_separated": [0.5 * 0.5, 2 * 2 + 0.5 * 0.25, 2 * 2 + 0.5 * 0.75],
    "acc_plus_gtprob": [2 * 0 + 0.5 * 0.5, 2 * 0.3 + 0.5 * 0.25, 2 * 1.0 + 0.5 * 0.75],
    "hard_plus_soft": [2 * 0 + 0.5 * 0.0, 2 * 1 + 0.5 * 0.3, 2 * 1 + 0.5 * 1.0],
    "hard_only": [2 * 0, 2 * 1, 2 * 1],
    "soft_only": [0.5 * 0.0, 0.5 * 0.3, 0.5 * 1.0],
}


def test_every_mode_has_an_expectation():
    assert set(EXPECTED) == set(rewards.REWARD_MODES)


@pytest.mark.parametrize("mode", EXPECTED)
@pytest.mark.parametrize("make", [lambda x: np.array(x, np.float32), jnp.array, list])
def test_modes_by_hand(mode, make):
    got = rewards.compute_rewards(
        mode, accuracy=make(ACCURACY), gt_prob=make(GT_PROB), hard_weight=2.0, soft_weight=0.5
    )
    np.testing.assert_allclose(got, EXPECTED[mode], rtol=1e-6)


def test_kind_of_array_is_kept():
    arrays = {"accuracy": np.ones(2, np.float32), "gt_prob": np.ones(2, np.float32)}
    for mode in rewards.REWARD_MODES:
        got = rewards.compute_rewards(mode, **arrays, similarity=np.ones(2), similarity_weight=1.0)
        assert isinstance(got, np.ndarray)
        arrays_jax = {name: jnp.asarray(array) for name, array in arrays.items()}
        assert isinstance(rewards.compute_rewards(mode, **arrays_jax), jax.Array)
        jitted = jax.jit(
            lambda a, g, mode=mode: rewards.compute_rewards(mode, accuracy=a, gt_prob=g)
        )
        np.testing.assert_allclose(
            jitted(*arrays.values()), rewards.compute_rewards(mode, **arrays), rtol=1e-6
        )


@pytest.mark.parametrize("mode", EXPECTED)
def test_similarity_only_where_the_answer_is_wrong(mode):
    scores = {"accuracy": np.array(ACCURACY), "gt_prob": np.array(GT_PROB)}
    plain = rewards.compute_rewards(mode, **scores)
    # NaN beside a right answer must not reach the reward.
    similarity = np.array([0.4, 0.9, np.nan])
    shaped = rewards.compute_rewards(mode, **scores, similarity=similarity, similarity_weight=0.5)
    np.testing.assert_allclose(shaped - plain, [0.5 * 0.4, 0.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("mode", EXPECTED)
def test_unverified_is_nan_not_negative(mode):
    got = rewards.compute_rewards(
        mode,
        accuracy=np.array([np.nan, 1.0]),
        gt_prob=np.array([0.5, 0.5]),
        similarity=np.array([0.5, 0.5]),
        similarity_weight=1.0,
    )
    assert np.isnan(got[0])
    assert np.isfinite(got[1])


def test_separated_keeps_positives_above_negatives():
    rng = np.random.default_rng()
    accuracy, gt_prob = rng.choice([0.0, 0.3, 1.0], 500), rng.random(500)
    got = rewards.compute_rewards(
        "hard01_plus_gtprob_separated",
        accuracy=accuracy,
        gt_prob=gt_prob,
        hard_weight=1.0,
        soft_weight=1.9,
    )
    assert got[accuracy > 0].min() > got[accuracy == 0].max()


def test_unknown_mode_names_flag_and_allowed_values():
    with pytest.raises(InputError, match=r"--reward_mode=best .*hard01_plus_gtprob, .*soft_only"):
        rewards.compute_rewards("best", accuracy=np.ones(1), gt_prob=np.ones(1))


def test_similarity_weight_without_similarity():
    with pytest.raises(InputError, match=r"--similarity_weight=0.5"):
        rewards.compute_rewards(
            "hard_only", accuracy=np.ones(1), gt_prob=np.ones(1), similarity_weight=0.5
        )


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    ("values", "where", "flat"),
    [
        ([1.0, 1.0, 1.0], None, True),
        ([1.0, 1.0, 1.2], None, False),
        ([1.0, 1.05, 1.0], None, True),  # 0.05 < 0.1
        ([1.0, 1.0, 9.0], [True, True, False], True),
        ([1.0, 2.0, np.nan], [True, True, False], False),
        ([1.0, 1.0, np.nan], [True, True, False], True),
        ([1.0, 2.0, 3.0], [False, True, False], True),
        ([1.0, 2.0, 3.0], [False, False, False], True),
        ([1.0, np.nan, 1.0], None, False),  # a mistake must surface
        ([], None, True),
    ],
)
def test_is_flat(xp, values, where, flat):
    where = None if where is None else xp.array(where)
    got = rewards.is_flat(xp.array(values, xp.float32), where, min_range=0.1)
    assert bool(got) is flat


@pytest.mark.parametrize("xp", [np, jnp])
def test_equals_are_flat_whatever_the_least_range(xp):
    for values, flat in (([0.1] * 3, True), ([0.1, 0.1, 0.2], False), ([0.1, np.nan], False)):
        assert bool(rewards.is_flat(xp.array(values, xp.float32), min_range=0.0)) is flat
    lowest, highest = xp.array([1.0, 1.0, np.nan]), xp.array([1.0, 1.5, np.nan])
    assert rewards.is_flat_between(lowest, highest, 0.0).tolist() == [True, False, False]


def test_is_flat_under_vmap():
    values = jnp.array([[1.0, 1.0, 5.0], [1.0, 1.0, 5.0]])
    where = jnp.array([[True, True, False], [True, False, True]])
    np.testing.assert_array_equal(jax.vmap(rewards.is_flat)(values, where), [True, False])
