"""Losses: visible arithmetic, oracles, masks under vmap, and gradients that stay finite."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lever_jax import losses
from lever_jax.advantages import compute_advantages

# Compiled whole: op by op, these tests take ten times as long.
supervised_loss = jax.jit(losses.supervised_loss)
rce_loss = jax.jit(losses.rce_loss)
grpo_loss = jax.jit(losses.grpo_loss)
mean_over_groups = jax.jit(losses.mean_over_groups)
exact_kl = jax.jit(losses.exact_kl)
kl_k1, kl_k2, kl_k3 = (jax.jit(f) for f in (losses.kl_k1, losses.kl_k2, losses.kl_k3))
exact_kl_gradient = jax.jit(jax.grad(losses.exact_kl))
NEVER = [-np.inf, -1e9, np.nan]  # what a masked log-probability may hold


def log(*probabilities):
    return jnp.log(jnp.array(probabilities))


# Supervised


def test_supervised_one_target():
    loss, counted = supervised_loss(log(0.2))
    np.testing.assert_allclose(loss, -np.log(0.2), rtol=1e-6)
    assert counted == 1


def test_supervised_weighted_targets():
    loss, _ = supervised_loss(log(0.5, 0.25, 0.1), weights=jnp.array([3.0, 1.0, 0.0]))
    np.testing.assert_allclose(loss, -(3 * np.log(0.5) + 1 * np.log(0.25)) / 4, rtol=1e-6)


@pytest.mark.parametrize("never", NEVER)
def test_supervised_masked(never):
    log_probs = jnp.array([np.log(0.5), never, np.log(0.25)])
    where = jnp.array([True, False, True])
    loss, counted = supervised_loss(log_probs, where=where)
    np.testing.assert_allclose(loss, -(np.log(0.5) + np.log(0.25)) / 2, rtol=1e-6)
    grad = jax.grad(lambda x: supervised_loss(x, where=where)[0])(log_probs)
    np.testing.assert_allclose(grad, [-0.5, 0.0, -0.5])
    loss, counted = supervised_loss(log_probs, where=jnp.zeros(3, bool))
    assert loss == 0
    assert counted == 0


# Reward-weighted cross-entropy


def test_rce_by_hand():
    # softmax([log 3, 0]) = [3/4, 1/4]
    loss, counted = rce_loss(log(0.5, 0.25), jnp.array([np.log(3.0), 0.0]))
    np.testing.assert_allclose(loss, -(3 / 4 * np.log(0.5) + 1 / 4 * np.log(0.25)), rtol=1e-6)
    assert counted == 1


def test_rce_temperature():
    log_probs, rewards = log(0.5, 0.25), jnp.array([2 * np.log(3.0), 0.0])
    loss, _ = rce_loss(log_probs, rewards, temperature=2.0)
    np.testing.assert_allclose(loss, -(3 / 4 * np.log(0.5) + 1 / 4 * np.log(0.25)), rtol=1e-6)
    cold, _ = rce_loss(log_probs, rewards, temperature=1e-3)
    np.testing.assert_allclose(cold, -np.log(0.5), rtol=1e-6)  # only the best counts


def test_rce_extremes():
    loss, _ = rce_loss(log(0.5, 0.25), jnp.array([1e6, -1e6]))
    np.testing.assert_allclose(loss, -np.log(0.5), rtol=1e-6)
    shifted, _ = rce_loss(log(0.5, 0.25), jnp.array([101.0, 100.0]))
    plain, _ = rce_loss(log(0.5, 0.25), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(shifted, plain, rtol=1e-6)


def test_rce_gradient_is_minus_the_weights():
    rewards = np.random.default_rng().normal(size=6).astype(np.float32)
    grad = jax.grad(lambda x: rce_loss(x, rewards, temperature=0.5)[0])(jnp.zeros(6))
    np.testing.assert_allclose(grad, -scipy.special.softmax(rewards / 0.5), rtol=1e-5)


def test_rce_flat_groups_leave_numerator_and_denominator():
    log_probs = jnp.stack([log(0.5, 0.25), log(0.1, 0.1), log(0.5, 0.125)])
    rewards = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    loss, counted = jax.vmap(rce_loss)(log_probs, rewards)
    np.testing.assert_array_equal(counted, [1, 0, 1])
    assert loss[1] == 0
    np.testing.assert_allclose(mean_over_groups(loss, counted), (loss[0] + loss[2]) / 2, rtol=1e-6)
    assert mean_over_groups(loss, jnp.zeros(3)) == 0
    # A dropped group may hold anything.
    assert mean_over_groups(jnp.array([np.nan, 2.0]), jnp.array([0.0, 1.0])) == 2


@pytest.mark.parametrize("never", NEVER)
def test_rce_rows_with_different_masks(never):
    rng = np.random.default_rng()
    log_probs = np.log(rng.random((12, 7))).astype(np.float32)
    rewards = rng.normal(size=(12, 7)).astype(np.float32)
    where = rng.random((12, 7)) < 0.6
    where[0], where[1] = False, np.arange(7) == 3
    rewards[2] = 1.0
    dirty_log_probs = jnp.array(np.where(where, log_probs, never))
    dirty_rewards = jnp.array(np.where(where, rewards, np.nan))

    def total(x):
        loss, counted = jax.vmap(lambda x, r, w: rce_loss(x, r, where=w))(x, dirty_rewards, where)
        return loss.sum(), (loss, counted)

    grad, (loss, counted) = jax.jit(jax.grad(total, has_aux=True))(dirty_log_probs)
    for row in range(12):
        r, x = rewards[row, where[row]], log_probs[row, where[row]]
        flat = len(r) < 2 or np.ptp(r) < 1e-6
        assert counted[row] == (not flat)
        expected = np.zeros(7)
        if not flat:
            expected[where[row]] = -scipy.special.softmax(r)
        np.testing.assert_allclose(loss[row], (expected[where[row]] * x).sum(), rtol=1e-4)
        np.testing.assert_allclose(grad[row], expected, rtol=1e-4, atol=1e-6)


# GRPO


def test_grpo_by_hand():
    ratio = np.array([1.5, 0.5, 1.1, 0.5, 1.5])
    advantages = np.array([1.0, 1.0, -2.0, -1.0, -1.0])
    # clipped to [0.8, 1.3]; the smaller objective counts
    objective = [
        1.3 * 1.0,  # clipped: already raised enough
        0.5 * 1.0,  # min(0.5, 0.8)
        1.1 * -2.0,  # inside
        0.8 * -1.0,  # clipped: already lowered enough
        1.5 * -1.0,  # min(-1.5, -1.3)
    ]
    behaviour = np.log([0.1, 0.2, 0.3, 0.2, 0.1])
    loss, aux = grpo_loss(
        jnp.array(behaviour + np.log(ratio)),
        jnp.array(behaviour),
        jnp.array(advantages),
        clip_low=0.2,
        clip_high=0.3,
    )
    np.testing.assert_allclose(loss, -sum(objective) / 5, rtol=1e-5)
    np.testing.assert_allclose(aux.clip_share, 2 / 5, rtol=1e-6)
    np.testing.assert_allclose(aux.ratio_mean, ratio.mean(), rtol=1e-5)
    assert aux.counted == 1


def test_grpo_gradient_on_policy_is_the_policy_gradient():
    """A softmax policy over four pointers: d log pi_i / d logits_j = [i = j] - pi_j."""
    logits = jnp.array(np.random.default_rng().normal(size=4), jnp.float32)
    drawn = np.array([2, 0, 2])
    advantages = np.array([1.0, -0.5, 0.25], np.float32)
    behaviour = jax.nn.log_softmax(logits)[drawn]

    def loss(logits):
        return grpo_loss(jax.nn.log_softmax(logits)[drawn], behaviour, advantages)[0]

    pi = np.array(jax.nn.softmax(logits))
    expected = np.zeros(4)
    for pointer, advantage in zip(drawn, advantages):
        expected -= advantage * ((np.arange(4) == pointer) - pi) / 3
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss(logits), -advantages.mean(), rtol=1e-5)


def test_grpo_with_leave_one_out_is_unbiased_by_enumeration():
    """The expectation over every pair of draws is the exact gradient of the mean reward."""
    rng = np.random.default_rng()
    logits = jnp.array(rng.normal(size=3), jnp.float32)
    rewards = jnp.array(rng.normal(size=3), jnp.float32)
    log_pi = jax.nn.log_softmax(logits)

    def loss(logits, drawn):
        advantages = compute_advantages("leave_one_out", rewards[drawn])
        return grpo_loss(jax.nn.log_softmax(logits)[drawn], log_pi[drawn], advantages)[0]

    expected = jax.grad(lambda x: -(jax.nn.softmax(x) * rewards).sum())(logits)
    pairs = jnp.array(list(itertools.product(range(3), repeat=2)))
    grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(logits, pairs)
    found = jnp.exp(log_pi[pairs].sum(axis=1)) @ grads
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_grpo_clipped_pointers_have_no_gradient():
    behaviour = log(0.1, 0.1, 0.1)
    log_probs = behaviour + jnp.log(jnp.array([2.0, 0.5, 1.0]))
    advantages = jnp.array([1.0, -1.0, 1.0])
    grad = jax.grad(lambda x: grpo_loss(x, behaviour, advantages)[0])(log_probs)
    np.testing.assert_allclose(grad, [0.0, 0.0, -1 / 3], rtol=1e-5)


def test_grpo_flat_group_does_not_count():
    loss, aux = grpo_loss(log(0.5, 0.2), log(0.5, 0.2), jnp.zeros(2))
    assert loss == 0
    assert aux.counted == 0
    loss, aux = grpo_loss(log(0.5), log(0.5), jnp.ones(1), where=jnp.zeros(1, bool))
    assert loss == 0
    assert aux == (0, 0, 0)


@pytest.mark.parametrize("never", NEVER)
def test_grpo_rows_with_different_masks(never):
    rng = np.random.default_rng()
    shape = (10, 6)
    behaviour = np.log(rng.random(shape)).astype(np.float32)
    log_probs = behaviour + rng.normal(size=shape).astype(np.float32)
    advantages = rng.normal(size=shape).astype(np.float32)
    where = rng.random(shape) < 0.6
    where[0] = False

    def group(x, b, a, w):
        return grpo_loss(x, b, a, where=w, clip_low=0.1, clip_high=0.4)

    dirty = [jnp.array(np.where(where, x, never)) for x in (log_probs, behaviour, advantages)]
    loss, aux = jax.jit(jax.vmap(group))(*dirty, where)
    total = jax.jit(jax.grad(lambda x: jax.vmap(group)(x, *dirty[1:], where)[0].sum()))
    grad = total(dirty[0])
    assert np.isfinite(grad).all()
    assert not np.any(np.where(where, 0.0, grad))
    for row in range(1, 10):
        if not where[row].any():
            continue
        kept = [x[row, where[row]] for x in (log_probs, behaviour, advantages)]
        ratio = np.exp(kept[0] - kept[1])
        objective = np.minimum(ratio * kept[2], np.clip(ratio, 0.9, 1.4) * kept[2])
        np.testing.assert_allclose(loss[row], -objective.mean(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(aux.ratio_mean[row], ratio.mean(), rtol=1e-4)


def test_grpo_absurd_ratio_keeps_the_gradient_finite():
    for advantage in (1.0, -1.0):
        value, grad = jax.value_and_grad(
            lambda x, a=advantage: grpo_loss(x, jnp.array([-200.0]), jnp.array([a]))[0]
        )(jnp.array([0.0]))
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        losses.rce_loss(jnp.zeros(3), jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match="shapes differ"):
        losses.grpo_loss(jnp.zeros(3), jnp.zeros(1), jnp.zeros(3))
    with pytest.raises(ValueError, match="shapes differ"):
        losses.exact_kl(jnp.zeros((3, 2, 4)), jnp.zeros((3, 1, 4)))
    with pytest.raises(ValueError, match="neither"):
        losses.exact_kl(jnp.zeros((3, 2, 4)), jnp.zeros((3, 2, 4)), jnp.ones((3, 2, 4), bool))


# KL


def test_exact_kl_by_hand():
    p, q = [0.5, 0.5, 0.0], [0.25, 0.75, 0.0]
    log_p = jnp.array([[np.log(0.5), np.log(0.5), -np.inf]] * 2)[None]  # [1, 2, 3]
    log_q = jnp.array([[np.log(0.25), np.log(0.75), -np.inf]] * 2)[None]
    one_step = p[0] * np.log(p[0] / q[0]) + p[1] * np.log(p[1] / q[1])
    np.testing.assert_allclose(exact_kl(log_p, log_q), 2 * one_step, rtol=1e-6)
    # The other direction is another number.
    reverse = q[0] * np.log(q[0] / p[0]) + q[1] * np.log(q[1] / p[1])
    np.testing.assert_allclose(exact_kl(log_q, log_p), 2 * reverse, rtol=1e-6)
    assert exact_kl(log_p, log_p) == 0


@pytest.mark.parametrize("never_p", [-np.inf, -1e9])
@pytest.mark.parametrize("never_q", [-np.inf, -1e9, np.nan])
def test_exact_kl_masks_and_gradients(never_p, never_q):
    rng = np.random.default_rng()
    logits = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    actions = rng.random((5, 3, 4)) < 0.6
    actions[..., 0] = True
    actions[0, 1] = False  # a step of which nothing is left
    where = np.array([True, True, False, True, False])
    logits[:, 2] = np.nan  # a pointer that does not count may hold anything

    def kl(policy_logits):
        masked = jnp.where(actions, policy_logits, -1e9)
        log_p = jnp.where(actions, jax.nn.log_softmax(masked), never_p)
        log_q = jnp.where(actions, jax.nn.log_softmax(jnp.where(actions, logits[1], -1e9)), never_q)
        return exact_kl(log_p, log_q, where)

    value, grad = jax.jit(jax.value_and_grad(kl))(jnp.array(logits[0]))
    expected = 0.0
    for g, s in itertools.product(np.flatnonzero(where), range(3)):
        on = actions[g, s]
        if on.any():
            p, q = (scipy.special.softmax(x[g, s, on].astype(np.float64)) for x in logits)
            expected += scipy.special.rel_entr(p, q).sum()
    np.testing.assert_allclose(value, expected / 3, rtol=1e-4)
    assert np.isfinite(np.where(where[:, None, None], grad, 0.0)).all()
    assert np.isfinite(grad[4]).all()


def test_exact_kl_gradient_by_hand():
    # d KL / d log_p_k = p_k * (log p_k - log q_k + 1), and 0 where p_k = 0
    p, q = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    log_p = jnp.array([[[*np.log(p), -np.inf]]])
    log_q = jnp.array([[[*np.log(q), -np.inf]]])
    grad = exact_kl_gradient(log_p, log_q)
    np.testing.assert_allclose(grad[0, 0], [*(p * (np.log(p / q) + 1)), 0.0], rtol=1e-5)


def test_exact_kl_by_step_mask_and_empty():
    log_p = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]], [[0.2, 0.8], [0.3, 0.7]]]))
    log_q = jnp.log(jnp.full((2, 2, 2), 0.5))
    steps = jnp.array([[True, False], [True, True]])  # the first pointer stopped after one shot
    terms = scipy.special.rel_entr(np.exp(log_p), 0.5).sum(-1)
    np.testing.assert_allclose(
        exact_kl(log_p, log_q, steps), (terms[0, 0] + terms[1].sum()) / 2, rtol=1e-5
    )
    assert exact_kl(log_p, log_q, jnp.zeros(2, bool)) == 0


def test_exact_kl_reports_a_reference_masked_differently():
    log_p, log_q = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.array([[[0.0, -jnp.inf]]])
    assert exact_kl(log_p, log_q) == jnp.inf


def test_exact_kl_under_vmap():
    rng = np.random.default_rng()
    log_p, log_q = (
        jax.nn.log_softmax(jnp.array(rng.normal(size=(4, 5, 2, 3)), jnp.float32)) for _ in range(2)
    )
    where = jnp.array(rng.random((4, 5)) < 0.5)
    got = jax.vmap(exact_kl)(log_p, log_q, where)
    for row in range(4):
        np.testing.assert_allclose(
            got[row], exact_kl(log_p[row], log_q[row], where[row]), rtol=1e-5, atol=1e-7
        )


def test_sampled_kl_by_hand():
    log_probs, reference = log(0.5, 0.2), log(0.25, 0.4)
    x = np.log([0.5 / 0.25, 0.2 / 0.4])
    np.testing.assert_allclose(kl_k1(log_probs, reference), x.mean(), atol=1e-6)
    np.testing.assert_allclose(kl_k2(log_probs, reference), (x**2 / 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(
        kl_k3(log_probs, reference),
        ((0.25 / 0.5 - 1 + x[0]) + (0.4 / 0.2 - 1 + x[1])) / 2,
        rtol=1e-5,
    )


def test_sampled_kl_expectations_by_enumeration():
    """Over every outcome: k1 and k3 give KL(policy || reference), and so does k2's gradient."""
    rng = np.random.default_rng()
    logits = jnp.array(rng.normal(size=5), jnp.float32)
    log_q = jax.nn.log_softmax(jnp.array(rng.normal(size=5), jnp.float32))
    p = jax.nn.softmax(logits)

    def exact(logits, forward=True):
        log_p = jax.nn.log_softmax(logits)
        a, b = (log_p, log_q) if forward else (log_q, log_p)
        return (jnp.exp(a) * (a - b)).sum()

    def expectation(estimator):
        def sampled(logits, i):
            return estimator(jax.nn.log_softmax(logits)[i][None], log_q[i][None])

        every = jax.jit(jax.vmap(jax.value_and_grad(sampled), in_axes=(None, 0)))
        values, grads = every(logits, jnp.arange(5))
        return p @ values, p @ grads

    k1, k1_grad = expectation(kl_k1)
    k2, k2_grad = expectation(kl_k2)
    k3, k3_grad = expectation(kl_k3)
    np.testing.assert_allclose([k1, k3], [exact(logits)] * 2, rtol=1e-4, atol=1e-5)
    assert k2 >= 0
    np.testing.assert_allclose(k1_grad, np.zeros(5), atol=1e-5)
    np.testing.assert_allclose(k2_grad, jax.grad(exact)(logits), rtol=1e-3, atol=1e-5)
    backward = jax.grad(lambda x: exact(x, forward=False))(logits)
    np.testing.assert_allclose(k3_grad, backward, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
@pytest.mark.parametrize("never", NEVER)
def test_sampled_kl_masked(estimator, never):
    where = jnp.array([True, False, True])
    dirty = [jnp.array([a, never, b]) for a, b in ((-1.0, -2.0), (-1.5, -1.0))]
    clean = [jnp.array([a, b]) for a, b in ((-1.0, -2.0), (-1.5, -1.0))]
    value, grad = jax.value_and_grad(estimator)(*dirty, where)
    np.testing.assert_allclose(value, estimator(*clean), rtol=1e-6)
    assert np.isfinite(grad).all()
    assert grad[1] == 0
    assert estimator(*dirty, jnp.zeros(3, bool)) == 0
