"""The figures as rows for CSV: health.csv and analysis.csv."""

from typing import Any

_NOT_IN_CSV = ("ci95", "reasons", "evidence", "stage", "title")


def health_csv(health: dict[str, Any]) -> list[tuple]:
    """The figures of `measure_health` as rows for `csv.writer`, header first.

    Columns: `figure` (nested names joined by a dot, as in by_source.beam.positive_rate), `value`
    (empty if unknown), and `low` and `high`, the 95% interval (empty if the figure has none).
    """
    table: list[tuple] = [("figure", "value", "low", "high")]
    for name, value in health.items():
        if name in _NOT_IN_CSV:
            continue
        if name == "by_source":
            for source, entry in value.items():
                for key in ("candidates", "verified", "estimated_from", "positive_rate"):
                    interval = entry["ci95"] if key == "positive_rate" else None
                    table.append((f"{name}.{source}.{key}", entry[key], *(interval or (None,) * 2)))
        elif isinstance(value, dict):
            table.extend((f"{name}.{key}", number, None, None) for key, number in value.items())
        else:
            table.append((name, value, *(health["ci95"].get(name) or (None, None))))
    return table


def analysis_csv(result: dict[str, Any]) -> list[tuple]:
    """The figures of `analyze` as rows for `csv.writer`, header first.

    Columns:
      section   a key of analysis.json, such as calibration; `health` has the rows of `health_csv`
      series    which curve or group in it: a source, an answer type, a shot; may be empty
      figure    what is given, such as accuracy
      x         where on the curve: gt_prob's bin (its lower edge), evaluations, the position in
                the pool, the lower edge of a reward range; empty for single figures
      n         observations behind the value (candidates, queries or pairs); may be empty
      value     the figure; empty if unknown
      low, high its 95% interval; empty if it has none
    """
    header = ("section", "series", "figure", "x", "n", "value", "low", "high")
    return [header, *_rows(result)]


def _rows(result: dict[str, Any]):
    for figure, value, low, high in health_csv(result["health"])[1:]:
        yield ("health", "", figure, None, None, value, low, high)
    ranges = result["reward_ranges"]
    for edge, count in zip(ranges["edges"], ranges["counts"]):
        yield ("reward_ranges", "", "queries", edge, None, count, None, None)
    explained = result["explained_by_source"]
    for name in ("of_reward", "within_query"):
        yield _entry("explained_by_source", "", f"eta_squared_{name}", explained[name])
    for source, entry in explained["by_source"].items():
        yield _entry("explained_by_source", source, "mean_reward", entry)
    for row in result["positions"] or []:
        series, at, n = f"shot {row['shot']}", row["position"], row["n"]
        interval = row["ci95"] or (None, None)
        rate = row["positive_rate"]
        yield ("positions", series, "positive_rate", at, n, rate, *interval)
        yield ("positions", series, "gt_prob", at, n, row["gt_prob"], None, None)
    repeated = result["duplicates"] or {}
    for name in ("duplicates", "queries_with_duplicates"):
        if name in repeated:
            yield ("duplicates", "", name, None, None, repeated[name], None, None)
    for section, noise in (
        ("duplicates", repeated.get("label_noise")),
        ("rescored", result.get("rescored")),
    ):
        for name, entry in (noise or {}).items():
            if name != "pairs":
                yield _entry(section, "label_noise", name, entry)
    for row in result["failures"]:
        yield ("failures", row["reason"], "share", None, row["count"], row["share"], None, None)
    for row in result["calibration"]["bins"]:
        interval = row["ci95"] or (None, None)
        yield ("calibration", "", "accuracy", row["low"], row["n"], row["accuracy"], *interval)
        at, n = row["low"], row["n"]
        yield ("calibration", "", "mean_gt_prob", at, n, row["mean_gt_prob"], None, None)
    yield ("calibration", "", "gap", None, None, result["calibration"]["gap"], None, None)
    for series, entry in result["calibration"]["spearman"].items():
        yield _entry("calibration", series, "spearman", entry)
    for name, entry in (result["similarity"] or {}).items():
        if name != "n":
            yield _entry("similarity", "", name, entry)
    for source, points in result["coverage"].items():
        for point in points:
            interval = point["ci95"] or (None, None)
            at, n = point["evaluations"], point["queries"]
            yield ("coverage", source, "share", at, n, point["share"], *interval)


def _entry(section: str, series: str, figure: str, entry: dict[str, Any]) -> tuple:
    interval = entry["ci95"] or (None, None)
    return (section, series, figure, None, entry["n"], entry["value"], *interval)
