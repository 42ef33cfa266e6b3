"""Health figures: by hand, against loops on fresh input, on empty data, and at full size."""

import csv
import io
import json
import time

import numpy as np
import pytest
import scipy.stats

from lever_jax.diagnostics import (
    Candidates,
    Picks,
    Thresholds,
    health_csv,
    measure_health,
)

NAN = np.nan
NAMES = """
    queries candidates unique_ratio positive_rate positives_per_query pct_zero_positive_query
    pct_flat_reward_query by_source spearman_gt_prob_accuracy oracle_in_data model_pick headroom
    pct_headroom_over_0_2 eval_failed verdict
"""
NAMES = NAMES.split()


def by_hand():
    """Three queries, shuffled:
    7: pointers 01, 10, 01 again (order counts: 2 of 3 unique); right, wrong, not verified
    8: two wrong, and one failed
    9: all failed
    """
    rows = [
        # query, source, gt_prob, accuracy, reward, failed, pointer, log_prob
        (8, "beam", 0.20, 0.0, 0.20, False, (0, 1), -1.0),
        (7, "beam", 0.90, 0.6, 2.90, False, (0, 1), -2.0),
        (9, "random", NAN, NAN, NAN, True, (3, 4), -1.0),
        (7, "random", 0.10, 0.0, 0.10, False, (1, 0), -0.5),
        (8, "random", 0.10, 0.0, 0.20, False, (2, 1), -3.0),
        (7, "beam", 0.80, NAN, NAN, False, (0, 1), -9.0),
        (8, "random", 0.99, 1.0, 9.00, True, (2, 3), -0.1),  # scores of a failed row: not used
    ]
    columns = [np.array(column) for column in zip(*rows)]
    return Candidates(*columns)


def test_rates_are_estimated_from_the_sample_alone():
    candidates = by_hand()
    # Of the four verified rows, one right and one wrong were drawn, and one that failed.
    sampled = np.array([True, True, True, False, False, False, False])
    health = measure_health(candidates._replace(sampled=sampled))
    whole = measure_health(candidates)
    assert (health["estimated_from"], whole["estimated_from"]) == (2, 4)
    assert (health["positive_rate"], whole["positive_rate"]) == (1 / 2, 1 / 4)
    assert health["spearman_gt_prob_accuracy"] == pytest.approx(1.0)
    assert health["by_source"]["beam"]["estimated_from"] == 2
    assert health["by_source"]["random"]["positive_rate"] is None
    assert health["by_source"]["random"]["candidates"] == whole["by_source"]["random"]["candidates"]
    # What is about queries looks at every verified candidate.
    for name in ("verified", "pct_zero_positive_query", "oracle_in_data", "positives_per_query"):
        assert health[name] == whole[name]


def test_by_hand():
    health = measure_health(by_hand())
    assert next(iter(health)) == "queries"
    assert set(NAMES) <= set(health)
    assert health["queries"] == 3
    assert health["candidates"] == 7
    assert health["verified"] == 4
    assert health["eval_failed"] == 2
    assert health["pct_eval_failed"] == 2 / 7
    assert health["unique_ratio"] == (2 + 3 + 1) / 7
    assert health["positive_rate"] == 1 / 4
    assert health["positives_per_query"] == {
        "min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0
    }  # fmt: skip
    assert health["pct_zero_positive_query"] == 1 / 2  # query 8; 9 is unknown, not negative
    assert health["pct_flat_reward_query"] == 1 / 2  # query 8, whose two rewards agree
    assert health["by_source"]["beam"]["candidates"] == 3
    assert health["by_source"]["beam"]["positive_rate"] == 1 / 2
    assert health["by_source"]["random"]["candidates"] == 4
    assert health["by_source"]["random"]["positive_rate"] == 0
    gt_prob, accuracy = [0.2, 0.9, 0.1, 0.1], [0, 0.6, 0, 0]
    expected = scipy.stats.spearmanr(gt_prob, accuracy).statistic
    np.testing.assert_allclose(health["spearman_gt_prob_accuracy"], expected)
    # The most probable candidates that did not fail: 7 -> (1, 0), wrong; 8 -> (0, 1), wrong.
    np.testing.assert_allclose(health["oracle_in_data"], (0.6 + 0.0) / 2)
    assert health["model_pick"] == 0
    np.testing.assert_allclose(health["headroom"], 0.3)
    assert health["pct_headroom_over_0_2"] == 1 / 2
    assert health["headroom_queries"] == 2


def test_given_picks_win_over_stored_log_probs():
    picks = Picks(np.array([9, 7, 55, 8]), np.array([1.0, 0.4, 1.0, NAN]))
    health = measure_health(by_hand(), picks=picks)
    # 9 has no oracle, 55 is unknown, the pick of 8 was not answered: 7 alone is compared.
    assert health["headroom_queries"] == 1
    assert health["oracle_in_data"] == 0.6
    assert health["model_pick"] == 0.4
    np.testing.assert_allclose(health["headroom"], 0.6 - 0.4)
    assert health["pct_headroom_over_0_2"] == 0  # 0.2, give or take rounding, is not above 0.2


