"""Padded buckets and steps in pieces: the same step as the whole batch, and few programs."""

import jax
import numpy as np
import optax
import pytest

from lever_jax.batches import MOST_PADDING, Batches, bucket_sizes
from lever_jax.compilations import count_compilations
from lever_jax.training import GroupBatch, LossConfig, init_state, make_optimizer, make_step


def ragged(sizes, seed=0, rows=12, candidates=8):
    """Groups of the given sizes, with one flat group among them."""
    rng = np.random.default_rng(seed)
    count, width = len(sizes), max(sizes)
    pointers = np.zeros((count, width, 2), np.int32)
    mask = np.arange(width) < np.array(sizes)[:, None]
    for i, j in zip(*np.nonzero(mask)):
        pointers[i, j] = rng.permutation(candidates)[:2]
    rewards = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    rewards[1] = 0.5
    behaviour = np.where(mask, rng.normal(-4, 0.1, mask.shape), 0).astype(np.float32)
    owners = (np.arange(count) % rows).astype(np.int32)
    return GroupBatch(owners, pointers, rewards, behaviour, mask)


SIZES = [2, 3, 3, 5, 2, 30, 4, 9, 3, 2, 17, 6]


def members(batch):
    """Each group of a batch as (query row, its pointers and rewards), without padding."""
    return {
        (int(row), pointers[mask].tobytes(), rewards[mask].tobytes())
        for row, pointers, rewards, mask in zip(
            batch.query_rows, batch.pointers, batch.rewards, batch.mask
        )
        if mask.any()
    }


def test_bucket_sizes_are_powers_of_two_and_the_largest():
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(4) == (4,)
    assert bucket_sizes(5) == (4, 5)
    assert bucket_sizes(30) == (4, 8, 16, 30)
    assert bucket_sizes(32) == (4, 8, 16, 32)


def test_every_group_is_in_one_piece_and_none_is_cut():
    groups = ragged(SIZES)
    batches = Batches(groups, 5, pieces=2)
    for epoch in range(3):
        steps = list(batches.epoch((0, epoch)))
        assert len(steps) == len(batches) == 3
        found = [group for step in steps for piece in step for group in members(piece)]
        assert len(found) == 12
        assert set(found) == members(groups)
        assert all(len(piece.mask) == 3 for step in steps for piece in step)
    again = list(batches.epoch((0, 2)))
    assert [p.query_rows.tolist() for s in again for p in s] == [
        p.query_rows.tolist() for s in steps for p in s
    ]


def test_which_groups_share_a_step_does_not_depend_on_their_sizes():
    one, other = ragged(SIZES), ragged(SIZES[::-1])

    def rows(groups, pieces):
        batches = Batches(groups, 5, pieces=pieces)
        return [
            {int(r) for piece in step for r, m in zip(piece.query_rows, piece.mask) if m.any()}
            for step in batches.epoch((3,))
        ]

    assert rows(one, 1) == rows(one, 4) == rows(other, 2)


def test_padding_is_saved_and_later_epochs_use_the_sizes_of_the_first():
    rng = np.random.default_rng(0)
    sizes = np.minimum(2 + rng.geometric(0.15, 200), 60).tolist()
    groups = ragged(sizes, rows=200)
    batches = Batches(groups, 20)
    assert batches.pieces > 1
    assert batches.padding(batches.pieces) < 0.6 * batches.padding(1)

    def shapes(epoch):
        return {piece.pointers.shape for step in batches.epoch((0, epoch)) for piece in step}

    first = shapes(0)
    assert len(first) > 1
    assert all(shapes(epoch) <= first for epoch in range(1, 30))


def test_groups_of_nearly_one_size_are_one_program():
    groups = ragged([8, 7, 8, 6, 8, 8, 7, 8])
    batches = Batches(groups, 4)
    assert batches.padding(1) <= MOST_PADDING
    assert batches.pieces == 1
    assert {p.mask.shape for s in batches.epoch((0,)) for p in s} == {(4, 8)}
    ragged_ones = Batches(ragged(SIZES), 4, one_size=True)
    assert {p.mask.shape for s in ragged_ones.epoch((0,)) for p in s} == {(4, 30)}


