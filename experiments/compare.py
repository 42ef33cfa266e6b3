"""Compares two evaluated runs query by query, from their picks alone: no VLM, no checkpoint.

Serves `python -m experiments.evaluate --workdir=A --compare=B`. Every method that both runs have
is compared on the queries that both answered, at each number of shots, so the difference is paired.
"""

import collections
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from experiments.output import write_out
from experiments.progress import bar, note
from experiments.tables import print_comparison
from lever_jax.errors import InputError
from lever_jax.evaluation import METRICS
from lever_jax.statistics import paired_difference

_NEEDED = {
    "query_id": int, "method": str, "shots": int, "draw": int, "prompt_hash": str,
    "query_hash": str, "dataset": str, "model": str,
}  # fmt: skip


@dataclasses.dataclass
class RunPicks:
    """What a comparison needs of one picks.jsonl.

    Attributes:
      path: the file.
      dataset, model: fingerprints, the same in every line.
      queries: query id to query hash.
      scores: (shots, method) to query id to draw to (prompt hash, accuracy); NaN where it failed.
    """

    path: pathlib.Path
    dataset: str = ""
    model: str = ""
    queries: dict[int, str] = dataclasses.field(default_factory=dict)
    scores: dict[tuple[int, str], dict[int, dict[int, tuple[str, float]]]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(lambda: collections.defaultdict(dict))
    )


def picks_of(place: str | pathlib.Path, flag: str) -> pathlib.Path:
    """The picks of a workdir, or the file itself.

    Raises:
      InputError: there are none.
    """
    path = pathlib.Path(place)
    path = path / "picks.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"--{flag}={place}: there is no {path}; make it with python -m experiments.evaluate "
            "--workdir=..., or name a folder or file that has picks"
        )
    return path


def read_picks(path: pathlib.Path, metric: str) -> RunPicks:
    """Reads a picks.jsonl.

    Args:
      path: the file.
      metric: of `METRICS`.

    Raises:
      InputError: the file is no picks.jsonl, was cut, holds a line twice or lines of two runs.
    """
    run = RunPicks(path)
    with bar(f"read {path.name}, bytes", path.stat().st_size) as advance, path.open("rb") as stream:
        for number, text in enumerate(stream, start=1):
            advance(len(text))
            _add(run, _line(text, METRICS[metric], f"{path}, line {number}"))
    if not run.queries:
        raise InputError(f"{path} is empty; evaluate the run again")
    return run


def compare(a: RunPicks, b: RunPicks, metric: str) -> dict[str, Any]:
    """Paired differences a - b of every method that both have.

    Args:
      a, b: of the same queries, at least in part.
      metric: that they were read with.

    Returns:
      {"a", "b", "metric", "queries": {"a", "b", "common"}, "same_dataset", "same_model",
      "only_a", "only_b", "rows": [{"method", "shots", "a", "b", "diff", "ci95", "n",
      "same_prompt"}]}. A method with several draws counts by its mean over them. n are the queries
      that neither run failed on; a and b their accuracies; same_prompt the share of them whose
      prompts are the same in both runs, draw by draw.

    Raises:
      InputError: the runs share no query, or an id means another query in the other run.
    """
    common = sorted(a.queries.keys() & b.queries.keys())
    both = f"{a.path} and {b.path}"
    if not common:
        raise InputError(f"{both} have no query in common; compare runs on the same data set")
    for query_id in common:
        if a.queries[query_id] != b.queries[query_id]:
            raise InputError(
                f"{both} are of different data sets: query {query_id} is another question, picture "
                "or answer; compare runs on the same data set and world"
            )
    rows = []
    for shots, method in filter(b.scores.__contains__, a.scores):
        ours, theirs = a.scores[shots, method], b.scores[shots, method]
        pairs = [(ours[q], theirs[q]) for q in common if q in ours and q in theirs]
        values = np.array([[_mean(x), _mean(y)] for x, y in pairs]).reshape(-1, 2)
        known = np.isfinite(values).all(axis=1)
        values = values[known]
        estimate = paired_difference(values[:, 0], values[:, 1], bounds=(-1.0, 1.0))
        same = [_prompts(x) == _prompts(y) for (x, y), kept in zip(pairs, known) if kept]
        means = values.mean(axis=0).tolist() if len(values) else (None, None)
        rows.append(
            {
                "method": method,
                "shots": shots,
                "a": means[0],
                "b": means[1],
                "diff": estimate.value,
                "ci95": estimate.interval,
                "n": estimate.n,
                "same_prompt": float(np.mean(same)) if same else None,
            }
        )
    return {
        "a": str(a.path),
        "b": str(b.path),
        "metric": metric,
        "queries": {"a": len(a.queries), "b": len(b.queries), "common": len(common)},
        "same_dataset": a.dataset == b.dataset,
        "same_model": a.model == b.model,
        "only_a": _names(a.scores.keys() - b.scores.keys()),
        "only_b": _names(b.scores.keys() - a.scores.keys()),
        "rows": rows,
    }


