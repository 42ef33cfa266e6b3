"""Compares options of the selector on the data of a finished run.

    python -m experiments.compare_selectors --workdir=runs/digits [--out=FILE]

Each option is trained by warm-up and RCE, on the warm-up search and the mined data that the run
has in its store, under `--seeds` training seeds, and its greedy picks on the held-out queries are
answered through the same store. Printed is the accuracy (mean over seeds, interval over queries)
and the paired difference to `default`. An option is flags with their values, as `history=none` or
`layers=2+dropout=0.1`; `default` is the selector of the run.

`stop=true` cannot learn from pointers that all have S demonstrations, so it mines data of its own
with its warmed-up selector, into the run's store. Selectors go to WORKDIR/selectors, from where a
stopped comparison goes on.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import platform
import time

import jax
import numpy as np
from absl import flags
from absl.testing import flagsaver
from rich.table import Table

from experiments import cli, configs, phases, run_folder, settings
from experiments.metrics import MetricsLog
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE, note, stage
from experiments.session import Session, open_session
from experiments.tables import interval, number
from lever_jax.errors import InputError
from lever_jax.evaluation import METRICS, answer_picks
from lever_jax.selector import make_selector
from lever_jax.statistics import mean_ci, paired_difference

DEFAULT = "default"
_OPTIONS = flags.DEFINE_list(
    "options",
    [
        "history=none",
        "history=gate",
        "history=attention",
        "pointer_score=bilinear",
        "pointer_score=additive",
        "diversity=true",
        "dropout=0.1",
        "layers=0",
        "layers=2",
        "width=128",
        "stop=true",
    ],
    "Options compared with the run's selector: flags with values, joined by +.",
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Training seeds of each option.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")
_ALLOWED = (
    "width", "layers", "heads", "history", "pointer_score", "diversity", "stop", "dropout",
    "warmup_targets",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an option came to.

    Attributes:
      accuracy: [seeds, Q] of the greedy picks; NaN where a prompt failed.
      shown: [seeds] demonstrations shown, mean over queries.
    """

    accuracy: np.ndarray
    shown: np.ndarray


def main() -> None:
    """Trains, evaluates, prints and writes."""
    check_out(_OUT.value)
    workdir = pathlib.Path(settings.WORKDIR.value)
    run_folder.adopt_flags(workdir)
    configs.check()
    options = {DEFAULT: {}} | {text: parse_option(text) for text in _OPTIONS.value}
    for name, given in options.items():
        try:
            with flagsaver.as_parsed(**given):
                configs.check()
        except flags.Error as error:
            raise InputError(f"--options: {name}: {' '.join(str(error).split())}") from None
    started, found = time.monotonic(), {}
    with open_session(workdir) as session:
        if "warmup" not in phases.finished_phases(session.workdir):
            raise InputError(f"--workdir={workdir} has no warm-up that mined data; train there")
        mined = phases.mining_stage(phases.restore_phase(session, "warmup"))
        for name, given in options.items():
            each = collections.defaultdict(list)
            for seed in range(_SEEDS.value):
                stage(f"{name}, seed {seed}")
                with flagsaver.as_parsed(seed=str(seed), **given):
                    for what, value in measure(session, mined, name).items():
                        each[what].append(value)
            found[name] = Measured(np.array(each["accuracy"]), np.array(each["shown"]))
        document = {
            "settings": {
                "seeds": _SEEDS.value,
                "shots": configs.training_shots(),
                "metric": settings.METRIC.value,
            },
            "options": compare(found),
            "identity": session.identity,
            "seconds": time.monotonic() - started,
            "load_average_at_end": os.getloadavg(),
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "numpy": np.__version__,
            },
        }
    _show(document["options"])
    write_out(_OUT.value, document)


