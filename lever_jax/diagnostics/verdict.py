"""The verdict: from figures with intervals to one decision, by the rules of one table.

A *condition* compares a figure with a threshold. It is `shown` if the figure's whole 95% interval
lies on the condition's side of the threshold, `refuted` if all of it lies on the other side,
`open` if the interval holds the threshold, and `unknown` without a value or an interval. The
verdict is the first outcome of `OUTCOMES` of which every condition is shown; the last one has
none. So a fault is named only where chance does not explain it, and GRPO starts only where the
data are shown to be fit, not where they merely were not shown to be unfit.
"""

from typing import Any, NamedTuple

SHOWN, REFUTED, OPEN, UNKNOWN = "shown", "refuted", "open", "unknown"


class Thresholds(NamedTuple):
    """What the conditions compare with. The first three are flags.

    Attributes:
      max_zero_positive: largest share of queries without a positive, in [0, 1].
      min_spearman: smallest rank correlation of gt_prob and accuracy, in [-1, 1].
      min_headroom: smallest gap of accuracy from the selector's pick to the best pointer known.
      nothing_known: share of queries without a positive above which the VLM itself is at fault.
      still_rising: of the queries without a positive after half of the evaluations, the share that
        the other half gives one; above it more evaluations would find more.
      search_finds: the share of queries without a positive that a search of their pools gives
        one; above it the pools are good and the proposals missed.
      used: share of the headroom that training must close to count as using the data.
    """

    max_zero_positive: float = 0.1
    min_spearman: float = 0.3
    min_headroom: float = 0.02
    nothing_known: float = 0.7
    still_rising: float = 0.1
    search_finds: float = 0.25
    used: float = 0.25


DEFAULT_THRESHOLDS = Thresholds()
FLAGS = ("max_zero_positive", "min_spearman", "min_headroom")

MEANING = {
    "pct_zero_positive_query": "queries for which no pointer was ever right; GRPO learns nothing "
    "from them",
    "spearman_gt_prob_accuracy": "how well gt_prob, by which candidates are chosen and rewarded, "
    "orders accuracy",
    "coverage_rising": "of the queries without a positive after half of the evaluations, those "
    "that the other half found one for",
    "ceiling_found": "of the queries without a positive, those whose pool has one that a search "
    "with extra budget found",
    "headroom_left": "accuracy from the selector's pick to the best pointer in the data",
    "training_use": "share of the headroom that training closed on its own queries",
}


class Condition(NamedTuple):
    """`figure` is above (">") or below ("<") the threshold of that name."""

    figure: str
    side: str
    threshold: str

    def state(self, health: dict[str, Any], thresholds: Thresholds) -> str:
        """SHOWN, REFUTED, OPEN or UNKNOWN. An interval that ends at the threshold is inside."""
        interval = health.get("ci95", {}).get(self.figure)
        if health.get(self.figure) is None or interval is None:
            return UNKNOWN
        threshold, (low, high) = getattr(thresholds, self.threshold), interval
        if self.side == ">":
            return SHOWN if low > threshold else REFUTED if high <= threshold else OPEN
        return SHOWN if high <= threshold else REFUTED if low > threshold else OPEN

    def text(self, health: dict[str, Any], thresholds: Thresholds) -> str:
        """The condition in words, with the figure as it is."""
        value, interval = health.get(self.figure), health.get("ci95", {}).get(self.figure)
        state = self.state(health, thresholds)
        if value is None:
            return f"{self.figure} is unknown ({MEANING[self.figure]})"
        bounds = f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""
        above = state == (SHOWN if self.side == ">" else REFUTED)
        where = {OPEN: "on both sides of", UNKNOWN: "without an interval beside"}.get(
            state, "above" if above else "at most"
        )
        flag = "--" if self.threshold in FLAGS else ""
        threshold = f"{flag}{self.threshold}={getattr(thresholds, self.threshold):g}"
        return f"{self.figure}={value:.3g}{bounds} is {where} {threshold} ({MEANING[self.figure]})"


class Outcome(NamedTuple):
    """A row of the table.

    Attributes:
      key: stable name, for programs.
      title: what it means, in words.
      conditions: all must be shown.
      advice: the one thing to try next, with its flag.
    """

    key: str
    title: str
    conditions: tuple[Condition, ...]
    advice: str


_MANY_ZERO = Condition("pct_zero_positive_query", ">", "max_zero_positive")
_FEW_ZERO = Condition("pct_zero_positive_query", "<", "max_zero_positive")
_ORDERED = Condition("spearman_gt_prob_accuracy", ">", "min_spearman")
_RISING = Condition("coverage_rising", ">", "still_rising")
_SATURATED = Condition("coverage_rising", "<", "still_rising")
_NEARLY_ALL_ZERO = Condition("pct_zero_positive_query", ">", "nothing_known")
_SEARCH_FINDS = Condition("ceiling_found", ">", "search_finds")
_SEARCH_MISSES = Condition("ceiling_found", "<", "search_finds")

_MISS = "proposals miss: the pools have right pointers that were not proposed"
_EXHAUSTED = "candidate pool exhausted"
_NOTHING = (
    "hardly one answer was right whatever was shown: this VLM, asked in this way, knows nothing of "
    "these questions, and more proposals will not help"
)
_OTHER_VLM = "look at --model, --instruction and --max_pixels"
_LARGER_POOL = "raise --pool_size, or mix its sources with --pool_shares"
_MORE_PROPOSALS = (
    "raise --proposals, and give --quotas more of the source whose coverage curve rises fastest"
)

