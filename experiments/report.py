"""The report of a run: one HTML file, self-contained, for reading, printing and sending around.

    python -m experiments.report --workdir=runs/a [--compare=runs/b] [--report=FILE]

No VLM and no network: it is made from what the run wrote. Without analysis.json the figures are
computed first.
"""

import pathlib

from absl import flags

from experiments import cli, configs, run_folder, settings
from experiments.progress import stage
from experiments.reporting import report_run
from lever_jax.errors import InputError
from qwen_bridge.vqa.sources import open_dataset

REPORT = flags.DEFINE_string("report", None, "The file to write; default WORKDIR/report.html.")
COMPARE = flags.DEFINE_string("compare", None, "Workdir of a run to stand beside this one.")


def main():
    workdir = pathlib.Path(settings.WORKDIR.value)
    run_folder.adopt_flags(workdir)
    configs.check(scoring=False)
    other = pathlib.Path(COMPARE.value) if COMPARE.value else None
    if other is not None and not (other / "flags.txt").is_file():
        raise InputError(f"--compare={other} holds no run (no flags.txt); name a workdir")
    stage(f"report of {workdir}")
    dataset = open_dataset(configs.dataset_settings())
    report_run(workdir, dataset, REPORT.value, other)


if __name__ == "__main__":
    cli.run(main)
