"""Where the driver becomes the limit: the real driver with 1 to 512 simulated workers.

    python -m experiments.simulate_workers --workers=1,8,64,512 --out=benchmarks/driver_limit.json

The driver is the real one: `ScoringService`, the store on disk, `Environment` and its scheduler,
with batches, slots and messages as always. Only the workers are simulated: they answer after
`--seconds_per_prompt` for each prompt and compute nothing; see `simulated_workers.py`, also for
what time is. What sockets or Ray cost is not in it, unless given as `--message_ms`.

The model: the driver is at a batch of b prompts for d(N) = a + c N seconds, as it looks at every
worker for every batch; a worker for s b. Before the first batch of a call and after its last, the
driver works alone, r seconds a prompt: it asks the store what is known, and reads the records. So

    prompts/s  X(N) = 1 / (r + max(s / N, d(N) / b))        busy share  X(N) (r + d(N) / b)

and the driver is the limit from N* workers on, where N* d(N*) = s b. a, c and r come from first
runs that are not reported, with the fewest and the most workers.
"""

import contextlib
import math
import os
import pathlib
import platform
import tempfile
import time

import numpy as np
from absl import flags

from experiments import cli
from experiments.batched import BatchedEnvironment
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE, note
from experiments.simulated_workers import VirtualEngine
from lever_jax.scoring import ScoringService
from lever_jax.store import Store
from qwen_bridge.client import Environment
from qwen_bridge.errors import InputError
from qwen_bridge.protocol import empty_score

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
    note(f"calibration: {workers[0]} and {workers[-1]} workers")
    a, c, r = _calibrate(workers)
    limit = saturation(a, c, _SECONDS.value, _BATCH.value)
    rows = []
    for count in workers:
        row = simulate(count)
        rate, busy = model(count, a, c, r, _SECONDS.value, _BATCH.value)
        row |= {"model": {"prompts_per_s": rate, "busy": busy}}
        rows.append(row)
        CONSOLE.print(
            f"{count:>4} workers: {row['prompts_per_s']:>8,.0f} prompts/s, driver busy "
            f"{row['busy']:.1%}, {row['driver_ms_per_batch']:.2f} ms a batch; model {rate:,.0f} "
            f"prompts/s, busy {busy:.1%}"
        )
    CONSOLE.print(
        f"a batch of {_BATCH.value} costs the driver {1e3 * a:.2f} ms + {1e6 * c:.2f} us a worker, "
        f"and {1e6 * r:.1f} us a prompt before and after;\n"
        f"at {_SECONDS.value:g} s a prompt it is the limit from {limit:,.0f} workers on"
    )
    names = ("seconds_per_prompt", "score_batch", "shots", "answers", "message_ms", "clock")
    document = {
        "device": f"{os.cpu_count()} x {platform.machine()}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "time": "virtual: the driver's own work as measured, plus its waits as simulated",
        "config": {name: flags.FLAGS[name].value for name in names},
        "model": {"a_s": a, "c_s": c, "r_s": r, "saturating_workers": limit},
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


def model(
    count: int, a: float, c: float, r: float, seconds: float, batch: int
) -> tuple[float, float]:
    """Prompts a second and the driver's busy share; see the docstring of this module."""
    driver = (a + c * count) / batch
    rate = 1 / (r + max(seconds / count, driver))
    return rate, rate * (r + driver)


def saturation(a: float, c: float, seconds: float, batch: int) -> float:
    """N* of N* (a + c N*) = s b."""
    if c <= 0:
        return seconds * batch / a
    return (math.sqrt(a * a + 4 * c * seconds * batch) - a) / (2 * c)


def _calibrate(workers: list[int]) -> tuple[float, float, float]:
    few, many = workers[0], workers[-1]
    runs = [simulate(count) for count in (few, many)]
    low, high = (run["driver_ms_per_batch"] / 1e3 for run in runs)
    c = max(0.0, (high - low) / (many - few))
    return low - c * few, c, float(np.mean([run["alone_us_per_prompt"] for run in runs])) / 1e6


def simulate(count: int) -> dict:
    """One run of the driver with `count` workers."""
    batch, batches = _BATCH.value, max(_BATCHES.value, 4 * count)
    rng = np.random.default_rng(0)
    queries = np.repeat(np.arange(4 * batches), -(-batch // 4))[: batch * batches]
    pointers = rng.integers(0, 1 << 20, (len(queries), _SHOTS.value))

    def answer(request, _):
        result = empty_score(request.rows, _ANSWERS.value, {})
        result.gt_prob[:] = 0.25
        result.answer_log_probs[:] = -1.5
        return result

    engine = VirtualEngine(
        count,
        _SECONDS.value,
        answer,
        message_s=_MESSAGE_MS.value / 1e3,
        clock=_CLOCKS[_CLOCK.value],
    )
    with (
        tempfile.TemporaryDirectory(prefix="simulate_", dir=_FOLDER.value) as folder,
        Store.open(pathlib.Path(folder) / "store.sqlite", {"model": "simulated"}) as store,
        Environment({}, engine=engine) as environment,
    ):
        service = ScoringService(store, BatchedEnvironment(environment, batch), _no_bar)
        started, waited = engine.now(), engine.waited_s
        records = service.score(queries, pointers, label="simulated")
        ended, waited = engine.now(), engine.waited_s - waited
        alone = (engine.sent_at - started) + (ended - engine.heard_at)
        seconds = ended - started
        requests = environment.stats["requests"]
    if any(record.gt_prob != 0.25 for record in records):
        raise RuntimeError("a simulated score did not come back as it was given")
    return {
        "workers": count,
        "prompts": len(queries),
        "batches": requests,
        "prompts_per_s": len(queries) / seconds,
        "busy": 1 - waited / seconds,
        "driver_ms_per_batch": 1e3 * (seconds - waited - alone) / requests,
        "alone_us_per_prompt": 1e6 * alone / len(queries),
    }


def _no_bar(label: str, total: int):
    return contextlib.nullcontext(lambda count: None)


if __name__ == "__main__":
    cli.run(main)
