"""The workdir of a run, and the flags it keeps: written by a run, adopted by those after it."""

import dataclasses
import pathlib

from experiments import configs, settings
from experiments.output import write_out
from lever_jax.demonstrations import RUN_FILE
from lever_jax.errors import InputError

# Flags that decide what an evaluation table holds; see `evaluation_changes`.
_EVALUATION = (
    "shots", "metric", "decodings", "beam_width", "rerank_width", "random_seeds",
    "mmr_trade_off", "oracle_beam", "num_eval",
)  # fmt: skip

# Flags that say where or how to run, not what: a run may be continued with others.
_NOT_ADOPTED = frozenset(
    "workdir flagfile undefok device workers threads engine ray_address gpus_per_worker factory "
    "retry_failed".split()
)


def make_workdir() -> pathlib.Path:
    """Makes the folder of the run.

    Raises:
      InputError: it cannot be made or written.
    """
    workdir = pathlib.Path(settings.WORKDIR.value)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
    return workdir


def own_flags() -> dict[str, str]:
    """Every flag of ours as `--name=value` text, by name."""
    defined = settings.FLAGS.flags_by_module_dict()[settings.__name__]
    return {
        flag.name: flag.serialize()
        for flag in defined
        if flag.name != "workdir" and not flag.name.startswith("plan")
    }


def save_flags(workdir: pathlib.Path) -> None:
    """Writes the flags as run; `--flagfile=WORKDIR/flags.txt` repeats the run. Also run.json.

    S of training is written as a number, so that evaluating other shots does not change it.
    """
    resolved = f"--train_shots={configs.training_shots()}"
    lines = [line for line in {**own_flags(), "train_shots": resolved}.values() if line]
    (workdir / "flags.txt").write_text("\n".join([f"--workdir={workdir}", *lines]) + "\n")
    write_out(str(workdir / RUN_FILE), run_settings())


def run_settings() -> dict:
    """What it takes to use the run's selector elsewhere; `lever_jax.demonstrations` reads it.

    Files and folders have their absolute paths, so that any program finds them.
    """
    return {
        "worker": configs.absolute_worker_settings(),
        "pools": dataclasses.asdict(configs.pool_config()),
        "embeddings_dir": str(configs.embeddings_dir().absolute()),
        "max_bad_images": settings.MAX_BAD_IMAGES.value,
    }


def adopt_flags(workdir: pathlib.Path) -> None:
    """Takes over the flags of an earlier run, but for those given on the command line.

    Raises:
      InputError: there is no run in `workdir`.
    """
    path = workdir / "flags.txt"
    if not path.exists():
        raise InputError(f"--workdir={workdir} holds no run (no flags.txt); train there first")
    for line in path.read_text().splitlines():
        name, _, value = line.removeprefix("--").partition("=")
        if not line.startswith("--") or name in _NOT_ADOPTED:
            continue
        if name.startswith("no") and name[2:] in settings.FLAGS:
            name, value = name[2:], "false"
        elif name in settings.FLAGS and settings.FLAGS[name].flag_type() == "bool":
            value = value or "true"
        if name in settings.FLAGS and not settings.FLAGS[name].present:
            settings.FLAGS[name].parse(value)


def evaluation_changes(workdir: pathlib.Path) -> list[str]:
    """What differs from the evaluation of the run itself, as `shots-1-2-4`; flags are adopted."""
    run = dict(
        line.removeprefix("--").partition("=")[::2]
        for line in (workdir / "flags.txt").read_text().splitlines()
    )
    changes = []
    for name in _EVALUATION:
        value = settings.FLAGS[name].serialize().partition("=")[2]
        if value != run.get(name, _default(name)):
            changes.append(f"{name}-{value.replace(',', '-')}")
    return changes


def _default(name: str) -> str:
    """A flag's default as it would stand in flags.txt."""
    default = settings.FLAGS[name].default
    return ",".join(default) if isinstance(default, list) else str(default)
