"""Reads RL JSON or beams, of others or of another run, into a workdir.

    python -m experiments.import_rl --workdir=runs/theirs --rl_json=FILE --pointers=local [...]
    python -m experiments.train --workdir=runs/theirs --warmup=import --rce_data=both [...]

Everything that could be read in two ways is refused before a GPU-hour is spent: pointers that may
be demonstration ids or positions, labels that contradict each other, ids that mean other examples
here. Labels of others are kept in WORKDIR/imported.json, where warm-up and RCE read them; they
never join the scores of this run. What a run of the very same settings exported can join them:
--import_as=mined. The flags of a run in the workdir are adopted; give the data's flags otherwise.
"""

import pathlib

from absl import flags

from experiments import cli, configs, imported, run_folder
from experiments.progress import note, stage
from lever_jax.errors import InputError
from lever_jax.rl_json import POINTERS, import_rl_json
from lever_jax.store import Store
from qwen_bridge.vqa.sources import open_dataset

RL_JSON = flags.DEFINE_string("rl_json", None, "The file to import.")
POINTERS_ARE = flags.DEFINE_enum(
    "pointers",
    "auto",
    POINTERS,
    "What the numbers in `pointer` are: demonstration ids (global), positions in "
    "candidate_pool_ids (local), or whichever fits, where only one does (auto).",
)
KIND = flags.DEFINE_enum(
    "import_kind", "rl", ("rl", "beams"), "beams: pointers need no label, only a place in a beam."
)
AS = flags.DEFINE_enum(
    "import_as",
    "training",
    ("training", "mined"),
    "training: kept beside the store and trained on. mined: an export of a run of the same model, "
    "prompt, data and metric joins the store, as if it had been mined here.",
)


def main():
    if not RL_JSON.value:
        raise InputError("--rl_json is missing; name the file to import")
    if not pathlib.Path(RL_JSON.value).is_file():
        raise InputError(f"--rl_json={RL_JSON.value} is not a file; name the file to import")
    workdir = run_folder.make_workdir()
    if (workdir / "flags.txt").exists():
        run_folder.adopt_flags(workdir)
    configs.check(scoring=False)
    if AS.value == "mined":
        _join_store(workdir)
    else:
        _keep_beside(workdir)


def _join_store(workdir: pathlib.Path) -> None:
    if KIND.value != "rl":
        raise InputError("--import_as=mined needs scores; --import_kind=beams has none")
    path = workdir / "store.sqlite"
    if not path.is_file():
        raise InputError(
            f"--import_as=mined: {workdir} has no store yet, so nobody knows whether the scores "
            "are of its settings; run experiments.mine there first"
        )
    stage(f"import {RL_JSON.value} into {path}")
    with Store.open(path) as store:
        result = import_rl_json(store, RL_JSON.value, pointers=POINTERS_ARE.value)
    note(
        f"{result.candidates:,} scored pointers of {len(result.descriptions):,} queries, "
        f"{result.known:,} of them known before"
    )


def _keep_beside(workdir: pathlib.Path) -> None:
    path = workdir / imported.NAME
    stage(f"import {RL_JSON.value} to {path}")
    dataset = open_dataset(configs.dataset_settings())
    shots = configs.training_shots()
    fresh = not path.exists()
    count = imported.write_imported(
        workdir, RL_JSON.value, pointers=POINTERS_ARE.value, beams=KIND.value == "beams"
    )
    try:
        imported.fit(workdir, imported.examples(dataset), shots)
    except InputError:
        if fresh:
            path.unlink()
        raise
    note(f"{count:,} queries kept; train on them with --warmup=import or --rce_data=import|both")


if __name__ == "__main__":
    cli.run(main)
