"""Evaluation over the fake VLM, whose accuracies are known by hand."""

import contextlib
import itertools

import numpy as np
import pytest
import scipy.stats
from fake import FakeEnvironment, worth
from progress import no_bar
from small_world import PARTS

from lever_jax.errors import InputError
from lever_jax.evaluation import EvaluationConfig, best_similarity, evaluate, gap_closed
from lever_jax.scoring import ScoringService
from lever_jax.store import Store

CONFIG = EvaluationConfig(shots=(1, 2), random_seeds=2, oracle_beam=8)


@pytest.fixture
def failing_service(tmp_path):
    """Makes a service over a VLM that fails on some queries."""
    with contextlib.ExitStack() as stack:

        def make(queries):
            store = stack.enter_context(Store.open(tmp_path / "failing.sqlite", {"model": "fake"}))
            return ScoringService(store, FakeEnvironment(failing=queries), no_bar)

        yield make


def run(world, config=CONFIG, selectors=("selector_rce",), service=None, **options):
    return evaluate(
        world.queries,
        PARTS,
        dict.fromkeys(selectors, world.params),
        world.proposer,
        service or world.service,
        config,
        **options,
    )


def right(world, pointers):
    """Whether the fake VLM answers each query [Q] right with the given pointers [Q, S]."""
    pools = zip(world.queries.query_ids, world.queries.pool_ids, pointers)
    return np.array([worth(q, pool[p]) >= 0.6 for q, pool, p in pools], float)


def test_accuracies_are_those_of_the_picks(world):
    result = run(world)
    assert (result["n"], result["metric"]) == (12, "normalized")
    for shots in (1, 2):
        rows = result["shots"][str(shots)]
        picks = CONFIG.baselines(world.queries, PARTS, shots)
        picks["selector_rce"] = [world.proposer.greedy(world.params, np.arange(12), shots=shots)]
        assert set(rows) == {*picks, "zero_shot", "oracle_in_pool"}
        for name, draws in picks.items():
            expected = np.mean([right(world, pointers) for pointers in draws])
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
        # All wrong is not certainly wrong: Wilson's interval of 0 of 12.
        wilson = scipy.stats.binomtest(0, 12).proportion_ci(method="wilson")
        assert rows["zero_shot"]["ci95"] == pytest.approx([wilson.low, wilson.high])


def test_most_similar_last_and_reversed(world):
    picks = CONFIG.baselines(world.queries, PARTS, 3)
    # Pools are ordered by the joint similarity, so its picks are the first three, reversed.
    assert (picks["similarity_joint"][0] == [2, 1, 0]).all()
    assert (picks["similarity_joint_reversed"][0] == [0, 1, 2]).all()
    for part in ("image", "question", "joint"):
        last_first = picks[f"similarity_{part}"][0][:, ::-1]
        assert (picks[f"similarity_{part}_reversed"][0] == last_first).all()
    for pointers in itertools.chain(*picks.values()):
        assert pointers.shape == (12, 3)
        assert all(len(set(p)) == 3 for p in pointers.tolist())


def test_random_picks_follow_the_query_not_the_batch(world):
    picks = CONFIG.baselines(world.queries, PARTS, 2)["random"]
    again = CONFIG.baselines(world.queries, PARTS, 2)["random"]
    assert all((a == b).all() for a, b in zip(picks, again))
    assert (picks[0] != picks[1]).any()


def test_spread_of_random_seeds(world):
    config = EvaluationConfig(shots=(2,), random_seeds=4, oracle_beam=0)
    row = run(world, config)["shots"]["2"]["random"]
    means = [right(world, p).mean() for p in config.baselines(world.queries, PARTS, 2)["random"]]
    assert row["seeds"]["count"] == 4
    assert row["seeds"]["min"] == pytest.approx(min(means))
    assert row["seeds"]["max"] == pytest.approx(max(means))
    assert row["seeds"]["sd"] == pytest.approx(np.std(means, ddof=1))
    assert row["accuracy"] == pytest.approx(np.mean(means))


def test_the_oracle_does_not_depend_on_what_is_evaluated_beside_it(world):
    narrow = EvaluationConfig(shots=(2,), oracle_beam=1)  # misses much, so picks could add to it
    none = run(world, narrow, selectors=())["shots"]["2"]
    both = run(world, narrow, selectors=("selector_rce", "selector_grpo"))["shots"]["2"]
    assert none["oracle_in_pool"] == both["oracle_in_pool"]
    better = [r["accuracy"] for name, r in none.items() if name.startswith(("simil", "mmr"))]
    assert none["oracle_in_pool"]["accuracy"] >= max(better)


