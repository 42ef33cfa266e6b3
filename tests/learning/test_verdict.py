"""The verdict: every row of its table from data with that fault, and no fault in healthy data."""

import numpy as np
import pytest
import worlds

from lever_jax.diagnostics import Thresholds, measure_health, verdict
from lever_jax.diagnostics.verdict import FLAGS, MEANING, OPEN, OUTCOMES, REFUTED, SHOWN, UNKNOWN

SIZES = (50, 200, 800)
PLANTED = {
    worlds.healthy: "healthy",
    worlds.pool_exhausted: "pool_exhausted",
    worlds.search_finds_nothing: "pool_exhausted",
    worlds.proposals_miss: "proposals_miss",
    worlds.search_finds: "proposals_miss",
    worlds.reward_misaligned: "reward_misaligned",
    worlds.training_unused: "training_unused",
    worlds.knows_nothing: "vlm_knows_nothing",
    worlds.on_the_threshold: "too_few",
}


def measure(world):
    return measure_health(**world, resamples=200)


@pytest.mark.parametrize("num", [*SIZES[:2], pytest.param(SIZES[2], marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", PLANTED, ids=lambda make: make.__name__)
def test_the_planted_fault_is_named(make, num):
    health = measure(make(np.random.default_rng([1, num]), num))
    assert health["outcome"] == PLANTED[make], health["verdict"]
    assert health["ready"] is (PLANTED[make] == "healthy")
    assert health["next"] in health["verdict"] or health["ready"]


def test_a_selector_that_picks_the_best_pointer_has_nothing_left_to_learn():
    health = measure(worlds.nothing_left(np.random.default_rng(1), 200))
    assert health["outcome"] == "pool_exhausted"
    assert health["reasons"][1]["figure"] == "headroom_left"
    # Fifty queries that agree do not show that the gap is below 0.02.
    assert measure(worlds.nothing_left(np.random.default_rng(0), 50))["outcome"] == "healthy"


def test_every_outcome_of_the_table_is_planted():
    assert {outcome.key for outcome in OUTCOMES} == set(PLANTED.values())
    assert OUTCOMES[-1].conditions == ()


def false_share(sizes, count):
    found = []
    for i in range(count):
        rng = np.random.default_rng([i, 77])
        found.append(measure(worlds.healthy(rng, sizes[i % len(sizes)]))["outcome"])
    return np.mean([outcome != "healthy" for outcome in found])


def test_healthy_data_are_called_healthy():
    assert false_share((50,), 20) <= 0.05


@pytest.mark.slow
def test_healthy_data_are_called_healthy_over_200_worlds():
    assert false_share(SIZES, 200) <= 0.05


def test_a_handful_of_queries_is_too_few():
    health = measure(worlds.healthy(np.random.default_rng(3), 8))
    assert (health["outcome"], health["ready"]) == ("too_few", False)
    assert "raise --num_queries" in health["verdict"]
    assert health["reasons"][0]["state"] == OPEN


def figures(**named):
    """Health figures with the interval [low, high], the value between them."""
    health = {name: None if bounds is None else sum(bounds) / 2 for name, bounds in named.items()}
    return {**health, "ci95": named}


FIT = {"pct_zero_positive_query": (0.0, 0.05), "spearman_gt_prob_accuracy": (0.5, 0.7)}
ZERO = {"pct_zero_positive_query": (0.3, 0.4)}


@pytest.mark.parametrize(
    ("named", "outcome"),
    [
        (FIT, "healthy"),
        ({**FIT, "pct_zero_positive_query": (0.0, 0.1)}, "healthy"),  # ends on the threshold
        ({**FIT, "pct_zero_positive_query": (0.05, 0.11)}, "too_few"),
        ({**FIT, "spearman_gt_prob_accuracy": (0.25, 0.5)}, "too_few"),
        ({**FIT, "spearman_gt_prob_accuracy": (-0.1, 0.3)}, "reward_misaligned"),
        ({**FIT, "spearman_gt_prob_accuracy": None}, "too_few"),
        ({"pct_zero_positive_query": None, "spearman_gt_prob_accuracy": None}, "too_few"),
        ({**FIT, **ZERO, "coverage_rising": (0.2, 0.3)}, "proposals_miss"),
        ({**FIT, **ZERO, "coverage_rising": (0.0, 0.05)}, "pool_exhausted"),
        ({**FIT, **ZERO, "coverage_rising": (0.05, 0.15)}, "too_few"),
        ({**FIT, **ZERO, "coverage_rising": None}, "too_few"),
        # What a search found says more than the curve.
        ({**ZERO, "coverage_rising": (0.2, 0.3), "ceiling_found": (0.0, 0.2)}, "pool_exhausted"),
        ({**ZERO, "coverage_rising": (0.0, 0.1), "ceiling_found": (0.5, 0.7)}, "proposals_miss"),
        ({"pct_zero_positive_query": (0.8, 1.0)}, "vlm_knows_nothing"),
        ({**FIT, "headroom_left": (-0.01, 0.01)}, "pool_exhausted"),
        ({**FIT, "headroom_left": (0.1, 0.2), "training_use": (-0.1, 0.1)}, "training_unused"),
        ({**FIT, "headroom_left": (0.1, 0.2), "training_use": (0.1, 0.4)}, "healthy"),
        ({**FIT, "headroom_left": (0.0, 0.2), "training_use": (-0.1, 0.1)}, "healthy"),
    ],
)
def test_the_table(named, outcome):
    got = verdict(figures(**named))
    assert got.outcome == outcome, got.text
    assert got.ready is (outcome == "healthy")
    assert bool(got.reasons) is not got.ready
    assert got.ready or got.next in got.text


def test_a_condition_has_four_states():
    condition = OUTCOMES[-2].conditions[0]  # pct_zero_positive_query < max_zero_positive
    states = {
        bounds: condition.state(figures(pct_zero_positive_query=bounds), Thresholds())
        for bounds in ((0.0, 0.1), (0.2, 0.3), (0.05, 0.2), None)
    }
    assert list(states.values()) == [SHOWN, REFUTED, OPEN, UNKNOWN]


def test_the_verdict_says_what_to_do():
    got = verdict(figures(**{**FIT, **ZERO, "coverage_rising": (0.2, 0.3)}))
    for part in (
        "proposals miss",
        "pct_zero_positive_query=0.35 [0.3, 0.4] is above --max_zero_positive=0.1",
        "next: raise --proposals",
    ):
        assert part in got.text
    reason = got.reasons[0]
    assert (reason["value"], reason["threshold"]) == (0.35, 0.1)
    assert (reason["flag"], reason["state"]) == ("--max_zero_positive", SHOWN)
    unclear = verdict(figures(**{**FIT, **ZERO, "coverage_rising": (0.05, 0.15)}))
    assert "--ceiling_queries=50" in unclear.next
    assert "--verify_uniform" in verdict(figures(**{**FIT, "spearman_gt_prob_accuracy": None})).next
    nothing = verdict(figures(pct_zero_positive_query=(0.9, 1.0)))
    assert "knows nothing" in nothing.text
    assert "--pool_size" not in nothing.text


def test_evidence_holds_every_figure_of_the_table_once():
    evidence = verdict(figures(**FIT)).evidence
    assert {line["figure"] for line in evidence} == set(MEANING)
    keys = [(line["figure"], line["threshold"]) for line in evidence]
    assert len(keys) == len(set(keys))


def test_thresholds_are_flags_where_they_say_so():
    assert set(FLAGS) <= set(Thresholds._fields)
    loose = Thresholds(max_zero_positive=0.5)
    assert verdict(figures(**{**FIT, **ZERO}), loose).ready
