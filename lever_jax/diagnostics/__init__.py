"""Is there anything in the mined data to learn from? Figures with intervals, and a verdict.

`measure_health` gives the figures of health.json, `analyze` those and every further one, `verdict`
the decision that follows from them; the rules are one table, `verdict.OUTCOMES`.
"""

from lever_jax.diagnostics.analysis import analyze
from lever_jax.diagnostics.health import measure_health
from lever_jax.diagnostics.rows import Candidates, Picks
from lever_jax.diagnostics.tables import analysis_csv, health_csv
from lever_jax.diagnostics.verdict import Thresholds, Verdict, verdict

__all__ = [
    "Candidates",
    "Picks",
    "Thresholds",
    "Verdict",
    "analysis_csv",
    "analyze",
    "health_csv",
    "measure_health",
    "verdict",
]
