"""What a run prints: the health of the data and the evaluation table."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from experiments.progress import CONSOLE, note
from lever_jax.decoding import is_oracle
from lever_jax.evaluation import gap_closed

_SIDE_BY_SIDE, _TYPES_SHOWN, _MARK = 2, 3, " *"

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


def print_analysis(result: dict[str, Any]) -> None:
    """Prints what analysis.json has beyond the health figures, and what could not be measured."""
    table = Table(title="behind the figures", title_justify="left")
    for column in ("figure", "value", "95% interval", "n"):
        side = "left" if column == "figure" else "right"
        table.add_column(column, justify=side, no_wrap=True)

    def row(name: str, entry: dict[str, Any]) -> None:
        table.add_row(name, number(entry["value"]), interval(entry["ci95"]), number(entry["n"]))

    for name, entry in result["explained_by_source"].items():
        if name != "by_source":
            row(f"variance explained by source, {name}", entry)
    for name, entry in result["calibration"]["spearman"].items():
        row(f"spearman of gt_prob and accuracy, {name}", entry)
    for name, entry in (result["similarity"] or {}).items():
        if name != "n":
            row(f"similarity, {name}", entry)
    noise = result["rescored"] or (result["duplicates"] or {}).get("label_noise") or {}
    for name, entry in noise.items():
        if name != "pairs":
            row(f"label noise, {name}", entry)
    health = result["health"]
    for name in ("headroom_left", "training_use", "ceiling_gain", "ceiling_found"):
        if health[name] is not None:
            table.add_row(name, number(health[name]), interval(health["ci95"][name]), "")
    CONSOLE.print(table)
    for failure in result["failures"][:5]:
        note(f"eval_failed: {failure['count']:,} x {failure['reason']}")
    for text in result["missing"]:
        note(f"not measured: {text}")


def print_evaluation(result: dict[str, Any]) -> None:
    """Prints accuracy with n and interval by method, shots and answer type; paired differences."""
    shots = list(result["shots"])
    # Two numbers of shots side by side fit 100 columns.
    for first in range(0, len(shots), _SIDE_BY_SIDE):
        _print_accuracy(result, shots[first : first + _SIDE_BY_SIDE])
    _print_by_type(result, shots[-1])
    table = _table("paired differences on the same queries")
    for column in ("a - b", "shots", "diff", "95% interval", "n"):
        _add_column(table, column)
    for row in result["paired"]:
        name = f"{_labelled(row['a'])} - {_labelled(row['b'])}"
        table.add_row(name, str(row["shots"]), *_difference(row), str(row["n"]))
    CONSOLE.print(table)
    for count in shots:
        if seeds := result["shots"][count]["random"].get("seeds"):
            low, high, sd = (number(seeds[name]) for name in ("min", "max", "sd"))
            note(f"random, {count} shots: {seeds['count']} seeds from {low} to {high}, sd {sd}")
        for method, row in result["shots"][count].items():
            if "mean_shots" in row:
                note(f"{method}, up to {count} shots: shows {row['mean_shots']:.2f} on average")
    if any(map(is_oracle, result["shots"][shots[-1]])):
        note(f"{_MARK.strip()} reads the ground truth: an oracle, which nobody can deploy")


def print_comparison(result: dict[str, Any]) -> None:
    """Prints the paired differences of two runs, see `compare.compare`."""
    table = _table(f"a - b on the same queries, VQA accuracy ({result['metric']})")
    for column in ("method", "shots", "a", "b", "diff", "95% interval", "n", "same prompt"):
        _add_column(table, column)
    for row in result["rows"]:
        table.add_row(
            _labelled(row["method"]),
            str(row["shots"]),
            number(row["a"]),
            number(row["b"]),
            *_difference(row),
            str(row["n"]),
            "-" if row["same_prompt"] is None else f"{row['same_prompt']:.0%}",
        )
    CONSOLE.print(table)


def _print_accuracy(result: dict[str, Any], shots: list[str]) -> None:
    title = f"VQA accuracy ({result['metric']}), n = {result['n']} evaluation queries"
    table = _table(title)
    _add_column(table, "method")
    tables = [result["shots"][count] for count in shots]
    partly = any(row["n"] != result["n"] for rows in tables for row in rows.values())
    for count in shots:
        _add_column(table, f"{count} shot{'s' if count != '1' else ''}")
        _add_column(table, "95% interval")
        if partly:
            _add_column(table, "n")
        _add_column(table, "closed")
    for method in dict.fromkeys(method for rows in tables for method in rows):
        cells = []
        for rows in tables:
            row = rows[method]
            deployable = method.startswith("selector") and not is_oracle(method)
            closed = gap_closed(rows, method) if deployable else None
            cells += [number(row["accuracy"]), interval(row["ci95"])]
            cells += [str(row["n"])] if partly else []
            cells.append("" if closed is None else f"{closed:.0%}")
        table.add_row(_labelled(method), *cells)
    CONSOLE.print(table)


def _print_by_type(result: dict[str, Any], shots: str) -> None:
    """Accuracy by the most frequent answer types; all of them are in eval.json."""
    rows = result["shots"][shots]
    types = list(rows["zero_shot"].get("by_answer_type", {}))[:_TYPES_SHOWN]
    if not types:
        return
    table = _table(f"by answer type, {shots} shot{'s' if shots != '1' else ''}")
    _add_column(table, "method")
    for name in types:
        n = rows["zero_shot"]["by_answer_type"][name]["n"]
        table.add_column(Text(f"{name}, n = {n}"), justify="right")
    for method, row in rows.items():
        figures = [row["by_answer_type"].get(name) for name in types]
        cells = [
            "-" if one is None else f"{number(one['accuracy'])} {interval(one['ci95'])}"
            for one in figures
        ]
        table.add_row(_labelled(method), *cells)
    CONSOLE.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _add_column(table: Table, name: str) -> None:
    side = "left" if name in ("method", "a - b") else "right"
    table.add_column(name, justify=side, no_wrap=True)


def _labelled(method: str) -> str:
    return f"{method}{_MARK}" if is_oracle(method) else method


def _difference(row: dict[str, Any]) -> tuple[str, str]:
    return (f"{row['diff']:+.3f}" if row["diff"] is not None else "-"), interval(row["ci95"])


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
