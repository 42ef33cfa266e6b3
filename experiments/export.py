"""Writes the data of a run as RL JSON, for other people's tools and for other runs.

    python -m experiments.export --workdir=runs/digits --out=rl.json [--data=imported]

By default what was mined, with every score and answer; or, unchanged, what was imported. The run
may be training meanwhile. The file's form is explained in `lever_jax/rl_json.py`.
"""

import pathlib

from absl import flags

from experiments import cli, configs, imported, run_folder, settings
from experiments.output import check_out
from experiments.progress import bar, note, stage
from experiments.stored import measured_stage
from lever_jax.errors import InputError
from lever_jax.rl_json import export_rl_json, write_rl_json
from lever_jax.store import Store
from qwen_bridge.vqa.accuracy import normalize
from qwen_bridge.vqa.sources import open_dataset

OUT = flags.DEFINE_string("out", None, "The RL JSON file to write; replaced whole.")
DATA = flags.DEFINE_enum("data", "mined", ("mined", "imported"), "Which data of the run.")
STAGE = flags.DEFINE_string(
    "stage", None, "Which proposals, by the store's name; default those of health.json."
)


def main():
    if not OUT.value:
        raise InputError("--out is missing; name the file to write")
    check_out(OUT.value)
    workdir = pathlib.Path(settings.WORKDIR.value)
    stage(f"export the {DATA.value} data of {workdir} to {OUT.value}")
    try:
        count = _mined(workdir) if DATA.value == "mined" else _imported(workdir)
    except OSError as error:
        raise InputError(f"--out={OUT.value} cannot be written: {error.strerror}") from None
    note(f"{count:,} queries written")


def _mined(workdir: pathlib.Path) -> int:
    run_folder.adopt_flags(workdir)
    dataset = open_dataset(configs.dataset_settings())
    with Store.open(workdir / "store.sqlite", read_only=True) as store:
        if store.fingerprint["dataset"] != dataset.fingerprint:
            raise InputError(
                f"{workdir} was mined on other data than its flags name now; put the files back as "
                "they were, or the texts beside the pointers would be wrong"
            )
        name = measured_stage(store, workdir, STAGE.value)
        query_ids = store.proposed_queries(name).tolist()
        with bar("export: queries", len(query_ids)) as advance:

            def describe(query_id: int) -> dict:
                advance(1)
                example = dataset.example("query", query_id)
                return {
                    "question": example.question,
                    "gt_answers_raw": list(example.answers),
                    "gt_answers_norm": [normalize(answer) for answer in example.answers],
                }

            totals = export_rl_json(
                store, OUT.value, stage=name, describe=describe, query_ids=query_ids
            )
    note(f"{totals['candidates']:,} pointers; {totals['unscored']:,} without a score left out")
    return totals["queries"]


def _imported(workdir: pathlib.Path) -> int:
    if STAGE.value is not None:
        raise InputError("--stage is for --data=mined")
    if not (workdir / imported.NAME).is_file():
        raise InputError(f"{workdir} has imported nothing; run experiments.import_rl there first")
    meta, entries = imported.read_imported(workdir)
    return write_rl_json(OUT.value, meta, entries)


if __name__ == "__main__":
    cli.run(main)
