"""What a run prints: the health of the data and the evaluation table."""

from typing import Any

from rich.table import Table

from experiments.progress import CONSOLE, note
from lever_jax.evaluation import gap_closed

SHOWN = (
    "queries",
    "candidates",
    "unique_ratio",
    "positive_rate",
    "pct_zero_positive_query",
    "pct_flat_reward_query",
    "spearman_gt_prob_accuracy",
    "oracle_in_data",
    "model_pick",
    "headroom",
    "pct_headroom_over_0_2",
    "eval_failed",
)


def print_health(health: dict[str, Any]) -> None:
    """Prints the health figures with their intervals, and the verdict."""
    table = Table(title="health of the mined data", title_justify="left")
    for column in ("figure", "value", "95% interval"):
        side = "left" if column == "figure" else "right"
        table.add_column(column, justify=side, no_wrap=True)
    for name in SHOWN:
        shown = name
        if name in ("positive_rate", "spearman_gt_prob_accuracy"):
            shown = f"{name} (n = {health['estimated_from']:,})"
        table.add_row(shown, number(health[name]), interval(health["ci95"].get(name)))
    spread = health["positives_per_query"]
    table.add_row("positives_per_query", " / ".join(number(v) for v in spread.values()), "")
    for source, entry in health["by_source"].items():
        name = f"positive_rate of {source} (n = {entry['estimated_from']:,})"
        table.add_row(name, number(entry["positive_rate"]), interval(entry["ci95"]))
    CONSOLE.print(table)
    note(f"verdict: {health['verdict']}")


def print_evaluation(result: dict[str, Any]) -> None:
    """Prints accuracy with n and interval by method and shots, then the paired differences."""
    title = f"VQA accuracy ({result['metric']}), n = {result['n']} evaluation queries"
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for shots in result["shots"]:
        table.add_column(f"{shots} shot{'s' if shots != '1' else ''}", justify="right")
        table.add_column("95% interval", justify="right")
        table.add_column("gap closed", justify="right")
    methods = list(dict.fromkeys(m for rows in result["shots"].values() for m in rows))
    for method in methods:
        cells = []
        for rows in result["shots"].values():
            row = rows[method]
            closed = gap_closed(rows, method) if method.startswith("selector") else None
            cells += [number(row["accuracy"]), interval(row["ci95"])]
            cells.append("" if closed is None else f"{closed:.0%}")
        table.add_row(method, *cells)
    CONSOLE.print(table)
    table = Table(title="paired differences on the same queries", title_justify="left")
    for column in ("a - b", "shots", "difference", "95% interval", "n"):
        side = "left" if column == "a - b" else "right"
        table.add_column(column, justify=side, no_wrap=True)
    for row in result["paired"]:
        table.add_row(
            f"{row['a']} - {row['b']}",
            str(row["shots"]),
            f"{row['diff']:+.3f}" if row["diff"] is not None else "-",
            interval(row["ci95"]),
            str(row["n"]),
        )
    CONSOLE.print(table)


def number(value) -> str:
    """A figure as text: `-` where unknown, counts whole, the rest to three places."""
    if value is None:
        return "-"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) > 1):
        return f"{int(value):,}"
    return f"{value:.3f}"


def interval(bounds) -> str:
    """An interval as text; empty where there is none."""
    return "" if not bounds else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"
