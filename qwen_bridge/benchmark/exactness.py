"""Whether the fast ways say what the naive loop says; checked before anything is timed.

In float32 every rung must agree with the naive loop to 1e-4 nats an answer. In bfloat16 no two
orders of summation agree, so a rung must not be further from the float32 network than the naive
loop in bfloat16 is itself.
"""

import dataclasses

import numpy as np

from qwen_bridge.protocol import ScoreBatch

TOLERANCE = 1e-4  # nats, float32
QUANTILES = {"p50": 50, "p99": 99, "max": 100}
# Two samples of the same rounding error differ in their quantiles, by so much with some hundred
# answers of LEAST_BFLOAT16 queries.
_CHANCE = {"p50": 1.5, "p99": 1.5, "max": 2.0}
LEAST_BFLOAT16 = 32  # prompts from which on quantiles can be compared


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one rung is from what it is measured against.

    Attributes:
      p50: median absolute difference of an answer's log-probability, in nats.
      p99: its 99th percentile.
      max: the largest.
      greedy_equal: whether the same prompts would be answered greedily by a ground truth.
    """

    p50: float
    p99: float
    max: float
    greedy_equal: bool


def difference(ours: ScoreBatch, theirs: ScoreBatch, near: float) -> Difference:
    """Compares two results of the same prompts.

    Args:
      ours: results of a rung.
      theirs: what they are held against.
      near: prompts whose lead is smaller, in nats, may be greedy in one and not in the other.

    Raises:
      ValueError: a prompt could not be scored, or an answer has a probability in one result only.
    """
    for batch in (ours, theirs):
        if batch.reasons:
            raise ValueError(f"a prompt could not be scored: {next(iter(batch.reasons.values()))}")
        if np.isnan(batch.gt_prob).any():
            raise ValueError("a score is not a number")
    known = np.isfinite(theirs.answer_log_probs)
    if not np.array_equal(known, np.isfinite(ours.answer_log_probs)):
        raise ValueError("an answer has a probability in one result and none in the other")
    off = np.abs(ours.answer_log_probs[known] - theirs.answer_log_probs[known])
    clear = np.abs(theirs.margin) > near
    return Difference(
        *(float(np.percentile(off, q)) for q in QUANTILES.values()),
        bool(np.array_equal(ours.margin[clear] > 0, theirs.margin[clear] > 0)),
    )


def faults(by_rung: dict[str, Difference], naive: Difference | None) -> list[str]:
    """What is wrong, one sentence a rung; empty where all is well.

    Args:
      by_rung: of each rung, to the naive loop (float32) or to the float32 network (bfloat16).
      naive: in bfloat16, how far the naive loop itself is from the float32 network.
    """
    found = []
    for name, one in by_rung.items():
        if naive is None:
            limits = {"max": TOLERANCE}
        else:
            limits = {q: getattr(naive, q) * chance for q, chance in _CHANCE.items()}
        for quantile, limit in limits.items():
            # A NaN fails too.
            if not getattr(one, quantile) <= limit:
                off = getattr(one, quantile)
                found.append(f"{name}: {quantile} difference {off:.2e} nats exceeds {limit:.2e}")
        if not one.greedy_equal:
            found.append(f"{name}: other prompts are answered greedily")
    return found
