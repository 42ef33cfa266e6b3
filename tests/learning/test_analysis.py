"""Figures of analysis.json: against loops, SciPy, NumPy, on degenerate data, at full size."""

import csv
import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from test_diagnostics import NAN, constant, random_candidates

from lever_jax.diagnostics import Candidates, Picks, analysis_csv, analyze
from lever_jax.diagnostics.health import missed_share
from lever_jax.diagnostics.spread import label_noise


def full_candidates(rng, num_queries=30, most=9):
    """Random candidates that have every column; about 10% failed, 30% not answered."""
    c = random_candidates(rng, num_queries, most)
    n = len(c.query_id)
    return c._replace(
        pointer=rng.integers(0, 4, (n, 2)),
        position=np.stack([rng.permutation(5)[:2] for _ in range(n)]),
        similarity=np.where(np.isnan(c.accuracy), NAN, rng.random(n).round(2)),
        reason=np.where(c.failed, rng.choice(["no image", "too long"], n), ""),
        answer_type=np.array(["number", "other", "yes/no"])[np.abs(c.query_id) % 3],
    )


@pytest.fixture(scope="module")
def drawn():
    """Random candidates with their figures, and the rows that count for rates."""
    c = full_candidates(np.random.default_rng())
    return c, analyze(c, resamples=100), ~c.failed & ~np.isnan(c.accuracy)


def test_calibration_bins_against_numpy(drawn):
    c, result, known = drawn
    gt_prob, accuracy = c.gt_prob[known], c.accuracy[known]
    bins = result["calibration"]["bins"]
    edges = np.array([*(one["low"] for one in bins), 1.0])
    for one, low in zip(bins, edges):
        own = (gt_prob >= low) & ((gt_prob < low + 0.1 - 1e-12) | (low == 0.9))
        assert one["n"] == own.sum()
        np.testing.assert_allclose(one["accuracy"], accuracy[own].mean())
        np.testing.assert_allclose(one["mean_gt_prob"], gt_prob[own].mean())
        if one["ci95"]:
            assert one["ci95"][0] <= one["accuracy"] <= one["ci95"][1]
    assert sum(one["n"] for one in bins) == known.sum()
    gap = sum(b["n"] * abs(b["accuracy"] - b["mean_gt_prob"]) for b in bins) / known.sum()
    np.testing.assert_allclose(result["calibration"]["gap"], gap)


def test_correlations_against_scipy(drawn):
    c, result, known = drawn
    found = result["calibration"]["spearman"]
    for name, own in [("all", known), *((t, known & (c.answer_type == t)) for t in c.answer_type)]:
        expected = scipy.stats.spearmanr(c.gt_prob[own], c.accuracy[own]).statistic
        np.testing.assert_allclose(found[name]["value"], expected, err_msg=name)
    sim, right = c.similarity, c.accuracy > 0
    for name, values, own in (
        ("with_hard", right.astype(float), known),
        ("with_gt_prob_where_wrong", c.gt_prob, known & ~right),
        ("with_gt_prob_where_right", c.gt_prob, known & right),
    ):
        expected = scipy.stats.spearmanr(sim[own], values[own]).statistic
        np.testing.assert_allclose(result["similarity"][name]["value"], expected, err_msg=name)
    for name, own in (("mean_right", known & right), ("mean_wrong", known & ~right)):
        np.testing.assert_allclose(result["similarity"][name]["value"], sim[own].mean())


def test_reward_figures_against_loops(drawn):
    c, result, known = drawn
    groups = [c.reward[known & (c.query_id == q)] for q in np.unique(c.query_id)]
    ranges = [np.ptp(group) for group in groups if len(group)]
    counts, edges = np.histogram(ranges, bins=20, range=(0, max(ranges)))
    assert result["reward_ranges"]["counts"] == counts.tolist()
    np.testing.assert_allclose(result["reward_ranges"]["edges"], edges)

    def eta_squared(values):
        total = ((values - values.mean()) ** 2).sum()
        between = 0.0
        for name in np.unique(c.source):
            own = values[c.source[known] == name]
            between += len(own) * (own.mean() - values.mean()) ** 2 if len(own) else 0
            mean = result["explained_by_source"]["by_source"][name]["value"]
            np.testing.assert_allclose(mean, c.reward[known & (c.source == name)].mean())
        return between / total

    explained = result["explained_by_source"]
    np.testing.assert_allclose(explained["of_reward"]["value"], eta_squared(c.reward[known]))
    centred = c.reward.copy()
    for q in np.unique(c.query_id):
        own = known & (c.query_id == q)
        centred[own] -= c.reward[own].mean() if own.any() else 0
    np.testing.assert_allclose(explained["within_query"]["value"], eta_squared(centred[known]))
    for name in ("of_reward", "within_query"):
        low, high = explained[name]["ci95"]
        assert 0 <= low <= high <= 1