# First match wins. The search with extra budget (--ceiling_queries) is the better witness of what
# is in a pool and stands first; without it the coverage curve has to say.
OUTCOMES = (
    Outcome("proposals_miss", _MISS, (_MANY_ZERO, _SEARCH_FINDS), _MORE_PROPOSALS),
    Outcome("vlm_knows_nothing", _NOTHING, (_NEARLY_ALL_ZERO, _SEARCH_MISSES), _OTHER_VLM),
    Outcome(
        "pool_exhausted",
        f"{_EXHAUSTED}: a search with extra budget found no right pointer in it either",
        (_MANY_ZERO, _SEARCH_MISSES),
        _LARGER_POOL,
    ),
    Outcome("proposals_miss", _MISS, (_MANY_ZERO, _RISING), _MORE_PROPOSALS),
    Outcome("vlm_knows_nothing", _NOTHING, (_NEARLY_ALL_ZERO,), _OTHER_VLM),
    Outcome(
        "pool_exhausted",
        f"{_EXHAUSTED}: more evaluations would find hardly a right pointer more",
        (_MANY_ZERO, _SATURATED),
        _LARGER_POOL,
    ),
    Outcome(
        "reward_misaligned",
        "reward misaligned: gt_prob does not order pointers as accuracy does",
        (_FEW_ZERO, Condition("spearman_gt_prob_accuracy", "<", "min_spearman")),
        "try --answer_weight=official, or --reward_mode=hard_plus_soft, which ignores gt_prob",
    ),
    Outcome(
        "pool_exhausted",
        f"{_EXHAUSTED}: the selector already picks as well as the best pointer in the data",
        (_FEW_ZERO, Condition("headroom_left", "<", "min_headroom")),
        "raise --pool_size; with pools as they are there is nothing left to learn",
    ),
    Outcome(
        "training_unused",
        "data fine but training does not use it",
        (
            _FEW_ZERO,
            _ORDERED,
            Condition("headroom_left", ">", "min_headroom"),
            Condition("training_use", "<", "used"),
        ),
        "lower --tau, or raise --rce_epochs or --rce_learning_rate",
    ),
    Outcome("healthy", "healthy: start GRPO", (_FEW_ZERO, _ORDERED), "start GRPO"),
    Outcome("too_few", "too few queries to tell", (), "raise --num_queries"),
)

_UNKNOWN_ADVICE = {
    "pct_zero_positive_query": "no candidate was verified: run stage B, and look at eval_failed",
    "spearman_gt_prob_accuracy": "gt_prob or accuracy is the same for every verified candidate, or "
    "there are fewer than two: verify more of them with --verify_uniform, or raise --num_queries",
}
_CAUSE_OPEN = (
    "many queries have no positive, and whether pools or proposals are at fault is open: spend an "
    "extra search budget with experiments.analyze --ceiling_queries=50"
)


class Verdict(NamedTuple):
    """Whether GRPO should start.

    Attributes:
      outcome: key of the outcome.
      title: what it means, in words.
      ready: True if it is `healthy`.
      text: the decision, its reasons and what to try next, in one line.
      next: the one thing to try next.
      reasons: the conditions that decided it, one dictionary each: figure, condition, value,
        ci95, threshold, flag (None where there is none), state, text. None of a healthy verdict.
      evidence: every condition of the table, each once, in the same form.
    """

    outcome: str
    title: str
    ready: bool
    text: str
    next: str
    reasons: list[dict[str, Any]]
    evidence: list[dict[str, Any]]


def verdict(health: dict[str, Any], thresholds: Thresholds = DEFAULT_THRESHOLDS) -> Verdict:
    """What to do with data that have these figures, by `OUTCOMES`.

    Args:
      health: figures as from `measure_health`, with their `ci95`; a figure that is missing or None
        is unknown.
      thresholds: the flags' values.

    Returns:
      `Verdict`.
    """

    def line(condition: Condition) -> dict[str, Any]:
        flagged = condition.threshold in FLAGS
        return {
            "figure": condition.figure,
            "condition": f"{condition.figure} {condition.side} {condition.threshold}",
            "value": health.get(condition.figure),
            "ci95": health.get("ci95", {}).get(condition.figure),
            "threshold": getattr(thresholds, condition.threshold),
            "flag": f"--{condition.threshold}" if flagged else None,
            "state": condition.state(health, thresholds),
            "text": condition.text(health, thresholds),
        }

    outcome = next(
        one
        for one in OUTCOMES
        if all(each.state(health, thresholds) == SHOWN for each in one.conditions)
    )
    evidence = {each.figure + each.threshold: each for one in OUTCOMES for each in one.conditions}
    deciding, advice = outcome.conditions, outcome.advice
    if outcome.key == "too_few":
        deciding, advice = _undecided(health, thresholds, advice)
    reasons = [line(condition) for condition in deciding]
    told = "; ".join(reason["text"] for reason in reasons)
    ready = outcome.key == "healthy"
    text = outcome.title if ready else f"{outcome.title}: {told}; next: {advice}"
    return Verdict(
        outcome=outcome.key,
        title=outcome.title,
        ready=ready,
        text=text,
        next=advice,
        reasons=[] if ready else reasons,
        evidence=[line(condition) for condition in evidence.values()],
    )


def _undecided(
    health: dict[str, Any], thresholds: Thresholds, advice: str
) -> tuple[list[Condition], str]:
    """What keeps the data from being called healthy, and how to find out more."""
    lacking = [c for c in (_FEW_ZERO, _ORDERED) if c.state(health, thresholds) != SHOWN]
    states = {c.figure: c.state(health, thresholds) for c in lacking}
    if states.get(_FEW_ZERO.figure) == REFUTED:
        return [_FEW_ZERO, _SATURATED], _CAUSE_OPEN
    for figure, state in states.items():
        if state == UNKNOWN and health.get(figure) is None:
            return lacking, _UNKNOWN_ADVICE[figure]
    return lacking, advice