def parse_option(text: str) -> dict[str, str]:
    """Flags and their values of an option such as `layers=2+dropout=0.1`.

    Raises:
      InputError: it is not of this form, or not of the selector.
    """
    given = {}
    for item in text.split("+"):
        name, _, value = item.partition("=")
        if name not in _ALLOWED or not value:
            raise InputError(
                f"--options: {item!r} is not of the form flag=value with a flag of the selector: "
                f"{', '.join(_ALLOWED)}"
            )
        if name in given:
            raise InputError(f"--options: {text!r} gives {name} twice")
        given[name] = value
    return given


def measure(session: Session, mined: str, name: str) -> dict[str, np.ndarray]:
    """Trains the selector that the flags describe and has its picks answered.

    Args:
      session: of the run.
      mined: name of the run's mined data.
      name: of the option, for its folder.

    Returns:
      accuracy [Q] and shown, the mean number of demonstrations.
    """
    folder = session.workdir / "selectors" / name / str(settings.SEED.value)
    folder.mkdir(parents=True, exist_ok=True)
    hello = session.environment.hello
    init, policy = make_selector(configs.selector_config(), hello["parts"], hello["embedding_dim"])
    own = dataclasses.replace(session, workdir=folder, init=init, policy=policy)
    with contextlib.closing(MetricsLog(folder)) as log:
        trained = phases.warm_up(own, phases.fresh(own), log)
        if policy.stops:
            phases.mine_data(own, trained)
        # Where there was nothing to learn, the option is judged by its warm-up.
        trained = phases.train_rce(own, trained, log, None if policy.stops else mined) or trained
    picks = own.eval_proposer.greedy(
        trained.params, np.arange(len(session.eval)), shots=configs.training_shots()
    )
    scores = answer_picks(session.eval, picks, session.service, label=f"evaluate {name}")
    accuracy = scores[METRICS[settings.METRIC.value]]
    shown = float((picks >= 0).sum(axis=1).mean())
    note(f"accuracy {np.nanmean(accuracy):.3f}, {shown:.2f} demonstrations shown on average")
    return {"accuracy": accuracy, "shown": shown}


def compare(found: dict[str, Measured]) -> dict[str, dict]:
    """Accuracy of each option and its difference to `default`, paired on queries.

    A query counts by its mean over seeds, so the intervals say how sure the result is over
    queries; `by_seed` says how much training itself varies.
    """
    rows = {}
    for name, option in found.items():
        means = {which: found[which].accuracy.mean(axis=0) for which in (name, DEFAULT)}
        known = np.isfinite(means[name]) & np.isfinite(means[DEFAULT])
        accuracy = mean_ci(means[name][known], bounds=(0.0, 1.0))
        rows[name] = {
            "accuracy": accuracy.value,
            "ci95": accuracy.interval,
            "n": accuracy.n,
            "by_seed": np.nanmean(option.accuracy, axis=1).tolist(),
            "mean_shots": float(option.shown.mean()),
        }
        if name != DEFAULT:
            bounds = (-1.0, 1.0)
            gain = paired_difference(means[name][known], means[DEFAULT][known], bounds=bounds)
            rows[name]["difference"] = {"diff": gain.value, "ci95": gain.interval, "n": gain.n}
    return rows


def _show(rows: dict[str, dict]) -> None:
    table = Table(title=f"selectors after RCE, {_SEEDS.value} seeds, greedy")
    for column in ("option", "accuracy", "95% interval", "n", "- default", "95% interval", "shots"):
        table.add_column(column, justify="left" if column == "option" else "right", no_wrap=True)
    for name, row in rows.items():
        gain = row.get("difference")
        table.add_row(
            name,
            number(row["accuracy"]),
            interval(row["ci95"]),
            str(row["n"]),
            "" if gain is None else f"{gain['diff']:+.3f}",
            "" if gain is None else interval(gain["ci95"]),
            f"{row['mean_shots']:.2f}",
        )
    CONSOLE.print(table)


if __name__ == "__main__":
    cli.share_gpu()
    cli.run(main)