def test_devices_get_equally_many_groups():
    batches = Batches(ragged(SIZES), 5, pieces=2, devices=2)
    assert {len(p.mask) for s in batches.epoch((0,)) for p in s} == {4}


@pytest.fixture
def world(make_world):
    return make_world()


def moved(step, params, reference, table, batch):
    """Gradient of a step, and its metrics: plain descent of rate 1 moves by it."""
    state, metrics = step(init_state(params, optax.sgd(1.0)), reference, table, batch)
    return jax.tree.map(lambda a, b: np.asarray(a - b), params, state.params), metrics


def alone(groups, row):
    """One group as a batch, without padding."""
    size = groups.mask[row].sum()
    return GroupBatch(
        groups.query_rows[row : row + 1], *(x[row : row + 1, :size] for x in groups[1:5])
    )


@pytest.mark.parametrize("kind", ["rce", "grpo"])
def test_a_step_in_padded_pieces_is_the_sum_over_its_queries(world, kind):
    groups, table = ragged([3, 9, 3, 3, 9, 3, 3]), world.queries.table
    other = jax.tree.map(lambda x: x * 1.1, world.params)

    def step(kl_coef):
        return make_step(kind, world.policy, optax.sgd(1.0), LossConfig(kl_coef=kl_coef))

    coefs = (0.0, 0.5) if kind == "grpo" else (0.0,)
    single = {coef: step(coef) for coef in coefs}
    wanted = jax.tree.map(np.zeros_like, world.params)
    for row in range(7):
        grads = [moved(single[c], world.params, other, table, alone(groups, row))[0] for c in coefs]
        # Six groups count: one is flat. The penalty is of all seven.
        loss, kl = grads[0], jax.tree.map(lambda a, b: b - a, grads[0], grads[-1])
        wanted = jax.tree.map(lambda w, a, b: w + a / 6 + b / 7, wanted, loss, kl)
    batches = Batches(groups, 7, pieces=3)
    (pieces,) = batches.epoch((0,))
    assert [p.mask.shape for p in pieces] == [(3, 9), (3, 4), (3, 4)]
    in_pieces = step(coefs[-1])
    grads, metrics = moved(in_pieces, world.params, other, table, pieces)
    whole, of_whole = moved(in_pieces, world.params, other, table, groups)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    for leaf, one, two in zip(*map(jax.tree.leaves, (wanted, grads, whole))):
        np.testing.assert_allclose(one, leaf, atol=1e-5 * largest)
        np.testing.assert_allclose(two, leaf, atol=1e-5 * largest)
    assert metrics.keys() == of_whole.keys()
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(of_whole[name]), rel=1e-4, abs=1e-6), name
    assert float(metrics["groups"]) == 7
    assert float(metrics["flat_share"]) == pytest.approx(1 / 7)


def test_nothing_is_compiled_after_the_first_epoch(world):
    rng = np.random.default_rng(1)
    groups = ragged((1 + rng.geometric(0.3, 24)).tolist())
    optimizer = make_optimizer(1e-3, steps=12)
    step = make_step("rce", world.policy, optimizer, LossConfig(), ema=0.9)
    state = init_state(world.params, optimizer, averaged=True)
    batches, programs = Batches(groups, 8, pieces=2), []
    with count_compilations() as compiled:
        for epoch in range(5):
            for batch in batches.epoch((0, epoch)):
                state, _ = step(state, world.params, world.queries.table, batch)
            programs.append((step.programs(), compiled()))
    assert programs[0][0] > 2  # several sizes
    assert programs[0][1] > 0  # the counter counts
    assert set(programs) == {programs[0]}


def test_drawing_compiles_once_for_any_number_of_queries(world):
    with count_compilations() as compiled:
        counts = []
        for number, queries in enumerate((12, 5, 1, 9)):
            world.proposer.on_policy(
                world.params, jax.random.fold_in(jax.random.key(0), number),
                np.arange(queries), shots=2, num=3,
            )  # fmt: skip
            counts.append(compiled())
    assert counts[0] > 0
    assert set(counts) == {counts[0]}
