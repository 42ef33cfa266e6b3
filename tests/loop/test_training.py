"""The jitted steps: they learn, they ignore padding, and the policy that sampled is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lever_jax.batches import Batches
from lever_jax.training import (
    GroupBatch,
    LossConfig,
    init_state,
    make_log_probs,
    make_optimizer,
    make_step,
)


def random_groups(world, seed=0, count=12, group=6, shots=2):
    rng = np.random.default_rng(seed)
    pointers = np.stack(
        [[rng.permutation(8)[:shots] for _ in range(group)] for _ in range(count)]
    ).astype(np.int32)
    # A rule the selector can learn: low actions are good.
    rewards = -pointers.sum(-1).astype(np.float32)
    mask = rng.random((count, group)) < 0.8
    mask[:, :2] = True
    return GroupBatch(
        np.arange(count, dtype=np.int32), pointers, rewards, np.zeros_like(rewards), mask
    )


def with_behaviour(world, params, groups):
    log_probs = log_probs_of_groups(world.policy)(params, world.queries.table, groups)
    return groups._replace(behaviour_log_probs=np.asarray(log_probs))


log_probs_of_groups = functools.cache(make_log_probs)


@pytest.mark.parametrize(("kind", "least"), [("supervised", 0.5), ("rce", 0.5), ("grpo", 0.1)])
def test_steps_move_probability_to_what_is_rewarded(make_world, kind, least):
    world = make_world()
    groups = with_behaviour(world, world.params, random_groups(world))
    before = groups.behaviour_log_probs
    if kind == "supervised":
        groups = groups._replace(rewards=np.exp(groups.rewards))
    optimizer = make_optimizer(3e-3, steps=60)
    step = make_step(kind, world.policy, optimizer, LossConfig(kl_coef=0.0))
    state = init_state(world.params, optimizer)
    for _ in range(60):
        state, metrics = step(state, world.params, world.queries.table, groups)
    assert int(state.step) == 60
    gain = with_behaviour(world, state.params, groups).behaviour_log_probs - before
    every = np.arange(len(gain))
    best = np.where(groups.mask, groups.rewards, -np.inf).argmax(1)
    worst = np.where(groups.mask, groups.rewards, np.inf).argmin(1)
    assert gain[every, best].mean() > least
    assert gain[every, worst].mean() < gain[every, best].mean() - least
    if kind == "grpo":
        assert float(metrics["clip_share"]) > 0  # what moved far enough moves no further


def test_padding_changes_nothing(make_world):
    world = make_world()
    groups = with_behaviour(world, world.params, random_groups(world))
    optimizer = make_optimizer(1e-3, steps=10)
    for kind in ("supervised", "rce", "grpo"):
        weights = (
            groups._replace(rewards=np.exp(groups.rewards)) if kind == "supervised" else groups
        )
        step = make_step(kind, world.policy, optimizer, LossConfig())
        results = []
        for pad in (0, 5):
            padded = GroupBatch(
                *(
                    x if x is None else np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
                    for x in weights
                )
            )
            state, metrics = step(
                init_state(world.params, optimizer), world.params, world.queries.table, padded
            )
            results.append((state.params, metrics))
        (params, metrics), (padded_params, padded_metrics) = results
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(padded_params)):
            # A first step of Adam moves every weight by 1e-4, whatever its gradient; those whose
            # gradient is only rounding may move otherwise.
            np.testing.assert_allclose(a, b, atol=1e-5)
        assert metrics["groups"] == padded_metrics["groups"] == 12
        assert float(metrics["loss"]) == pytest.approx(float(padded_metrics["loss"]), abs=1e-5)


def test_on_policy_groups_show_no_drift_and_a_reference_of_itself_no_kl(make_world):
    world = make_world()
    groups = with_behaviour(world, world.params, random_groups(world))
    optimizer = make_optimizer(1e-3, steps=10)
    step = make_step("grpo", world.policy, optimizer, LossConfig())
    state, metrics = step(
        init_state(world.params, optimizer), world.params, world.queries.table, groups
    )
    assert float(metrics["behaviour_drift"]) <= 1e-5
    assert float(metrics["ratio"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["kl"]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["clip_share"]) == 0.0
    _, metrics = step(state, world.params, world.queries.table, groups)
    assert float(metrics["behaviour_drift"]) > 1e-4
    assert float(metrics["kl"]) > 0.0


def test_flat_groups_are_dropped_and_counted(make_world):
    world = make_world()
    groups = with_behaviour(world, world.params, random_groups(world))
    groups.rewards[:9] = 1.0
    optimizer = make_optimizer(1e-3, steps=10)
    for kind in ("rce", "grpo"):
        step = make_step(kind, world.policy, optimizer, LossConfig())
        _, metrics = step(
            init_state(world.params, optimizer), world.params, world.queries.table, groups
        )
        assert float(metrics["flat_share"]) == pytest.approx(9 / 12)


def test_donation_deletes_the_old_state_and_leaves_the_starting_parameters_alone(make_world):
    world = make_world()
    groups = with_behaviour(world, world.params, random_groups(world))
    optimizer = make_optimizer(1e-3, steps=10)
    step = make_step("grpo", world.policy, optimizer, LossConfig())
    state = init_state(world.params, optimizer)
    for batch in (groups, groups, [groups, groups]):
        old = state
        state, _ = step(state, world.params, world.queries.table, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt_state)))
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(world.params))


def test_the_average_is_that_of_all_steps_with_decaying_weights(make_world):
    world = make_world()
    groups = random_groups(world)
    # Adam would move weights whose gradient is only rounding as far as all others.
    optimizer = optax.sgd(0.1)
    step = make_step("rce", world.policy, optimizer, LossConfig(), ema=0.8)
    averaged = init_state(world.params, optimizer, averaged=True)
    plain, seen = init_state(world.params, optimizer), []
    for _ in range(4):
        averaged, _ = step(averaged, world.params, world.queries.table, groups)
        plain, _ = step(plain, world.params, world.queries.table, groups)
        seen.append(jax.tree.map(np.array, plain.params))
        for a, b in zip(jax.tree.leaves(averaged.params), jax.tree.leaves(plain.params)):
            np.testing.assert_allclose(a, b, atol=1e-6)  # the average trains nothing
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), seen[0], seen[-1])
    assert max(jax.tree.leaves(moved)) > 1e-2  # far more than the tolerance below
    weights = 0.8 ** np.arange(4)[::-1]
    wanted = jax.tree.map(lambda *x: np.average(x, axis=0, weights=weights), *seen)
    for a, b in zip(jax.tree.leaves(averaged.evaluated), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert plain.evaluated is plain.params


def test_a_phase_compiles_once(make_world):
    world = make_world()
    groups = with_behaviour(world, world.params, random_groups(world))
    optimizer = make_optimizer(1e-3, steps=10)
    step = make_step("rce", world.policy, optimizer, LossConfig())
    state = init_state(world.params, optimizer)
    batches = Batches(groups, 5)
    for epoch in range(3):
        for batch in batches.epoch((0, epoch)):
            state, _ = step(state, world.params, world.queries.table, batch)
    assert step.programs() == 1


def test_the_optimizer_warms_up_and_decays():
    optimizer = make_optimizer(1.0, steps=100, warmup=10, weight_decay=0.0)
    params = {"w": jnp.zeros(())}
    state = optimizer.init(params)
    sizes = []
    for _ in range(100):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        sizes.append(float(jnp.abs(updates["w"])))
    assert sizes[0] < sizes[9]
    assert max(sizes) == pytest.approx(1.0, abs=0.02)
    assert sizes[-1] < 0.15