def compare_runs(a: pathlib.Path, b: pathlib.Path, metric: str, out: str | None) -> None:
    """Compares two picks.jsonl, prints the table and writes it to `out` if that is given."""
    result = compare(read_picks(a, metric), read_picks(b, metric), metric)
    counts = result["queries"]
    note(f"a: {a}, {counts['a']:,} queries")
    note(f"b: {b}, {counts['b']:,} queries; {counts['common']:,} are in both")
    if not result["same_dataset"]:
        note("the data sets differ (bank or number of queries); the queries in both are the same")
    if not result["same_model"]:
        note("the VLMs differ (weights, tokenizer, precision or image settings)")
    print_comparison(result)
    for side in ("a", "b"):
        if result[f"only_{side}"]:
            note(f"only in {side}: {', '.join(result[f'only_{side}'])}")
    write_out(out, result)


def _line(text: bytes, accuracy: str, place: str) -> dict[str, Any]:
    """A checked line, its accuracy under `value`."""
    try:
        line = json.loads(text)
        for name, kind in _NEEDED.items():
            if type(line[name]) is not kind:
                raise ValueError(f"{name} is {line[name]!r}")
        value = line[accuracy]
        if value is not None and line["eval_failed"] is not None:
            raise ValueError(f"{accuracy} is {value!r} and eval_failed {line['eval_failed']!r}")
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{accuracy}={value!r} is outside [0, 1]")
    except KeyError as error:
        raise InputError(f"{place}: no {error}; this is no picks.jsonl of ours") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{place} is cut or was edited ({error}); evaluate again") from None
    return {**line, "value": np.nan if value is None else float(value), "place": place}


def _add(run: RunPicks, line: dict[str, Any]) -> None:
    query_id, place = line["query_id"], line["place"]
    if not run.queries:
        run.dataset, run.model = line["dataset"], line["model"]
    if (line["dataset"], line["model"]) != (run.dataset, run.model):
        raise InputError(f"{place} is of another data set or VLM than the lines before it")
    if run.queries.setdefault(query_id, line["query_hash"]) != line["query_hash"]:
        raise InputError(f"{place}: query {query_id} is another one than in the lines before it")
    draws = run.scores[line["shots"], line["method"]][query_id]
    if line["draw"] in draws:
        raise InputError(
            f"{place}: query {query_id} has {line['method']}, {line['shots']} shots, draw "
            f"{line['draw']} twice"
        )
    draws[line["draw"]] = line["prompt_hash"], line["value"]


def _mean(draws: dict[int, tuple[str, float]]) -> float:
    return float(np.mean([value for _, value in draws.values()]))


def _prompts(draws: dict[int, tuple[str, float]]) -> list[tuple[int, str]]:
    return sorted((draw, prompt) for draw, (prompt, _) in draws.items())


def _names(keys) -> list[str]:
    return [f"{method} ({shots} shots)" for shots, method in sorted(keys)]
