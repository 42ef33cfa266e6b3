"""Imported pointers: what fits a run, what is refused, and the groups they become."""

import json

import numpy as np
import pytest

from lever_jax.errors import InputError
from lever_jax.imported import (
    RunExamples,
    fit_to_run,
    imported_groups,
    imported_targets,
    join,
    pooled,
)
from lever_jax.mining import RewardConfig
from lever_jax.rl_json import read_rl_json

REWARD = RewardConfig("hard_plus_soft")


def run_of(world, *, pools=True, broken=frozenset()):
    """The small world as `fit_to_run` sees it; its query 1000 + i is on the picture q1000 + i."""
    queries = world.queries
    row_of = {query_id: row for row, query_id in enumerate(queries.query_ids.tolist())}
    bank = dict(zip(world.bank.ids.tolist(), world.bank.images, strict=True))
    return RunExamples(
        queries={i: (f"q{i}", f"What is {i}?") for i in row_of},
        held_out=frozenset({2000}),
        bank={**bank, 99: "q1003"},
        pools=(lambda i: queries.pool_ids[row_of[i]].tolist()) if pools else None,
        broken=broken,
    )


def entries(tmp_path, queries, **options):
    """Query id -> (pool or None, candidates[, question]), through a file."""
    content = {}
    for key, (pool, candidates, *question) in queries.items():
        content[str(key)] = {"pointer_candidates": candidates}
        if pool is not None:
            content[str(key)]["candidate_pool_ids"] = pool
        if question:
            content[str(key)]["query"] = {"question": question[0]}
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(content))
    return read_rl_json(path, pointers="global", unlabelled=True, **options)[1]


def fitted(world, tmp_path, queries, *, partial=False, shots=2, pools=True, broken=frozenset()):
    return fit_to_run(
        entries(tmp_path, queries),
        run_of(world, pools=pools, broken=broken),
        shots=shots,
        partial=partial,
        place="theirs.json",
    )


def one(*pointer, **labels):
    return {"pointer": list(pointer), **labels}


def test_a_query_brings_its_own_pool(make_world, tmp_path):
    world = make_world()
    queries = {
        1004: ([5, 3, 30], [one(30, 5, vqa_acc_score=1.0), one(3, 5, vqa_acc_score=0.0)]),
        1001: (None, [one(*world.queries.pool_ids[1][[6, 2]], vqa_acc_score=0.6)]),
    }
    queries[1001][1][0]["pointer"] = [int(i) for i in queries[1001][1][0]["pointer"]]
    data = fitted(world, tmp_path, queries)
    assert data.left_out == {}
    own = pooled(data, world.queries, world.bank)
    assert own.query_ids.tolist() == [1004, 1001]
    assert own.pool_ids[0].tolist() == [5, 3, 30, -1, -1, -1, -1, -1]
    assert own.pool_ids[1].tolist() == world.queries.pool_ids[1].tolist()
    query, pool = own.table.read(np.array([0, 1]))
    table = world.queries.table
    np.testing.assert_array_equal(query, np.asarray(table.queries)[[4, 1]])
    np.testing.assert_array_equal(pool.embeddings[0, :3], world.bank.embeddings[[5, 3, 30]])
    assert pool.mask.sum(axis=1).tolist() == [3, 8]
    groups = imported_groups(data, own, REWARD)
    assert groups.query_rows.tolist() == [0, 1]
    assert groups.pointers.tolist() == [[[2, 0], [1, 0]], [[6, 2], [0, 0]]]
    assert groups.mask.tolist() == [[True, True], [True, False]]
    # hard_plus_soft: 2 * [accuracy > 0] + accuracy.
    np.testing.assert_allclose(groups.rewards, [[3.0, 0.0], [2.6, 0.0]])