def test_without_a_selector():
    health = measure_health(by_hand()._replace(log_prob=None, pointer=None))
    np.testing.assert_allclose(health["oracle_in_data"], 0.3)
    for name in ("model_pick", "headroom", "pct_headroom_over_0_2", "unique_ratio"):
        assert health[name] is None
    assert health["headroom_queries"] == 0


def random_candidates(rng, num_queries, most):
    query = rng.permutation(np.repeat(rng.permutation(10**6)[:num_queries] - 500, most))
    query = query[rng.random(len(query)) < 0.7]
    n = len(query)
    gt_prob = rng.random(n).round(2)
    accuracy = np.where(rng.random(n) < gt_prob**2, rng.choice([0.3, 0.6, 1.0], n), 0.0)
    accuracy[rng.random(n) < 0.3] = NAN
    reward = np.where(query % 3 == 0, 0.5, 2 * (accuracy > 0) + gt_prob)
    reward[np.isnan(accuracy)] = NAN
    return Candidates(
        query,
        rng.choice(["beam", "random", "top_p(p=0.9)"], n),
        gt_prob,
        accuracy,
        reward,
        rng.random(n) < 0.1,
        rng.integers(0, 3, (n, 2)),
        rng.normal(size=n).round(1),
    )


def by_loops(c):
    figures = {"zero": [], "flat": [], "counts": [], "gap": [], "unique": 0}
    for q in set(c.query_id.tolist()):
        rows = [i for i in range(len(c.query_id)) if c.query_id[i] == q]
        figures["unique"] += len({tuple(c.pointer[i]) for i in rows})
        fine = [i for i in rows if not c.failed[i]]
        known = [c.accuracy[i] for i in fine if not np.isnan(c.accuracy[i])]
        rewards = [c.reward[i] for i in fine if not np.isnan(c.reward[i])]
        if known:
            figures["counts"].append(sum(a > 0 for a in known))
            figures["zero"].append(max(known) == 0)
        if rewards:
            figures["flat"].append(max(rewards) - min(rewards) < 1e-6)
        if fine:
            pick = max(fine, key=lambda i: (c.log_prob[i], -i))
            if not np.isnan(c.accuracy[pick]):
                figures["gap"].append(max(known) - c.accuracy[pick])
    return figures


def test_against_loops():
    c = random_candidates(np.random.default_rng(), num_queries=40, most=9)
    health = measure_health(c, resamples=50)
    expected = by_loops(c)
    np.testing.assert_allclose(health["unique_ratio"], expected["unique"] / len(c.query_id))
    np.testing.assert_allclose(health["pct_zero_positive_query"], np.mean(expected["zero"]))
    np.testing.assert_allclose(health["pct_flat_reward_query"], np.mean(expected["flat"]))
    np.testing.assert_allclose(health["headroom"], np.mean(expected["gap"]))
    np.testing.assert_allclose(
        health["pct_headroom_over_0_2"], np.mean(np.array(expected["gap"]) > 0.2 + 1e-9)
    )
    np.testing.assert_allclose(
        list(health["positives_per_query"].values()),
        np.quantile(expected["counts"], [0, 0.25, 0.5, 0.75, 1]),
    )
    known = ~c.failed & ~np.isnan(c.accuracy)
    np.testing.assert_allclose(health["positive_rate"], (c.accuracy[known] > 0).mean())
    np.testing.assert_allclose(
        health["spearman_gt_prob_accuracy"],
        scipy.stats.spearmanr(c.gt_prob[known], c.accuracy[known]).statistic,
    )
    np.testing.assert_allclose(
        health["oracle_in_data"] - health["model_pick"], health["headroom"], atol=1e-12
    )
    for source, entry in health["by_source"].items():
        own = known & (c.source == source)
        assert entry["candidates"] == (c.source == source).sum()
        np.testing.assert_allclose(entry["positive_rate"], (c.accuracy[own] > 0).mean())
        assert entry["ci95"][0] <= entry["positive_rate"] <= entry["ci95"][1]
    for name, interval in health["ci95"].items():
        assert (interval is None) == (health[name] is None), name
        if interval:
            assert interval[0] <= health[name] <= interval[1], name


