"""Warnings of a run that goes wrong: each rule by curves made to break it, none by fine ones."""

import numpy as np
import pytest

from lever_jax.run_warnings import find_warnings


def curves(steps=40, **ends):
    """Rows with noisy lines, straight but for the entropy; `ends` are (first, last) by metric."""
    rng = np.random.default_rng(0)
    fine = {
        "entropy": (2.0, 1.2),
        "kl": (0.0, 1.2),
        "flat_share": (0.1, 0.4),
        "sample_reward": (2.0, 2.6),
        "sample_accuracy": (0.6, 0.9),
    }
    lines = {
        name: (np.geomspace if name == "entropy" else np.linspace)(*both, steps)
        + 0.001 * rng.normal(size=steps)
        for name, both in {**fine, **ends}.items()
    }
    return {
        "grpo": [
            {"step": i + 1, **{name: line[i] for name, line in lines.items()}} for i in range(steps)
        ]
    }


def test_a_run_that_goes_well_gives_no_warning():
    assert find_warnings(curves()) == []
    assert find_warnings({}) == []


@pytest.mark.parametrize(
    ("rule", "flag", "ends"),
    [
        ("entropy_collapse", "--kl_coef", {"entropy": (2.0, 0.01)}),
        ("kl_runaway", "--kl_coef", {"kl": (0.1, 9.0)}),
        ("all_flat", "--group_size", {"flat_share": (1.0, 1.0)}),
        ("reward_hacked", "--soft_weight", {"sample_accuracy": (0.6, 0.5)}),
    ],
)
def test_each_rule_has_its_own_warning(rule, flag, ends):
    (warned,) = find_warnings(curves(**ends))
    assert (warned.rule, warned.phase, warned.step) == (rule, "grpo", 40)
    assert flag in warned.text
    assert find_warnings(curves(steps=6, **ends)) == []  # too few steps to tell


@pytest.mark.parametrize(
    "ends",
    [
        {"entropy": (2.0, 0.5)},
        {"kl": (4.0, 6.0)},
        {"flat_share": (0.2, 0.9)},
        {"sample_accuracy": (0.6, 0.59)},
        {"sample_reward": (2.0, 2.0), "sample_accuracy": (0.6, 0.5)},  # both got worse
    ],
)
def test_what_is_near_a_rule_does_not_break_it(ends):
    assert find_warnings(curves(**ends)) == []


def test_metrics_that_are_missing_or_unknown_are_not_judged():
    rows = [{"step": i, "loss": 1.0, "kl": None, "entropy": float("nan")} for i in range(30)]
    assert find_warnings({"rce": rows}) == []
