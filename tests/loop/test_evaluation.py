"""Evaluation over the fake VLM, whose accuracies are known by hand."""

import itertools

import numpy as np
import pytest
from fake import FakeEnvironment, worth
from small_world import PARTS

from lever_jax.evaluation import EvaluationConfig, baseline_picks, evaluate, gap_closed


def run(world, **options):
    config = EvaluationConfig(shots=(1, 2), random_seeds=2, oracle_beam=8, **options)
    return evaluate(
        world.queries, PARTS, {"selector_rce": world.params}, world.proposer, world.service, config
    )


def test_accuracies_are_those_of_the_picks(make_world):
    world = make_world()
    result = run(world)
    assert (result["n"], result["metric"]) == (12, "normalized")
    for shots in (1, 2):
        rows = result["shots"][str(shots)]
        picks = baseline_picks(world.queries, PARTS, shots, EvaluationConfig(random_seeds=2))
        picks["selector_rce"] = [world.proposer.greedy(world.params, np.arange(12), shots=shots)]
        for name, pointers in picks.items():
            expected = np.mean(
                [
                    [
                        worth(q, pool[p]) >= 0.6
                        for q, pool, p in zip(world.queries.query_ids, world.queries.pool_ids, ps)
                    ]
                    for ps in pointers
                ]
            )
            assert rows[name]["accuracy"] == pytest.approx(expected)
            assert rows[name]["n"] == 12
            low, high = rows[name]["ci95"]
            assert 0 <= low <= rows[name]["accuracy"] <= high <= 1
        best = [
            max(worth(q, pool[list(p)]) for p in itertools.permutations(range(8), shots)) >= 0.6
            for q, pool in zip(world.queries.query_ids, world.queries.pool_ids)
        ]
        assert rows["oracle_in_pool"]["accuracy"] == pytest.approx(np.mean(best))
        assert rows["zero_shot"]["accuracy"] == 0.0


def test_similarity_picks_put_the_most_similar_last(make_world):
    world = make_world()
    picks = baseline_picks(world.queries, PARTS, 3, EvaluationConfig())
    # Pools are ordered by the joint similarity, so its picks are the first three, reversed.
    assert (picks["similarity_joint"][0] == [2, 1, 0]).all()
    for pointers in itertools.chain(*picks.values()):
        assert pointers.shape == (12, 3)
        assert all(len(set(p)) == 3 for p in pointers.tolist())


def test_random_picks_follow_the_query_not_the_batch(make_world):
    world = make_world()
    picks = baseline_picks(world.queries, PARTS, 2, EvaluationConfig())["random"]
    again = baseline_picks(world.queries, PARTS, 2, EvaluationConfig())["random"]
    assert all((a == b).all() for a, b in zip(picks, again))
    assert (picks[0] != picks[1]).any()


def test_failed_queries_are_left_out_not_counted_wrong(make_world):
    world = make_world(environment=FakeEnvironment(failing={1000, 1005}))
    rows = run(world)["shots"]["2"]
    assert all(row["n"] == 10 for row in rows.values())


def test_paired_rows_compare_the_same_queries(make_world):
    world = make_world()
    result = run(world)
    for row in result["paired"]:
        table = result["shots"][str(row["shots"])]
        expected = table[row["a"]]["accuracy"] - table[row["b"]]["accuracy"]
        assert row["diff"] == pytest.approx(expected)
        assert row["ci95"][0] <= row["diff"] <= row["ci95"][1]


def test_gap_closed_by_hand():
    similar = {"similarity_image": 0.4, "similarity_question": 0.2, "similarity_joint": 0.5}
    table = {name: {"accuracy": value} for name, value in similar.items()}
    table |= {"oracle_in_pool": {"accuracy": 0.9}, "selector_grpo": {"accuracy": 0.8}}
    assert gap_closed(table, "selector_grpo") == pytest.approx((0.8 - 0.5) / (0.9 - 0.5))
    table["oracle_in_pool"]["accuracy"] = 0.5
    assert gap_closed(table, "selector_grpo") is None
    del table["oracle_in_pool"]
    assert gap_closed(table, "selector_grpo") is None