def test_order_of_rows_does_not_matter():
    c = random_candidates(np.random.default_rng(), num_queries=20, most=6)
    c = c._replace(log_prob=np.arange(len(c.query_id)) * 1.0)  # no ties, which fall to the row
    order = np.random.default_rng().permutation(len(c.query_id))
    shuffled = Candidates(*(None if column is None else column[order] for column in c))
    loose = Thresholds(max_zero_positive=1.0, min_spearman=-1.0)
    a, b = (health_csv(measure_health(x, thresholds=loose, resamples=50)) for x in (c, shuffled))
    for row_a, row_b in zip(a, b, strict=True):
        assert row_a[0] == row_b[0]
        assert row_a[1:] == (
            row_b[1:] if row_a[0] in ("figure", "verdict") else pytest.approx(row_b[1:])
        )


def constant(num_queries, group, accuracy, failed=False):
    n = num_queries * group
    return Candidates(
        query_id=np.repeat(np.arange(num_queries), group),
        source=np.full(n, "beam"),
        gt_prob=np.full(n, 0.5),
        accuracy=np.full(n, accuracy),
        reward=np.full(n, accuracy),
        failed=np.full(n, failed),
        pointer=np.zeros((n, 2), np.int64),
        log_prob=np.full(n, -1.0),
    )


@pytest.mark.parametrize(
    "candidates",
    [
        constant(0, 0, 0.0),
        Candidates([], [], [], [], [], []),
        constant(1, 1, 0.0),
        constant(1, 1, 1.0),
        constant(1, 8, 1.0),
        constant(5, 4, 1.0, failed=True),
        constant(5, 4, NAN, failed=True),
        constant(5, 4, NAN),
        constant(5, 4, 0.0),
        constant(5, 4, 1.0),
        constant(5, 4, 1.0)._replace(gt_prob=np.full(20, NAN)),
        constant(5, 4, 1.0)._replace(log_prob=np.full(20, NAN)),
    ],
)
def test_degenerate_data_gives_no_warning_and_no_nan(candidates):
    health = measure_health(candidates)
    assert set(NAMES) <= set(health)
    json.dumps(health, allow_nan=False)
    assert health["ready"] is False
    assert health["reasons"]
    assert "nan" not in health["verdict"].lower()
    table = health_csv(health)
    csv.writer(io.StringIO()).writerows(table)
    assert {len(row) for row in table} == {4}


def test_all_failed_is_unknown_not_negative():
    health = measure_health(constant(5, 4, 0.0, failed=True))
    assert health["eval_failed"] == 20
    for name in ("positive_rate", "pct_zero_positive_query", "oracle_in_data", "headroom"):
        assert health[name] is None
    assert health["positives_per_query"]["median"] is None
    assert health["by_source"]["beam"]["positive_rate"] is None


def test_columns_of_different_length():
    with pytest.raises(ValueError, match="accuracy has 1 rows beside 2 query ids"):
        measure_health(Candidates([1, 2], ["a", "a"], [0, 0], [0], [0, 0], [False, False]))


def test_thresholds_reach_the_verdict():
    c = random_candidates(np.random.default_rng(0), num_queries=40, most=9)
    loose = Thresholds(max_zero_positive=1.0, min_spearman=-1.0)
    assert measure_health(c, thresholds=loose, resamples=50)["ready"]
    strict = measure_health(c, thresholds=Thresholds(-0.1, 1.0), resamples=50)
    assert not strict["ready"]
    assert strict["outcome"] != "healthy"
    assert [reason["threshold"] for reason in strict["reasons"]] == [-0.1, 0.1]


def test_csv_rows():
    health = measure_health(by_hand())
    table = health_csv(health)
    assert table[0] == ("figure", "value", "low", "high")
    rows = {row[0]: row[1:] for row in table[1:]}
    assert len(rows) == len(table) - 1
    assert rows["queries"] == (3, None, None)
    assert rows["positives_per_query.median"] == (0.5, None, None)
    assert rows["positive_rate"] == (0.25, *health["ci95"]["positive_rate"])
    assert rows["by_source.beam.positive_rate"][0] == 0.5
    assert rows["by_source.random.candidates"] == (4, None, None)
    assert rows["verdict"][0] == health["verdict"]


def test_full_size_takes_seconds():
    rng = np.random.default_rng(0)
    query = np.repeat(np.arange(10_000), 64)
    n = len(query)
    gt_prob = rng.random(n)
    accuracy = np.where(gt_prob > 0.7, 1.0, 0.0)
    accuracy[np.arange(n) % 64 >= 16] = NAN  # stage B on a quarter
    c = Candidates(
        query,
        np.array(["beam", "random", "top_p(p=0.9)", "policy"])[rng.integers(4, size=n)],
        gt_prob,
        accuracy,
        2 * (accuracy > 0) + gt_prob,
        np.zeros(n, bool),
        rng.integers(0, 64, (n, 2)),
        rng.normal(size=n),
    )
    start = time.process_time()
    health = measure_health(c, resamples=100)
    assert time.process_time() - start < 30
    assert health["candidates"] == 640_000
