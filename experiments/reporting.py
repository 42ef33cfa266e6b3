"""What stands in report.html, and its writing: figures to charts, charts to one page."""

import importlib.resources
import json
import pathlib
from typing import Any

import jinja2

from experiments import charts
from experiments.analysis import analyze_run, write_analysis
from experiments.compare import compare, picks_of, read_picks
from experiments.curves import learning_curves
from experiments.gallery import KINDS, gallery
from experiments.output import whole_file
from experiments.progress import note
from experiments.tables import SHOWN, number
from lever_jax.decoding import is_oracle
from lever_jax.errors import InputError
from lever_jax.run_warnings import find_warnings
from qwen_bridge.vqa.examples import Dataset

_GROUPS = ("baseline", "selector", "oracle: reads the ground truth")
_CURVES = {  # metric: (title, flag or meaning)
    "loss": "loss, nats",
    "entropy": "entropy of the policy, nats",
    "kl": "KL to the reference, nats",
    "clip_share": "share of ratios clipped",
    "flat_share": "share of groups that are flat and dropped",
    "advantage_abs": "mean |advantage|",
    "grad_norm": "gradient norm",
    "sample_reward": "reward of samples",
    "sample_accuracy": "accuracy of samples",
    "greedy_reward": "reward of the greedy pick",
    "greedy_accuracy": "accuracy of the greedy pick",
    "similarity_overlap": "overlap of picks with similarity retrieval",
}


def write_report(
    path: pathlib.Path,
    result: dict[str, Any] | None,
    workdir: pathlib.Path | None,
    dataset: Dataset | None,
    other: pathlib.Path | None = None,
) -> int:
    """Writes the report.

    Args:
      path: the file.
      result: the figures, as in analysis.json; None where nothing was mined.
      workdir: of the run; None for a file of mined data.
      dataset: for texts and pictures; None without them.
      other: workdir of a run to compare with.

    Returns:
      Its size in bytes.

    Raises:
      InputError: a file of the run is damaged, or the runs cannot be compared.
    """
    runs = [_run(workdir, result, dataset)]
    comparison = None
    if other is not None:
        runs.append(_run(other, _json(other / "analysis.json"), None))
        runs[1]["gallery"] = None
        comparison = _comparison(workdir, other, runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = number
    environment.filters["interval"] = lambda bounds: (
        "" if not bounds else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"
    )
    folder = importlib.resources.files("experiments") / "templates"
    environment.loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8"))
    text = environment.get_template("report.html").render(
        runs=runs,
        comparison=comparison,
        evaluation=_evaluation_charts(runs),
        kinds=KINDS,
        style=(folder / "report.css").read_text("utf-8"),
    )
    with whole_file(path, "report") as write:
        write(text)
    return path.stat().st_size


def report_run(
    workdir: pathlib.Path,
    dataset: Dataset,
    path: str | None = None,
    other: pathlib.Path | None = None,
) -> None:
    """Analyzes a run, as far as it mined anything, and writes its report.

    Args:
      workdir: of the run; its flags are adopted already.
      dataset: of the run.
      path: the file; report.html of the workdir by default.
      other: workdir of a run to compare with.
    """
    result = None
    if (workdir / "health.json").is_file():
        result = analyze_run(workdir, dataset)
        write_analysis(workdir, result)
    file = pathlib.Path(path) if path else workdir / "report.html"
    size = write_report(file, result, workdir, dataset, other)
    note(f"report: {file} ({size / 1024:,.0f} KiB)")


def _run(workdir, result, dataset) -> dict[str, Any]:
    evaluation = _json(workdir / "eval.json") if workdir else None
    curves = learning_curves(workdir) if workdir else {}
    no_figures = "nothing was mined, so there are no figures of data"
    if workdir and (workdir / "health.json").is_file():
        no_figures = (
            "the data of this run were not analyzed: python -m experiments.analyze "
            f"--workdir={workdir}"
        )
    missing = list(result["missing"]) if result else [no_figures]
    if evaluation is None:
        missing.append("no evaluation (eval.json): accuracy of methods, gallery")
    if not curves:
        missing.append("no training (metrics.jsonl): learning curves")
    shown = gallery(workdir, evaluation, dataset) if evaluation else None
    if evaluation and shown is None:
        missing.append("no picks of a selector beside similarity (picks.jsonl): gallery")
    if shown and shown["missing_pictures"]:
        missing.append(f"{shown['missing_pictures']} pictures of the gallery could not be read")
    return {
        "name": str(workdir) if workdir else result["source"],
        "result": result,
        "no_figures": no_figures,
        "shown": SHOWN,
        "evaluation": evaluation,
        "health_charts": _health_charts(result) if result else [],
        "curves": _curve_charts(curves),
        "warnings": find_warnings(curves),
        "gallery": shown,
        "missing": missing,
    }


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); make it again") from None


def _comparison(workdir, other, runs) -> dict[str, Any] | None:
    if not all((folder / "picks.jsonl").is_file() for folder in (workdir, other)):
        runs[0]["missing"].append("no picks.jsonl in one of the runs: paired comparison")
        return None
    metric = runs[0]["evaluation"]["metric"] if runs[0]["evaluation"] else "normalized"
    a, b = (
        read_picks(picks_of(folder, flag), metric)
        for folder, flag in ((workdir, "workdir"), (other, "compare"))
    )
    return compare(a, b, metric)


