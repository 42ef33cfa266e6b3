"""When a run of GRPO goes wrong: rules over the metrics of its optimiser steps.

Each rule compares the beginning of a phase with its present end, over several steps, because a
single step is noise. `find_warnings` is called after every round, and by the report.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_FEWEST = 8  # steps below which nothing is said
_SHARE = 0.2  # of the steps, at each end, are compared
ENTROPY_LEFT = 0.1  # of the entropy at the beginning
KL_NATS = 5.0
FLAT_SHARE = 0.95
REWARD_RISE, ACCURACY_FALL = 0.02, 0.02  # of the reward's spread over steps; of accuracy


class Warned(NamedTuple):
    """A warning.

    Attributes:
      rule: entropy_collapse, kl_runaway, all_flat or reward_hacked.
      phase: of the run.
      step: optimiser step at which it was seen.
      text: what was seen and what to try, with the flag.
    """

    rule: str
    phase: str
    step: int
    text: str


def find_warnings(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Warned]:
    """The rules that the rows of each phase break.

    Args:
      curves: phase to its rows of metrics.jsonl, in order of steps. Metrics that a row does not
        have are not judged.

    Returns:
      At most one warning a rule and phase.
    """
    found = []
    for phase, rows in curves.items():
        if len(rows) < _FEWEST:
            continue
        for rule, check in _RULES.items():
            text = check(rows)
            if text:
                found.append(Warned(rule, phase, int(rows[-1]["step"]), text))
    return found


def _ends(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, float] | None:
    """Mean of a metric over the first and over the last fifth of the steps."""
    values = np.array([row[metric] for row in rows if row.get(metric) is not None], float)
    values = values[np.isfinite(values)]
    if len(values) < _FEWEST:
        return None
    size = max(2, int(_SHARE * len(values)))
    return float(values[:size].mean()), float(values[-size:].mean())


def _entropy(rows) -> str | None:
    ends = _ends(rows, "entropy")
    if ends is None or ends[0] <= 0 or ends[1] > ENTROPY_LEFT * ends[0]:
        return None
    return (
        f"entropy collapse: from {ends[0]:.2f} to {ends[1]:.3f} nats, so all draws of a query are "
        "one pointer; raise --kl_coef or lower --grpo_learning_rate"
    )


def _kl(rows) -> str | None:
    ends = _ends(rows, "kl")
    if ends is None or ends[1] <= KL_NATS or ends[1] <= 2 * ends[0]:
        return None
    return (
        f"KL runaway: from {ends[0]:.2f} to {ends[1]:.2f} nats a step from the policy after RCE; "
        "raise --kl_coef or lower --grpo_learning_rate"
    )


def _flat(rows) -> str | None:
    ends = _ends(rows, "flat_share")
    if ends is None or ends[1] < FLAT_SHARE:
        return None
    return (
        f"all groups flat: {ends[1]:.0%} of the last groups were dropped, nothing is learnt from "
        "them; raise --group_size, or use a graded --reward_mode"
    )


def _hacked(rows) -> str | None:
    reward, accuracy = _ends(rows, "sample_reward"), _ends(rows, "sample_accuracy")
    if reward is None or accuracy is None:
        return None
    rise, fall = reward[1] - reward[0], accuracy[0] - accuracy[1]
    if rise <= REWARD_RISE * max(abs(reward[0]), 1e-9) or fall <= ACCURACY_FALL:
        return None
    return (
        f"reward up but accuracy down: reward {reward[0]:.3f} to {reward[1]:.3f}, accuracy "
        f"{accuracy[0]:.3f} to {accuracy[1]:.3f}; lower --soft_weight and --similarity_weight, or "
        "use --reward_mode=hard_plus_soft"
    )


_RULES: dict[str, Callable[[Sequence[Mapping[str, Any]]], str | None]] = {
    "entropy_collapse": _entropy,
    "kl_runaway": _kl,
    "all_flat": _flat,
    "reward_hacked": _hacked,
}
