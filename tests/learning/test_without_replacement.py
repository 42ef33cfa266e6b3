"""The policy gradient from draws without replacement against the exact one, by enumeration."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lever_jax import sampling
from lever_jax.advantages import compute_advantages, without_replacement
from lever_jax.losses import exact_kl, grpo_loss
from lever_jax.policy import Policy, pointer_log_probs

# A table of logits [S, K+1, K] by step and previous action (K: none yet); K = 6, S = 2.
TABLE = Policy(
    encode=lambda params, query, pool: params,
    start=lambda params, encoding: (jnp.int32(0), jnp.int32(encoding.shape[-1])),
    logits=lambda params, encoding, state: encoding[state[0], state[1]],
    update=lambda params, encoding, state, action: (state[0] + 1, jnp.int32(action)),
)
MASK = jnp.ones(6, bool)
EVERY = jnp.array(list(itertools.permutations(range(6), 2)))
ESTIMATORS = ("iid", "sbs", "sbs_normalised")


def world(seed):
    """Parameters, and rewards [K, K] such as right answers give: 0 to 1, or 2 more."""
    rng = np.random.default_rng(seed)
    params = jnp.asarray(rng.normal(size=(2, 7, 6)), jnp.float32)
    soft = rng.random((6, 6))
    return params, jnp.asarray(soft + 2.0 * (soft > 0.7), jnp.float32)


def log_probs_of(params, pointers):
    return pointer_log_probs(TABLE, None, params, MASK, pointers)[0]


def loss_of_a_draw(params, key, worth, name, group):
    """The GRPO loss of one group drawn from `params`; its gradient is the estimate."""
    behaviour = jax.lax.stop_gradient(params)
    options = {"num": group, "shots": 2}
    if name == "iid":
        drawn = sampling.sample_temperature(TABLE, None, key, behaviour, MASK, **options)
        inclusion = None
    else:
        beam = sampling.stochastic_beam_search(TABLE, None, key, behaviour, MASK, **options)
        drawn = beam.rollouts
        inclusion = sampling.inclusion_log_probs(drawn.log_probs, beam.threshold)
    rewards = worth[drawn.pointers[:, 0], drawn.pointers[:, 1]]
    weights = None
    if name == "iid":
        advantages = compute_advantages("leave_one_out", rewards, where=drawn.mask)
    else:
        advantages, weights = without_replacement(
            rewards,
            drawn.log_probs,
            inclusion,
            where=drawn.mask,
            normalised=name == "sbs_normalised",
        )
    log_probs = log_probs_of(params, drawn.pointers)
    loss, _ = grpo_loss(log_probs, drawn.log_probs, advantages, where=drawn.mask, weights=weights)
    return loss


def exact_gradient(params, worth):
    def expected(params):
        return -jnp.sum(jnp.exp(log_probs_of(params, EVERY)) * worth[EVERY[:, 0], EVERY[:, 1]])

    return np.asarray(jax.grad(expected)(params), np.float64).ravel()


def estimates(name, *, draws, group, seed=0):
    """Gradients [draws, parameters] and the exact one."""
    params, worth = world(seed)
    one = jax.grad(functools.partial(loss_of_a_draw, name=name, group=group))
    run = jax.jit(jax.vmap(one, in_axes=(None, 0, None)))
    found = run(params, jax.random.split(jax.random.key(seed), draws), worth)
    return np.asarray(found, np.float64).reshape(draws, -1), exact_gradient(params, worth)


def measure(name, **options):
    """Bias (norm, and its largest z-value over parameters) and variance (summed)."""
    found, exact = estimates(name, **options)
    error = found.mean(0) - exact
    spread = found.std(0, ddof=1)
    z = np.abs(error) / np.maximum(spread / math.sqrt(len(found)), 1e-7)
    return np.linalg.norm(error), z.max(), (spread**2).sum(), np.linalg.norm(exact)


def test_bias_and_variance_of_the_policy_gradient():
    measured = {name: measure(name, draws=10_000, group=8) for name in ESTIMATORS}
    for name, (bias, z, variance, size) in measured.items():
        relative = f"bias {bias / size:.4f}, variance {variance / size**2:.3f} of the gradient"
        print(f"{name}: {relative}, z {z:.1f}")
    assert measured["iid"][1] < 4.5
    assert measured["sbs"][1] < 4.5
    # Without replacement the same number of evaluations says more.
    assert measured["sbs"][2] < measured["iid"][2]
    assert measured["sbs_normalised"][2] < measured["iid"][2]
    # The bias that the normalisation costs is small beside the error of one estimate.
    assert measured["sbs_normalised"][0] ** 2 < 0.1 * measured["sbs_normalised"][2]


@pytest.mark.parametrize("name", ["sbs", "sbs_normalised"])
def test_a_group_of_all_pointers_gives_the_exact_gradient(name):
    found, exact = estimates(name, draws=2, group=32)
    np.testing.assert_allclose(found, np.stack([exact, exact]), atol=1e-5)


def test_advantages_by_hand():
    p, q = np.array([0.5, 0.2]), np.array([0.8, 0.4])
    rewards = np.array([3.0, 1.0])  # w = p / q = 0.625, 0.5
    where = jnp.array([True, True, False])
    given = [jnp.array([*x, np.nan], jnp.float32) for x in (rewards, np.log(p), np.log(q))]
    plain = without_replacement(*given, where=where)
    baseline = 0.625 * 3 + 0.5 * 1
    wanted = [3 * (1 - 0.5 + 0.625) - baseline, 1 * (1 - 0.2 + 0.5) - baseline, 0.0]
    np.testing.assert_allclose(plain.advantages, wanted, atol=1e-6)
    np.testing.assert_allclose(plain.weights, [0.625, 0.5, 0.0], atol=1e-6)
    normalised = without_replacement(*given, where=where, normalised=True)
    mean = baseline / 1.125
    np.testing.assert_allclose(normalised.advantages, [3 - mean, 1 - mean, 0.0], atol=1e-6)
    np.testing.assert_allclose(normalised.weights, [0.625 / 1.0, 0.5 / 0.825, 0.0], atol=1e-6)


def test_flat_and_empty_groups_contribute_nothing():
    log_probs, inclusion = jnp.log(jnp.array([0.3, 0.2])), jnp.log(jnp.array([0.6, 0.5]))
    for rewards, where in (([1.0, 1.0], [True, True]), ([1.0, 0.0], [False, False])):
        for normalised in (False, True):
            result = without_replacement(
                jnp.array(rewards), log_probs, inclusion, where=jnp.array(where),
                normalised=normalised,
            )  # fmt: skip
            np.testing.assert_array_equal(result.advantages, 0.0)
            assert np.isfinite(result.weights).all()


def test_weights_replace_the_mean_in_loss_and_kl():
    rng = np.random.default_rng(0)
    log_probs = jnp.asarray(np.log(rng.random(3)), jnp.float32)
    advantages, weights = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.2, 0.3, 0.0])
    loss, _ = grpo_loss(log_probs, log_probs, advantages, weights=weights)
    assert float(loss) == pytest.approx(-(0.2 * 1.0 - 0.3 * 2.0), abs=1e-6)
    p, q = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)) for _ in "pq")
    each = [float(exact_kl(p[i : i + 1], q[i : i + 1])) for i in range(3)]
    mean = float(exact_kl(p, q, weights=weights))
    assert mean == pytest.approx((0.2 * each[0] + 0.3 * each[1]) / 0.5, rel=1e-5)
    assert float(exact_kl(p, q, weights=jnp.ones(3))) == pytest.approx(np.mean(each), rel=1e-5)
