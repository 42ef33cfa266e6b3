"""Is it the data or the training? Every figure of a run or of any RL JSON, and the verdict.

    python -m experiments.analyze --workdir=runs/digits [--ceiling_queries=50]
    python -m experiments.analyze --rl_json=FILE [--pointers=local] [--analysis=FOLDER]

A run is read from its workdir: no VLM, but for --ceiling_queries. Figures go to analysis.json and
analysis.csv (see `experiments.analysis`), pictures to report.html, into the workdir or, for a file,
into FILE.analysis. The reward judged is that of the reward flags.
"""

import pathlib

from absl import flags

from experiments import cli, configs, run_folder, settings
from experiments.analysis import analyze_file, analyze_run, write_analysis
from experiments.ceiling import search_ceiling
from experiments.progress import note, stage
from experiments.reporting import write_report
from experiments.stored import read_run
from experiments.tables import print_analysis, print_health
from lever_jax.errors import InputError
from lever_jax.rl_json import POINTERS
from qwen_bridge.vqa.sources import open_dataset

RL_JSON = flags.DEFINE_string("rl_json", None, "Analyze this file instead of a workdir.")
POINTERS_ARE = flags.DEFINE_enum(
    "pointers",
    "auto",
    POINTERS,
    "What the numbers in `pointer` of --rl_json are: demonstration ids (global), positions in "
    "candidate_pool_ids (local), or whichever fits, where only one does (auto).",
)
ANALYSIS = flags.DEFINE_string(
    "analysis", None, "Folder of the result; default the workdir, or FILE.analysis."
)
CEILING_QUERIES = flags.DEFINE_integer(
    "ceiling_queries",
    0,
    "Training queries whose pools an extra search looks into, through the VLM, to tell a pool "
    "without right pointers from proposals that miss them; 50 are enough to see which.",
    lower_bound=0,
)


def main():
    if RL_JSON.value:
        if CEILING_QUERIES.value:
            raise InputError(
                "--ceiling_queries asks a VLM, which --rl_json has not; give a workdir"
            )
        if not pathlib.Path(RL_JSON.value).is_file():
            raise InputError(f"--rl_json={RL_JSON.value} is not a file; name the file to analyze")
        configs.check(scoring=False)
        stage(f"analyze {RL_JSON.value}")
        result = analyze_file(RL_JSON.value, POINTERS_ARE.value)
        folder, workdir, dataset = pathlib.Path(f"{RL_JSON.value}.analysis"), None, None
    else:
        workdir = folder = pathlib.Path(settings.WORKDIR.value)
        run_folder.adopt_flags(workdir)
        configs.check(scoring=CEILING_QUERIES.value > 0)
        stage(f"analyze {workdir}")
        dataset = open_dataset(configs.dataset_settings())
        if CEILING_QUERIES.value:
            _search(workdir, dataset)
        result = analyze_run(workdir, dataset)
    folder = pathlib.Path(ANALYSIS.value) if ANALYSIS.value else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--analysis={folder} cannot be made: {error.strerror}") from None
    write_analysis(folder, result)
    print_health(result["health"])
    print_analysis(result)
    size = write_report(folder / "report.html", result, workdir, dataset)
    note(f"written: analysis.json, analysis.csv, report.html ({size / 1024:,.0f} KiB) in {folder}")


def _search(workdir, dataset) -> None:
    from experiments.session import open_session  # starts JAX and the VLM: only where needed

    measured = read_run(workdir, dataset).stage
    with open_session(workdir) as session:
        search_ceiling(session, measured, CEILING_QUERIES.value)


if __name__ == "__main__":
    cli.share_gpu()
    cli.run(main)
