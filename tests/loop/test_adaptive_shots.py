"""A policy that stops in the loop: targets, groups, rewards, training and evaluation; dropout."""

import itertools

import jax
import numpy as np
import pytest
from fake import worth
from small_world import PARTS, World

from experiments.torch_selector import from_flax
from lever_jax.decoding import other_orders
from lever_jax.errors import InputError
from lever_jax.evaluation import EvaluationConfig, evaluate
from lever_jax.mining import (
    MiningConfig,
    RewardConfig,
    group_batch,
    mine,
    mined_candidates,
    mined_groups,
)
from lever_jax.on_policy import draw, judge
from lever_jax.search import search_pools, search_targets
from lever_jax.selector import SelectorConfig, make_selector
from lever_jax.training import (
    GroupBatch,
    LossConfig,
    init_state,
    make_log_probs,
    make_optimizer,
    make_step,
)

CONFIG = MiningConfig(
    proposals=30,
    quotas={"beam": 6, "sample": 6, "retrieval": 2, "random": 8, "local_search": 6},
    verify_best=8,
    verify_low=4,
    verify_uniform=2,
    batch=5,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"), stop=True)
    yield world
    world.store.close()


def gt_prob(world, row, pointer):
    pool = world.queries.pool_ids[row]
    return np.float32(worth(world.queries.query_ids[row], pool[[a for a in pointer if a >= 0]]))


def lengths(pointers):
    return (np.asarray(pointers) >= 0).sum(-1)


def test_targets_of_all_lengths_with_their_own_worth_the_shorter_first(world):
    rows = np.array([0, 4])
    found = search_pools(
        world.queries, rows, world.service, shots=2, beam=8, label="x", shorter=True
    )
    every = [(a, -1) for a in range(8)] + list(itertools.permutations(range(8), 2))
    for row, (pointers, values) in zip(rows, found):
        assert sorted(map(tuple, pointers.tolist())) == sorted(every)
        assert values.tolist() == [gt_prob(world, row, p) for p in pointers]
        order = list(zip((-values).tolist(), lengths(pointers).tolist()))
        assert order == sorted(order)
    targets = search_targets(rows, found, 4, shots=2)
    for (pointers, values), kept, weights in zip(found, targets.pointers, targets.rewards):
        np.testing.assert_array_equal(kept, pointers[:4])
        np.testing.assert_array_equal(weights, values[:4])
    assert search_targets(rows, found, 1, shots=2).pointers.shape == (2, 1, 2)  # the best one only


def test_mined_and_on_policy_pointers_of_all_lengths_are_the_vlms_own(world):
    mine("mine", world.queries, world.proposer, world.params, jax.random.key(1), world.service,
         CONFIG, shots=2)  # fmt: skip
    reward = RewardConfig(shot_cost=0.25)
    mined = mined_groups("mine", world.queries, world.store, reward)
    rolled = draw(
        world.proposer, world.params, jax.random.key(2), np.arange(12), shots=2, group_size=16
    )
    drawn, scores = judge(
        world.queries, rolled, world.service, reward, verify="all", config=CONFIG, label="x"
    )
    assert np.isfinite(scores["reward"]).all()
    for groups in (mined, drawn):
        assert set(lengths(groups.pointers[groups.mask])) == {1, 2}
        for row, pointers, rewards, mask in zip(
            groups.query_rows, groups.pointers, groups.rewards, groups.mask
        ):
            for pointer, value in zip(pointers[mask], rewards[mask]):
                g = gt_prob(world, row, pointer)
                wanted = 2.0 * (g >= 0.6) + g - 0.25 * lengths(pointer)
                np.testing.assert_allclose(value, wanted, atol=1e-5)

    read = make_log_probs(world.policy)
    again = np.asarray(read(world.params, world.queries.table, drawn))
    np.testing.assert_allclose(again[drawn.mask], drawn.behaviour_log_probs[drawn.mask], atol=1e-5)
    candidates = mined_candidates("mine", world.queries, world.store, reward, CONFIG)
    np.testing.assert_array_equal(lengths(candidates.position), lengths(candidates.pointer))


def test_an_id_outside_the_pool_is_refused_and_padding_is_not_one(world):
    queries = world.queries
    inside, outside = queries.pool_ids[0][0], np.setdiff1d(np.arange(40), queries.pool_ids[0])[0]
    ids = np.array([[inside, -1]])
    batch = group_batch(queries, queries.query_ids[:1], ids, np.ones(1), np.zeros(1))
    assert batch.pointers.tolist() == [[[0, -1]]]
    ids = np.array([[inside, outside]])
    with pytest.raises(InputError, match="outside its candidate pool"):
        group_batch(queries, queries.query_ids[:1], ids, np.ones(1), np.zeros(1))


def test_it_learns_from_real_labels_where_one_demonstration_is_enough(world):
    """Even queries: one demonstration is the target; odd ones: two. The picks follow."""
    pointers = np.array([[[1, -1]] if row % 2 == 0 else [[1, 2]] for row in range(12)], np.int32)
    ones = np.ones((12, 1), np.float32)
    groups = GroupBatch(np.arange(12, dtype=np.int32), pointers, ones, 0 * ones, ones > 0)
    optimizer = make_optimizer(3e-3, steps=150)
    step = make_step("supervised", world.policy, optimizer, LossConfig())
    state = init_state(world.params, optimizer)
    for _ in range(150):
        state, metrics = step(state, world.params, world.queries.table, groups)
    picks = world.proposer.greedy(state.params, np.arange(12), shots=2)
    assert np.isfinite(metrics["grad_norm"])
    assert (lengths(picks) == np.where(np.arange(12) % 2 == 0, 1, 2)).all()
    # An evaluation of these picks says how many demonstrations they showed.
    config = EvaluationConfig(shots=(1, 2), random_seeds=1, oracle_beam=8, decodings=("greedy",))
    result = evaluate(
        world.queries, PARTS, {"selector_x": state.params}, world.proposer, world.service, config
    )
    shown = [result["shots"][shots]["selector_x"]["mean_shots"] for shots in ("1", "2")]
    assert shown == [1.0, 1.5]
    assert "mean_shots" not in result["shots"]["2"]["similarity_image"]
    right = [gt_prob(world, row, pick) >= 0.6 for row, pick in enumerate(picks)]
    assert result["shots"]["2"]["selector_x"]["accuracy"] == pytest.approx(np.mean(right))


def test_other_orders_leave_the_end_where_it_is():
    pointers = np.array([[4, 2, -1], [3, -1, -1], [0, 1, 2], [-1, -1, -1]], np.int32)
    for order in other_orders(pointers, np.arange(4), draws=3, seed=0):
        assert order[0].tolist() == [2, 4, -1]
        assert order[1].tolist() == [3, -1, -1]
        assert order[3].tolist() == [-1, -1, -1]
        assert sorted(order[2].tolist()) == [0, 1, 2]
        assert order[2].tolist() != [0, 1, 2]


@pytest.mark.parametrize("kind", ["supervised", "rce", "grpo"])
def test_dropout_is_in_supervised_and_rce_steps_only(world, kind):
    results = {}
    rows = np.arange(12, dtype=np.int32)
    pointers = np.tile(np.array([[0, 1], [3, 2]], np.int32), (12, 1, 1))
    rewards = np.tile(np.array([1.0, 0.2], np.float32), (12, 1))
    for dropout in (0.0, 0.4):
        init, policy = make_selector(SelectorConfig(width=16, dropout=dropout), PARTS, 14)
        groups = GroupBatch(rows, pointers, rewards, 0 * rewards - 3.0, rewards > 0)
        optimizer = make_optimizer(1e-3, steps=10)
        step = make_step(kind, policy, optimizer, LossConfig())
        params = jax.jit(init)(jax.random.key(0))
        state, losses = init_state(params, optimizer), []
        for _ in range(2):
            state, metrics = step(state, params, world.queries.table, groups)
            losses.append(float(metrics["loss"]))
            assert np.isfinite(metrics["grad_norm"])
        results[dropout] = losses
    if kind == "grpo":
        assert results[0.0] == results[0.4]
    else:
        assert abs(results[0.0][0] - results[0.4][0]) > 1e-4


def test_the_torch_port_refuses_options():
    for options in ({"history": "gate"}, {"stop": True}, {"dropout": 0.1}):
        name = next(iter(options))
        with pytest.raises(InputError, match=f"default options only, not {name}="):
            from_flax(SelectorConfig(**options), PARTS, {})