def test_a_source_that_decides_the_reward_explains_all_of_it():
    query = np.repeat(np.arange(20), 4)
    source = np.tile(["good", "bad"], 40)
    accuracy = (source == "good").astype(float)
    c = Candidates(query, source, accuracy, accuracy, 3 * accuracy, np.zeros(80, bool))
    explained = analyze(c, resamples=50)["explained_by_source"]
    assert explained["of_reward"]["value"] == pytest.approx(1.0)
    assert explained["within_query"]["value"] == pytest.approx(1.0)


def test_positions_against_loops(drawn):
    c, result, known = drawn
    entries = {(row["shot"], row["position"]): row for row in result["positions"]}
    for shot, position in itertools.product(("any", 1, 2), range(5)):
        columns = c.position if shot == "any" else c.position[:, shot - 1 : shot]
        own = known & (columns == position).any(axis=1)
        if not own.any():
            assert (shot, position) not in entries
            continue
        row = entries[shot, position]
        assert row["n"] == own.sum()
        np.testing.assert_allclose(row["positive_rate"], (c.accuracy[own] > 0).mean())
        np.testing.assert_allclose(row["gt_prob"], c.gt_prob[own].mean())


def test_duplicates_and_failures_against_loops(drawn):
    c, result, _ = drawn
    seen, beyond, queries = set(), 0, set()
    for query, pointer in zip(c.query_id.tolist(), map(tuple, c.pointer)):
        if (query, pointer) in seen:
            beyond += 1
            queries.add(query)
        seen.add((query, pointer))
    assert result["duplicates"]["duplicates"] == beyond
    assert result["duplicates"]["queries_with_duplicates"] == len(queries)
    assert sum(row["count"] for row in result["failures"]) == c.failed.sum()
    for row in result["failures"]:
        assert row["count"] == (c.reason == row["reason"]).sum()


def test_coverage_is_the_mean_over_all_orders():
    """Three verified candidates of two queries: every order of evaluation, by hand."""
    right = np.array([[1, 0, 0], [0, 0, 0]], float)
    c = Candidates(
        np.repeat([4, 9], 3), ["a", "b", "b"] * 2, *[right.ravel()] * 3, np.zeros(6, bool)
    )
    points = analyze(c, resamples=20)["coverage"]
    expected = [
        np.mean([own[list(order)[:m]].max() for own in right for order in orders])
        for m in (1, 2, 3)
        for orders in [list(itertools.permutations(range(3)))]
    ]
    assert [point["evaluations"] for point in points["all"]] == [1, 2, 3]
    np.testing.assert_allclose([point["share"] for point in points["all"]], expected)
    assert points["a"][0]["share"] == 0.5
    assert [point["share"] for point in points["b"]] == [0, 0]


def test_missed_share_is_hypergeometric():
    n, k, m = np.meshgrid(np.arange(9), np.arange(9), np.arange(9), indexing="ij")
    fits = (k <= n) & (m <= n) & (n > 0)  # SciPy has no population of 0
    expected = scipy.stats.hypergeom.pmf(0, n[fits], k[fits], m[fits])
    np.testing.assert_allclose(missed_share(n[fits], k[fits], m[fits]), expected, atol=1e-12)


def test_label_noise_by_hand():
    noise = label_noise(
        np.array([5, 5, 8, 9]),
        np.array([[1.0, 0.0], [0.6, 1.0], [0.0, 0.0], [NAN, 1.0]]),
        np.array([[0.5, 0.25], [0.5, 0.5], [NAN, 0.1], [NAN, NAN]]),
    )
    assert noise["pairs"] == 3
    assert noise["hard_differs"]["value"] == pytest.approx(1 / 3)
    assert noise["accuracy_difference"]["value"] == pytest.approx(1.4 / 3)
    assert noise["gt_prob_difference"]["value"] == pytest.approx(0.125)
    assert label_noise(np.array([1]), np.array([[NAN, 1.0]]), np.array([[NAN, NAN]])) is None
    c = constant(3, 2, 1.0)
    assert analyze(c)["duplicates"]["label_noise"]["hard_differs"]["value"] == 0


