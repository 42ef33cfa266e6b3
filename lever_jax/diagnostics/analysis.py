"""Every figure of analysis.json: those of health.json and what stands behind them."""

from typing import Any

from lever_jax.diagnostics.calibration import calibration, similarity_shaping
from lever_jax.diagnostics.coverage import coverage, positions
from lever_jax.diagnostics.health import health_of
from lever_jax.diagnostics.rows import Candidates, Picks, prepare
from lever_jax.diagnostics.spread import duplicates, explained_by_source, failures, reward_ranges
from lever_jax.diagnostics.verdict import DEFAULT_THRESHOLDS, Thresholds


def analyze(
    candidates: Candidates,
    *,
    picks: Picks | None = None,
    trained: Picks | None = None,
    ceiling: Picks | None = None,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    min_range: float = 1e-6,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every figure about mined data.

    Args:
      As for `measure_health`.

    Returns:
      health: as from `measure_health`.
      reward_ranges: see `spread.reward_ranges`.
      explained_by_source: see `spread.explained_by_source`.
      positions: see `coverage.positions`; None where pools are unknown.
      duplicates: see `spread.duplicates`; None where pointers are unknown.
      failures: see `spread.failures`.
      calibration: see `calibration.calibration`.
      similarity: see `calibration.similarity_shaping`; None without similarities.
      coverage: see `coverage.coverage`.
      missing: what the data cannot say, in words.
    """
    rows = prepare(candidates, resamples=resamples, seed=seed)
    health = health_of(rows, picks, trained, ceiling, thresholds, min_range)
    result = {
        "health": health,
        "reward_ranges": reward_ranges(rows),
        "explained_by_source": explained_by_source(rows),
        "positions": positions(rows),
        "duplicates": duplicates(rows),
        "failures": failures(rows),
        "calibration": calibration(rows, health),
        "similarity": similarity_shaping(rows),
        "coverage": coverage(rows),
    }
    return {**result, "missing": _missing(result, candidates)}


def _missing(result: dict[str, Any], candidates: Candidates) -> list[str]:
    """What could not be measured, and why."""
    health = result["health"]
    absent = {
        "no candidate was answered (vqa_acc_score), so nothing is known of accuracy": (
            health["verified"] == 0
        ),
        "no gt_prob: calibration and correlation are unknown": not result["calibration"]["bins"],
        "no reward can be computed from these scores: flat groups and reward ranges are unknown": (
            not result["reward_ranges"]["counts"]
        ),
        "no pools (candidate_pool_ids): figures by position are unknown": (
            result["positions"] is None
        ),
        "no similarities of answers: the check of --similarity_weight is unknown": (
            result["similarity"] is None
        ),
        "no answer types: calibration is given for all questions together": (
            candidates.answer_type is None
        ),
        "no selector's pick: headroom is unknown": health["model_pick"] is None,
        "no extra search (--ceiling_queries): what the pools could give is unknown": (
            not health["ceiling_queries"]
        ),
    }
    return [text for text, missing in absent.items() if missing]
