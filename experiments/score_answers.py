"""Scores a results file of any system with the VQA metric, as the official tool does.

    python -m experiments.score_answers --questions=Q.json --annotations=A.json --results=R.json

The three files are in the official formats, plain or gzip; R is a list of
`{"question_id", "answer"}`. The first line is the overall accuracy in percent; accuracies by
answer type and by question type follow, each with n and a bootstrap 95% interval over questions.
"""

import collections

import numpy as np
from absl import flags
from rich.table import Table
from rich.text import Text

from experiments import cli
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE
from lever_jax.statistics import Estimate, mean_ci
from qwen_bridge.errors import InputError
from qwen_bridge.vqa.accuracy import MODES
from qwen_bridge.vqa.results import ScoredAnswer, score_results

QUESTIONS = flags.DEFINE_string("questions", "", "Official questions file.")
ANNOTATIONS = flags.DEFINE_string("annotations", "", "Its annotations file.")
RESULTS = flags.DEFINE_string(
    "results", "", "Answers to all of its questions: the official results format."
)
METRIC = flags.DEFINE_enum(
    "metric",
    "official_2021",
    tuple(reversed(MODES)),
    "official_2021 repeats the published tool; normalized is this project's reward.",
)
OUT = flags.DEFINE_string("out", None, "JSON file of all figures, accuracies in [0, 1].")

# Past so many questions fewer resamples give the same interval to the second place of a percent.
_MANY, _RESAMPLES, _FEW_RESAMPLES = 20_000, 5_000, 1_000
_UNLABELLED = "(none)"


def main():
    check_out(OUT.value)
    for flag in (QUESTIONS, ANNOTATIONS, RESULTS):
        if not flag.value:
            raise InputError(
                f"--{flag.name} is missing; give --questions, --annotations and --results"
            )
    scored = score_results(QUESTIONS.value, ANNOTATIONS.value, RESULTS.value, METRIC.value)
    accuracies = np.array([one.accuracy for one in scored])
    CONSOLE.print(f"overall {100 * accuracies.mean():.2f}")
    overall = _estimate(accuracies)
    line = f"n = {overall.n:,}, 95% interval {_interval(overall)}, metric {METRIC.value}"
    CONSOLE.print(line, markup=False)
    by_label = {}
    for name in ("answer_type", "question_type"):
        by_label[name] = _by_label(scored, accuracies, name)
        if set(by_label[name]) != {_UNLABELLED}:
            _print_table(name.replace("_", " "), by_label[name])
    write_out(
        OUT.value,
        {
            "metric": METRIC.value,
            **_figures(overall),
            **{
                f"by_{name}": {text: _figures(estimate) for text, estimate in rows.items()}
                for name, rows in by_label.items()
            },
            "by_question": {str(one.question_id): one.accuracy for one in scored},
        },
    )


def _estimate(accuracies: np.ndarray) -> Estimate:
    resamples = _RESAMPLES if len(accuracies) <= _MANY else _FEW_RESAMPLES
    return mean_ci(accuracies, bounds=(0.0, 1.0), resamples=resamples)


def _by_label(scored: list[ScoredAnswer], accuracies: np.ndarray, name: str) -> dict[str, Estimate]:
    """Accuracy of the questions under each label, the most frequent label first."""
    rows = collections.defaultdict(list)
    for row, one in enumerate(scored):
        rows[getattr(one, name) or _UNLABELLED].append(row)
    ordered = sorted(rows, key=lambda text: (-len(rows[text]), text))
    return {text: _estimate(accuracies[rows[text]]) for text in ordered}


def _print_table(name: str, rows: dict[str, Estimate]):
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(name, no_wrap=True)
    for column in ("accuracy", "95% interval", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for text, estimate in rows.items():
        value = f"{100 * estimate.value:.2f}"
        table.add_row(Text(text), value, _interval(estimate), f"{estimate.n:,}")
    CONSOLE.print()
    CONSOLE.print(table)


def _interval(estimate: Estimate) -> Text:
    if estimate.low is None:
        return Text("-")
    return Text(f"[{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]")


def _figures(estimate: Estimate) -> dict:
    return {"accuracy": estimate.value, "ci95": estimate.interval, "n": estimate.n}


if __name__ == "__main__":
    cli.run(main)