def test_trained_picks_and_an_extra_search():
    c = constant(4, 3, 0.0)
    c.accuracy[:3] = 1.0  # query 0 alone has a positive
    ids = np.arange(4)
    health = analyze(
        c,
        picks=Picks(ids, np.array([0.0, 0.0, 0.0, 0.0])),
        trained=Picks(ids, np.array([0.6, 0.0, 0.0, NAN])),
        ceiling=Picks(ids[:3], np.array([0.3, 1.0, 0.0])),
    )["health"]
    assert health["headroom"] == pytest.approx(1 / 4)
    assert health["headroom_left"] == pytest.approx(0.4 / 3)
    assert health["training_use"] == pytest.approx(0.6)
    assert health["ceiling_queries"] == 3
    assert health["ceiling_gain"] == pytest.approx(1 / 3)
    assert health["ceiling_found"] == pytest.approx(1 / 2)


def complete(c):
    n = len(c.query_id)
    return c._replace(
        position=np.zeros((n, 2), np.int64),
        similarity=np.asarray(c.accuracy, float),
        reason=np.full(n, "broken"),
        answer_type=np.full(n, "number"),
        sampled=np.arange(n) % 2 == 0,
    )


@pytest.mark.parametrize("change", [lambda c: c, complete], ids=["plain", "complete"])
@pytest.mark.parametrize(
    "candidates",
    [
        Candidates([], [], [], [], [], []),
        constant(0, 0, 0.0),
        constant(1, 1, 0.0),
        constant(1, 1, 1.0),
        constant(1, 8, 1.0),
        constant(5, 4, 1.0, failed=True),
        constant(5, 4, NAN),
        constant(5, 4, 0.0),
        constant(5, 4, 1.0),
        constant(5, 4, 1.0)._replace(gt_prob=np.full(20, NAN)),
        constant(5, 4, 1.0)._replace(reward=np.full(20, NAN)),
    ],
)
def test_degenerate_data_give_no_warning_and_no_nan(candidates, change):
    result = analyze(change(candidates), resamples=50)
    text = json.dumps(result, allow_nan=False)
    assert "nan" not in text.lower()
    table = analysis_csv(result)
    csv.writer(io.StringIO()).writerows(table)
    assert {len(row) for row in table} == {8}
    if not len(candidates.query_id):
        assert result["missing"]


def test_the_csv_holds_what_the_json_holds(drawn):
    _, result, _ = drawn
    table = analysis_csv(result)[1:]
    assert {row[0] for row in table} == {
        "health", "reward_ranges", "explained_by_source", "positions", "duplicates", "failures",
        "calibration", "similarity", "coverage",
    }  # fmt: skip
    rows = {row[:4]: row[4:] for row in table}
    assert rows["health", "", "queries", None][1] == result["health"]["queries"]
    assert len(rows) == len(table)
    first = result["calibration"]["bins"][0]
    assert rows["calibration", "", "accuracy", first["low"]][:2] == (first["n"], first["accuracy"])
    for point in result["coverage"]["beam"]:
        assert rows["coverage", "beam", "share", point["evaluations"]][1] == point["share"]
    assert ("positions", "shot 2", "gt_prob", 0) in rows


_FULL_SIZE = """
import resource, time
import numpy as np
from lever_jax.diagnostics import Candidates, Picks, analyze
rng = np.random.default_rng(0)
query = np.repeat(np.arange(10_000), 64)
n = len(query)
gt_prob = rng.random(n)
accuracy = np.where(rng.random(n) < gt_prob * rng.random(10_000)[query], 1.0, 0.0)
position = rng.integers(0, 64, (n, 2))
c = Candidates(
    query, np.array(["beam", "random", "top_p(p=0.9)", "policy"])[rng.integers(4, size=n)],
    gt_prob, accuracy, 2 * accuracy + gt_prob, rng.random(n) < 0.01, position,
    rng.normal(size=n), None, position, rng.random(n), np.full(n, "x"),
    np.array(["number", "other", "yes/no"])[query % 3],
)
ids = np.arange(10_000)
picks = [Picks(ids, rng.integers(0, 2, 10_000).astype(float)) for _ in range(3)]
start = time.process_time()
analyze(c, picks=picks[0], trained=picks[1], ceiling=picks[2])
seconds = time.process_time() - start  # one thread: on an idle core this is the wall time
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_ten_thousand_queries_of_64_pointers_take_30_seconds_and_2_gib():
    done = subprocess.run(
        [sys.executable, "-c", _FULL_SIZE], capture_output=True, text=True, check=True, timeout=300
    )
    seconds, gib = map(float, done.stdout.split())
    assert seconds <= 30
    assert gib <= 2