MISFITS = {
    "evaluation queries": ({2000: ([1, 2], [one(1, 2)])}, "query 2000: it is an evaluation query"),
    "queries of other data": ({7: ([1, 2], [one(1, 2)])}, "query 7: .* raise --num_queries"),
    "candidates not in the bank": ({1001: ([1, 2, 77], [one(1, 2)])}, "demonstration 77 of its"),
    "candidates on the query's own image": (
        {1003: ([1, 2, 99], [one(1, 2)])},
        "demonstration 99 of its pool shows the query's own image",
    ),
    "pointers of another length": (
        {1001: ([1, 2], [one(1), one(1, 2)])},
        r"pointer \[1\] has 1 demonstrations and this run trains with 2: set --train_shots",
    ),
    "pointers outside of their pool": (
        {1003: (None, [one(99, 1)])},
        r"demonstration 99 of pointer \[99, 1\] is not in",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_refused_or_counted(make_world, tmp_path, kind):
    world = make_world()
    queries, message = MISFITS[kind]
    good = {1002: ([10, 11], [one(11, 10)])}
    for pools in (True, False):
        with pytest.raises(InputError, match=message) as caught:
            fitted(world, tmp_path, {**queries, **good}, pools=pools)
        assert "theirs.json, query" in str(caught.value)
        assert "--import_partial" in str(caught.value)
    data = fitted(world, tmp_path, {**queries, **good}, partial=True)
    assert data.left_out == {kind: 1}
    # A candidate or a pointer less leaves the query; a query less does not.
    whole = kind.startswith(("candidates", "pointers of another length"))
    expected = [*queries, 1002] if whole else [1002]
    assert data.queries.tolist() == expected
    assert data.query_ids.tolist() == expected


def test_a_dropped_candidate_takes_its_pointers_along(make_world, tmp_path):
    world = make_world()
    queries = {1003: ([1, 99, 77, 2], [one(99, 1), one(2, 1), one(1, 77)])}
    data = fitted(world, tmp_path, queries, partial=True)
    assert data.pools == [(1, 2)]
    assert data.pointers.tolist() == [[2, 1]]
    assert data.left_out["pointers outside of their pool"] == 2


@pytest.mark.parametrize("partial", [False, True])
def test_what_has_a_broken_image_is_left_out_and_counted(make_world, tmp_path, partial):
    world = make_world()
    image_of = dict(zip(world.bank.ids.tolist(), world.bank.images, strict=True))
    broken = frozenset({image_of[5], "q1001"})
    queries = {
        1001: ([1, 2], [one(1, 2)]),
        1002: ([5, 3, 2], [one(5, 3), one(3, 2)]),
        1004: ([5, 3], [one(3, 5)]),
    }
    data = fitted(world, tmp_path, queries, partial=partial, broken=broken)
    assert data.queries.tolist() == [1002]
    assert (data.pools, data.pointers.tolist()) == ([(3, 2)], [[3, 2]])
    assert data.left_out == {
        "queries whose image cannot be read": 1,
        "candidates whose image cannot be read": 2,
        "pointers with an image that cannot be read": 2,
    }


def test_another_question_under_the_same_id_is_always_refused(make_world, tmp_path):
    world = make_world()
    same = {1001: ([1, 2], [one(1, 2)], "  what IS 1001? ")}
    assert len(fitted(world, tmp_path, same).queries) == 1
    other = {1001: ([1, 2], [one(1, 2)], "What colour?")}
    for partial in (False, True):
        with pytest.raises(InputError, match=r"query 1001: its question is 'What colour\?'"):
            fitted(world, tmp_path, other, partial=partial)


def test_failures_and_repeats_are_counted_and_never_trained_on(make_world, tmp_path):
    world = make_world()
    pointers = [
        one(1, 2, vqa_acc_score=1.0),
        one(1, 2, vqa_acc_score=1.0),
        one(2, 1, eval_failed=True, vqa_acc_score=0.0),
        one(1, 3, vqa_acc_score=0.0, kept=False),
        one(3, 2, vqa_acc_score=0.0),
    ]
    data = fitted(world, tmp_path, {1001: ([1, 2, 3], pointers)})
    assert data.left_out == {
        "pointers that are there twice": 1,
        "pointers that could not be evaluated": 1,
    }
    own = pooled(data, world.queries, world.bank)
    groups = imported_groups(data, own, REWARD)
    assert groups.pointers[0][groups.mask[0]].tolist() == [[0, 1], [2, 1]]
    nothing = fitted(world, tmp_path, {1001: ([1, 2], [one(1, 2, eval_failed=True)])})
    assert (len(nothing.queries), nothing.pointers.shape) == (0, (0, 2))


def test_a_reward_that_needs_what_is_missing_is_refused(make_world, tmp_path):
    world = make_world()
    with_both = one(1, 2, vqa_acc_score=1.0, vqa_gt_prob=0.5)
    pointers = [with_both, one(2, 1, vqa_acc_score=0.3), one(1, 3, vqa_gt_prob=0.4)]
    data = fitted(world, tmp_path, {1001: ([1, 2, 3], pointers)})
    own = pooled(data, world.queries, world.bank)
    with pytest.raises(InputError, match="--reward_mode=hard01_plus_gtprob: 1 of 2 imported"):
        imported_groups(data, own, RewardConfig())
    groups = imported_groups(data, own, REWARD)  # The third was never answered.
    np.testing.assert_allclose(groups.rewards[groups.mask], [3.0, 2.3])
    # Only wrong answers are shaped by their similarity.
    shaped = RewardConfig("hard_only", similarity_weight=0.5)
    assert imported_groups(data, own, shaped).rewards[groups.mask].tolist() == [2.0, 2.0]
    wrong = fitted(world, tmp_path, {1001: ([1, 2], [one(1, 2, vqa_acc_score=0)])})
    with pytest.raises(InputError, match=r"1 of 1 .* not the gt_prob and similarity"):
        imported_groups(wrong, pooled(wrong, world.queries, world.bank), shaped)
    beams = fitted(world, tmp_path, {1001: ([1, 2], [one(1, 2, beam_score=1)])})
    with pytest.raises(InputError, match="no imported pointer has a vqa_acc_score"):
        imported_groups(beams, pooled(beams, world.queries, world.bank), REWARD)


def targets(world, tmp_path, pointers, count=2):
    data = fitted(world, tmp_path, {1001: ([1, 2, 3], pointers)})
    groups = imported_targets(data, pooled(data, world.queries, world.bank), count)
    found = groups.pointers[groups.mask].tolist(), groups.rewards[groups.mask].tolist()
    return sorted(zip(*found, strict=True))


def test_targets_weigh_what_the_file_says_of_them(make_world, tmp_path):
    world = make_world()

    def pointers(*labels):
        return [one(*p, **label) for p, label in zip([(1, 2), (2, 1), (3, 1)], labels, strict=True)]

    both = [{"vqa_gt_prob": g, "vqa_acc_score": 1 - g} for g in (0.25, 0.5, 0.75)]
    assert targets(world, tmp_path, pointers(*both)) == [([1, 0], 0.5), ([2, 0], 0.75)]
    accuracy = [{"vqa_acc_score": a} for a in (0.5, 0.0, 1.0)]
    assert targets(world, tmp_path, pointers(*accuracy)) == [([0, 1], 0.5), ([2, 0], 1.0)]
    assert targets(world, tmp_path, pointers(*accuracy), 1) == [([2, 0], 1.0)]
    # A tie goes to the better place in the beam.
    tied = [{"vqa_acc_score": 1.0, "beam_score": s} for s in (1.0, 3.0, 2.0)]
    assert targets(world, tmp_path, pointers(*tied), 1) == [([1, 0], 1.0)]
    # Beams say an order, and nothing of how good.
    beams = [{"logprob_score": s} for s in (-3.0, -1.0, -2.0)]
    assert targets(world, tmp_path, pointers(*beams)) == [([1, 0], 1.0), ([2, 0], 1.0)]
    bare = [{}, {}, {}]
    assert targets(world, tmp_path, pointers(*bare)) == [([0, 1], 1.0), ([1, 0], 1.0)]
    assert targets(world, tmp_path, pointers(*[{"vqa_acc_score": 0.0}] * 3)) == []
    with pytest.raises(InputError, match="query 1001: some of its pointers have a vqa_gt_prob or"):
        targets(world, tmp_path, pointers({"vqa_gt_prob": 0.5}, {"vqa_acc_score": 1.0}, {}))
    with pytest.raises(InputError, match="some of its pointers have a beam_score or logprob_score"):
        targets(world, tmp_path, pointers({"beam_score": 0.5}, {}, {}))


def test_joined_groups_show_each_query_its_own_demonstrations(make_world, tmp_path):
    world = make_world()
    rng = np.random.default_rng()

    def random_queries(ids, size, number):
        made = {}
        for query_id in ids:
            pool = rng.permutation(40)[:size].tolist()
            drawn = {tuple(rng.permutation(pool)[:2].tolist()): rng.random() for _ in range(number)}
            made[query_id] = (pool, [one(*p, vqa_acc_score=r) for p, r in drawn.items()])
        return made

    # Pools and groups of different sizes, and queries that are in both sets.
    made = [random_queries(range(1000, 1006), 5, 4), random_queries(range(1003, 1009), 11, 9)]
    sets = []
    for queries in made:
        data = fitted(world, tmp_path, queries)
        own = pooled(data, world.queries, world.bank)
        sets.append((imported_groups(data, own, REWARD), own.table))
    groups, table = join(*sets)
    query, pool = table.read(groups.query_rows)
    expected = [(i, *queries[i]) for queries in made for i in queries]
    assert len(groups.query_rows) == len(expected) == 12
    for row, (query_id, candidates, pointers) in enumerate(expected):
        np.testing.assert_array_equal(query[row], world.queries.table.queries[query_id - 1000])
        seen = np.asarray(pool.embeddings[row])[np.asarray(pool.mask[row])]
        np.testing.assert_array_equal(seen, world.bank.embeddings[candidates])
        mask = groups.mask[row]
        assert mask.sum() == len(pointers)
        for actions, reward, pointer in zip(
            groups.pointers[row][mask], groups.rewards[row][mask], pointers, strict=True
        ):
            assert [candidates[action] for action in actions] == pointer["pointer"]
            assert reward == pytest.approx(2 + pointer["vqa_acc_score"], rel=1e-6)
    assert int(table.query_ids[groups.query_rows[-1]]) == 1008
