"""Figures of a run or of an RL JSON file, and the files they go to.

analysis.json  every figure, as `lever_jax.diagnostics.analyze` says, and: source (workdir or
               file), stage, trained (the selector whose picks count as trained), rescored (label
               noise of prompts scored twice, see `spread.label_noise`), warnings (of training)
analysis.csv   the same as rows; columns as in `diagnostics.tables.analysis_csv`
"""

import csv
import io
import json
import pathlib
from typing import Any

from experiments import configs, settings
from experiments.output import whole_file
from experiments.progress import bar
from experiments.stored import read_run
from lever_jax.diagnostics import analysis_csv, analyze
from lever_jax.rl_candidates import candidates_of
from lever_jax.rl_json import read_rl_json
from qwen_bridge.vqa.examples import Dataset


def analyze_run(workdir: pathlib.Path, dataset: Dataset) -> dict[str, Any]:
    """The figures of what a run mined; its flags are adopted already."""
    data = read_run(workdir, dataset)
    result = analyze(
        data.candidates,
        picks=data.picks,
        trained=data.trained,
        ceiling=data.ceiling,
        thresholds=configs.thresholds(),
        min_range=settings.MIN_RANGE.value,
    )
    about = {"source": str(workdir), "stage": data.stage, "trained": data.trained_name}
    return {**about, **result, "rescored": data.rescored}


def analyze_file(path: str, pointers: str) -> dict[str, Any]:
    """The figures of an RL JSON file, by the reward that the flags describe.

    Pointers may lack labels, as beams of others do: the figures say what is missing.
    """
    meta, entries = read_rl_json(path, pointers=pointers, unlabelled=True)
    with bar(f"read {pathlib.Path(path).name}: queries", None) as advance:

        def counted():
            for entry in entries:
                advance(1)
                yield entry

        candidates = candidates_of(
            counted(), configs.reward_config(), settings.VERIFY_UNIFORM.value
        )
    result = analyze(
        candidates, thresholds=configs.thresholds(), min_range=settings.MIN_RANGE.value
    )
    about = {"source": str(path), "stage": meta.get("stage"), "trained": None}
    return {**about, **result, "rescored": None}


def write_analysis(folder: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes analysis.json and analysis.csv."""
    with whole_file(folder / "analysis.json") as write:
        write(json.dumps(result, indent=1, allow_nan=False) + "\n")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(analysis_csv(result))
    with whole_file(folder / "analysis.csv") as write:
        write(text.getvalue())
