"""Where the driver becomes the limit: the real driver with 1 to 512 simulated workers.

    python -m experiments.simulate_workers --workers=1,8,64,512 --out=benchmarks/driver_limit.json

Prints prompts a second and the driver's busy share, beside what the model of `driver_limit.py`
says, and from how many workers on the driver is the limit. What sockets or Ray cost the driver is
not in it, unless given as `--message_ms`.
"""

import dataclasses
import os
import platform
import time

import numpy as np
from absl import flags

from experiments import cli
from experiments.driver_limit import Workload, calibrate, simulate
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE, note
from qwen_bridge.errors import InputError

_WORKERS = flags.DEFINE_list("workers", ["1", "8", "64", "512"], "Numbers of workers.")
_SECONDS = flags.DEFINE_float(
    "seconds_per_prompt",
    0.013,
    "Of one worker; what --plan says for Qwen2.5-VL-3B on an H100 (75 prompts a second).",
    lower_bound=1e-6,
)
_BATCH = flags.DEFINE_integer("score_batch", 256, "Prompts in a request.", lower_bound=1)
_SHOTS = flags.DEFINE_integer("shots", 2, "Demonstrations of a prompt.", lower_bound=1)
_ANSWERS = flags.DEFINE_integer("answers", 4, "Ground truths of a query.", lower_bound=1)
_BATCHES = flags.DEFINE_integer(
    "batches", 200, "Batches of a run, and at least four for each worker.", lower_bound=1
)
_MESSAGE_MS = flags.DEFINE_float(
    "message_ms", 0.0, "Driver's time in the transport of one batch, ms.", lower_bound=0.0
)
_CLOCK = flags.DEFINE_enum(
    "clock",
    "cpu",
    ("cpu", "wall"),
    "Driver's work in CPU time, or by the wall, with waits for the disk and other programs.",
)
_FOLDER = flags.DEFINE_string("folder", None, "Where the store is made; default: temporary files.")
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")
_CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}


def main() -> None:
    """Simulates, compares with the model, prints and writes."""
    check_out(_OUT.value)
    workers = _numbers()
    work = Workload(
        seconds_per_prompt=_SECONDS.value,
        batch=_BATCH.value,
        batches=_BATCHES.value,
        shots=_SHOTS.value,
        answers=_ANSWERS.value,
        message_s=_MESSAGE_MS.value / 1e3,
    )
    options = {"clock": _CLOCKS[_CLOCK.value], "folder": _FOLDER.value}
    note(f"calibration: {workers[0]} and {workers[-1]} workers")
    model = calibrate(workers[0], workers[-1], work, **options)
    rows = []
    for count in workers:
        row = simulate(count, work, **options)
        rate, busy = model.predict(count, work)
        rows.append(row | {"model": {"prompts_per_s": rate, "busy": busy}})
        CONSOLE.print(
            f"{count:>4} workers: {row['prompts_per_s']:>8,.0f} prompts/s, driver busy "
            f"{row['busy']:.1%}, {row['driver_ms_per_batch']:.2f} ms a batch; model {rate:,.0f} "
            f"prompts/s, busy {busy:.1%}"
        )
    limit = model.saturation(work)
    CONSOLE.print(
        f"a batch of {work.batch} costs the driver {1e3 * model.a:.2f} ms + {1e6 * model.c:.2f} us "
        f"a worker, and {1e6 * model.r:.1f} us a prompt before and after;\n"
        f"at {work.seconds_per_prompt:g} s a prompt it is the limit from {limit:,.0f} workers on"
    )
    document = {
        "device": f"{os.cpu_count()} x {platform.machine()}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "time": f"virtual: the driver's own work by its {_CLOCK.value} clock, and simulated waits",
        "config": dataclasses.asdict(work),
        "model": {**dataclasses.asdict(model), "saturating_workers": limit},
        "runs": rows,
    }
    write_out(_OUT.value, document)


def _numbers() -> list[int]:
    try:
        numbers = sorted({int(text) for text in _WORKERS.value})
    except ValueError:
        numbers = []
    if len(numbers) < 2 or numbers[0] < 1:
        raise InputError(f"--workers={','.join(_WORKERS.value)} must be two or more counts, >= 1")
    return numbers


if __name__ == "__main__":
    cli.run(main)