def test_by_answer_type(world, failing_service):
    service = failing_service({1003})
    types = ["yes/no", "number", "yes/no", ""] * 3
    rows = run(world, service=service, answer_types=types)["shots"]["2"]
    hits = right(world, CONFIG.baselines(world.queries, PARTS, 2)["mmr"][0])
    found = rows["mmr"]["by_answer_type"]
    assert list(found) == ["yes/no", "number"]  # the most frequent first, the unlabelled nowhere
    assert found["yes/no"]["accuracy"] == pytest.approx(np.mean([hits[0::4], hits[2::4]]))
    assert found["number"]["accuracy"] == pytest.approx(np.mean(hits[1::4]))
    assert (found["yes/no"]["n"], found["number"]["n"], rows["mmr"]["n"]) == (6, 3, 11)
    assert all(one["ci95"][0] <= one["accuracy"] <= one["ci95"][1] for one in found.values())
    assert run(world)["shots"]["2"]["mmr"]["by_answer_type"] == {}


def test_failed_queries_are_left_out_not_counted_wrong(world, failing_service):
    service = failing_service({1000, 1005})
    rows = run(world, service=service)["shots"]["2"]
    assert all(row["n"] == 10 for row in rows.values())


def test_where_every_prompt_fails_nothing_is_known(world, failing_service):
    service = failing_service(set(range(1000, 1012)))
    result = run(world, service=service)
    for name, row in result["shots"]["1"].items():
        assert (row["accuracy"], row["ci95"], row["n"]) == (None, None, 0), name
    assert all(row["diff"] is None for row in result["paired"])


def test_paired_rows_compare_the_same_queries(world):
    result = run(world)
    for row in result["paired"]:
        table = result["shots"][str(row["shots"])]
        expected = table[row["a"]]["accuracy"] - table[row["b"]]["accuracy"]
        assert row["diff"] == pytest.approx(expected)
        assert row["ci95"][0] <= row["diff"] <= row["ci95"][1]


def test_reordered_prompts_are_compared_only_where_there_is_an_order(world):
    config = EvaluationConfig(shots=(1, 2), decodings=("greedy", "shuffled"), oracle_beam=0)
    pairs = {(row["a"], row["b"], row["shots"]) for row in run(world, config)["paired"]}
    assert ("selector_rce_shuffled", "selector_rce", 2) in pairs
    assert ("selector_rce_shuffled", "selector_rce", 1) not in pairs
    one = [pair for pair in pairs if pair[2] == 1]
    assert not [pair for pair in one if "reversed" in pair[0] + pair[1]]


def test_eight_shots(world):
    config = EvaluationConfig(shots=(8,), decodings=("greedy", "shuffled"), oracle_beam=1)
    rows = run(world, config)["shots"]["8"]
    assert all(row["n"] == 12 for row in rows.values())


def test_more_shots_than_candidates_are_refused(world):
    with pytest.raises(InputError, match=r"--shots=9 exceeds the 8 candidates.*--pool_size"):
        run(world, EvaluationConfig(shots=(2, 9)))


def test_gap_closed_by_hand():
    similar = {"similarity_image": 0.4, "similarity_question": 0.2, "similarity_joint": 0.5}
    table = {name: {"accuracy": value} for name, value in similar.items()}
    table |= {"oracle_in_pool": {"accuracy": 0.9}, "selector_grpo": {"accuracy": 0.8}}
    assert gap_closed(table, "selector_grpo") == pytest.approx((0.8 - 0.5) / (0.9 - 0.5))
    # A better direction of showing them is a better similarity; an oracle's rerank is none.
    table["similarity_joint_reversed"] = {"accuracy": 0.6}
    table["selector_grpo_oracle_rerank"] = {"accuracy": 0.9}
    assert best_similarity(table) == "similarity_joint_reversed"
    assert gap_closed(table, "selector_grpo") == pytest.approx((0.8 - 0.6) / (0.9 - 0.6))
    table["oracle_in_pool"]["accuracy"] = 0.5
    assert gap_closed(table, "selector_grpo") is None
    del table["oracle_in_pool"]
    assert gap_closed(table, "selector_grpo") is None
    assert best_similarity({"similarity_image": {"accuracy": None}}) is None