def _evaluation_charts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One chart a number of shots: every method with its interval, of one run or of two."""
    tables = [run["evaluation"]["shots"] if run["evaluation"] else {} for run in runs]
    found = []
    for shots in sorted({name for table in tables for name in table}, key=int):
        rows = []
        methods = dict.fromkeys(name for table in tables for name in table.get(shots, {}))
        for method in methods:
            for place, table in enumerate(tables):
                if method not in table.get(shots, {}):
                    continue
                entry = table[shots][method]
                group = place if len(runs) > 1 else _group(method)
                label = f"{method} ({'ab'[place]})" if len(runs) > 1 else method
                rows.append(
                    {
                        "label": label,
                        "value": entry["accuracy"],
                        "ci95": entry["ci95"],
                        "n": entry["n"],
                        "group": group,
                    }
                )
        names = [f"{'ab'[i]}: {run['name']}" for i, run in enumerate(runs)]
        names = names if len(runs) > 1 else _GROUPS
        chart = charts.intervals(rows, x="VQA accuracy, 95% interval", names=names)
        found.append({"shots": shots, "chart": chart, "rows": rows})
    return found


def _group(method: str) -> int:
    return 2 if is_oracle(method) else 1 if method.startswith("selector") else 0


def _band(points: list[dict[str, Any]], x: str, y: str) -> list[tuple]:
    return [(p[x], p[y], *(p["ci95"] or (None, None))) for p in points]


def _health_charts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Title, what it shows, and the chart; those without data are left out."""
    bins = result["calibration"]["bins"]
    positions = result["positions"] or []
    shots = list(dict.fromkeys(row["shot"] for row in positions))
    by_shot = {
        f"{'any shot' if shot == 'any' else f'shot {shot}'}": [
            row for row in positions if row["shot"] == shot
        ]
        for shot in shots
    }
    sources = result["health"]["by_source"]
    ranges = result["reward_ranges"]
    found = [
        (
            "Positive rate by source",
            "Share of answered proposals that were right, of the uniform sample.",
            charts.intervals(
                [
                    {"label": name, "value": e["positive_rate"], "ci95": e["ci95"], "group": 0}
                    for name, e in sources.items()
                ],
                x="positive rate",
            ),
        ),
        (
            "Coverage",
            "Share of queries with a positive against the number of evaluations, in random order. "
            "A curve that still rises at its end asks for more proposals.",
            charts.lines(
                {
                    name: _band(points, "evaluations", "share")
                    for name, points in result["coverage"].items()
                },
                x="evaluations a query",
                y="queries with a positive",
                low=0,
                high=1,
                log=True,
            ),
        ),
        (
            "Calibration",
            "Accuracy of the answer by gt_prob; on the dashed line they agree.",
            charts.lines(
                {"accuracy": _band(bins, "mean_gt_prob", "accuracy")},
                x="gt_prob",
                y="accuracy",
                low=0,
                high=1,
                diagonal=True,
            ),
        ),
        (
            "Spearman by answer type",
            "How well gt_prob orders accuracy; 0 is not at all (negative values are not drawn).",
            charts.intervals(
                [
                    {
                        "label": name,
                        "value": None if e["value"] is None else max(e["value"], 0.0),
                        "ci95": e["ci95"] and [max(bound, 0.0) for bound in e["ci95"]],
                        "group": 0,
                    }
                    for name, e in result["calibration"]["spearman"].items()
                ],
                x="rank correlation",
            ),
        ),
        (
            "Range of the reward",
            "max - min of the reward in a query's group; groups at 0 are flat and teach nothing.",
            charts.bars(ranges["edges"], ranges["counts"], x="max - min reward", y="queries"),
        ),
        (
            "Positives by place in the pool",
            "Positive rate of proposals that show the candidate at that place; pools are ordered "
            "by similarity, 0 is the most similar.",
            charts.lines(
                {name: _band(rows, "position", "positive_rate") for name, rows in by_shot.items()},
                x="position in the pool",
                y="positive rate",
                low=0,
            ),
        ),
        (
            "gt_prob by place in the pool",
            "Mean gt_prob of the same proposals.",
            charts.lines(
                {
                    name: [(row["position"], row["gt_prob"]) for row in rows]
                    for name, rows in by_shot.items()
                },
                x="position in the pool",
                y="gt_prob",
                low=0,
            ),
        ),
    ]
    return [{"title": t, "text": text, "chart": chart} for t, text, chart in found if chart]


def _curve_charts(curves: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A chart a phase and metric."""
    found = []
    for phase, rows in curves.items():
        for metric, name in _CURVES.items():
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                least = min(value for _, value in points)
                low = 0 if metric != "loss" and least >= 0 else None
                chart = charts.lines({phase: points}, x="optimiser step", y=metric, low=low)
                found.append({"title": f"{phase}: {name}", "chart": chart})
    return found
