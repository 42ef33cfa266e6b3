"""Puts finished runs side by side, such as the same job under three training seeds.

    python -m experiments.seeds --workdirs=runs/s0,runs/s1,runs/s2 [--out=benchmarks/seeds.json]

Prints each method's accuracy and the share of the gap that it closes, run by run.
"""

import json
import pathlib
import platform
from importlib import metadata

from absl import flags
from rich.table import Table

from experiments import cli
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE
from experiments.tables import number
from lever_jax.decoding import is_oracle
from lever_jax.errors import InputError
from lever_jax.evaluation import gap_closed

WORKDIRS = flags.DEFINE_list("workdirs", None, "Folders of finished runs.", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file of the summary, with versions and machine.")

_PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "numpy")


def read_run(workdir: pathlib.Path) -> dict:
    """Accuracies, gap shares and health of one run.

    Raises:
      InputError: the run has no eval.json, health.json or flags.txt.
    """
    content = {}
    for name in ("eval.json", "health.json", "flags.txt"):
        path = workdir / name
        if not path.exists():
            raise InputError(f"--workdirs: {path} is missing; finish the run first")
        content[path.stem] = path.read_text()
    content |= {name: json.loads(content[name]) for name in ("eval", "health")}
    shots = {
        shots: {
            method: {**row, "gap_closed": gap_closed(rows, method)} for method, row in rows.items()
        }
        for shots, rows in content["eval"]["shots"].items()
    }
    return {
        "workdir": str(workdir),
        "flags": content["flags"].split(),
        "n": content["eval"]["n"],
        "metric": content["eval"]["metric"],
        "shots": shots,
        "paired": content["eval"]["paired"],
        "spearman_gt_prob_accuracy": content["health"]["spearman_gt_prob_accuracy"],
    }


def print_runs(runs: list[dict]) -> None:
    """Prints one table a number of shots, a column a run."""
    for shots, methods in runs[0]["shots"].items():
        table = Table(title=f"{shots} shots, n = {runs[0]['n']}: accuracy (gap closed)")
        table.add_column("method", no_wrap=True)
        for run in runs:
            table.add_column(pathlib.Path(run["workdir"]).name, justify="right", no_wrap=True)
        for method in methods:
            cells = []
            for run in runs:
                row = run["shots"].get(shots, {}).get(method)
                if row is None:
                    cells.append("-")
                    continue
                closed = (
                    row["gap_closed"]
                    if method.startswith("selector") and not is_oracle(method)
                    else None
                )
                share = "" if closed is None else f" ({closed:.0%})"
                cells.append(number(row["accuracy"]) + share)
            table.add_row(method, *cells)
        CONSOLE.print(table)


def main():
    check_out(OUT.value)
    runs = [read_run(pathlib.Path(workdir)) for workdir in WORKDIRS.value]
    print_runs(runs)
    write_out(
        OUT.value,
        {
            "versions": {name: metadata.version(name) for name in _PACKAGES},
            "device": f"{platform.machine()}, {platform.processor() or 'CPU'}",
            "python": platform.python_version(),
            "runs": runs,
        },
    )


if __name__ == "__main__":
    cli.run(main)
