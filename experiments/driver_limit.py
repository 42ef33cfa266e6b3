"""How fast the driver can go, whatever the workers: a model of it, and the real one to compare.

The driver is the real one: `ScoringService`, the store on disk, `Environment` and its scheduler,
with batches, slots and messages as always. Only the workers are simulated: they answer after some
seconds a prompt and compute nothing; see `simulated_workers.py`, also for what time is.

The model: the driver is at a batch of b prompts for d(N) = a + c N seconds, as it looks at every
worker for every batch; a worker for s b. Before the first batch of a call and after its last, the
driver works alone, r seconds a prompt: it looks up in the store what is known. So

    prompts/s  X(N) = 1 / (r + max(s / N, d(N) / b))        busy share  X(N) (r + d(N) / b)

and the driver is the limit from N* workers on, where N* d(N*) = s b. a, c and r come from runs
of their own, with the fewest and the most workers.
"""

import contextlib
import math
import pathlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.batched import BatchedEnvironment
from experiments.simulated_workers import VirtualEngine
from lever_jax.scoring import ScoringService
from lever_jax.store import Store
from qwen_bridge.client import Environment
from qwen_bridge.protocol import empty_score


@dataclass(frozen=True)
class Workload:
    """What is simulated.

    Attributes:
      seconds_per_prompt: s, of one worker.
      batch: b, prompts in a request.
      batches: of a run, and at least four for each worker.
      shots: demonstrations of a prompt.
      answers: ground truths of a query.
      message_s: driver's time in the transport of one batch.
    """

    seconds_per_prompt: float = 0.013
    batch: int = 256
    batches: int = 200
    shots: int = 2
    answers: int = 4
    message_s: float = 0.0


@dataclass(frozen=True)
class DriverModel:
    """The model of this module.

    Attributes:
      a: seconds of the driver a batch.
      c: seconds of the driver a batch for each worker there is.
      r: seconds of the driver a prompt, while no worker works.
    """

    a: float
    c: float
    r: float

    def predict(self, workers: int, work: Workload) -> tuple[float, float]:
        """Prompts a second and the driver's busy share."""
        driver = (self.a + self.c * workers) / work.batch
        rate = 1 / (self.r + max(work.seconds_per_prompt / workers, driver))
        return rate, rate * (self.r + driver)

    def saturation(self, work: Workload) -> float:
        """N* of N* (a + c N*) = s b."""
        seconds = work.seconds_per_prompt * work.batch
        if self.c == 0:
            return seconds / self.a
        return (math.sqrt(self.a**2 + 4 * self.c * seconds) - self.a) / (2 * self.c)


def calibrate(few: int, many: int, work: Workload, **options) -> DriverModel:
    """The model of this driver; `c` is 0 where it is less than the noise."""
    runs = [simulate(count, work, **options) for count in (few, many)]
    low, high = (run["driver_ms_per_batch"] / 1e3 for run in runs)
    c = max(0.0, (high - low) / (many - few))
    alone = float(np.mean([run["alone_us_per_prompt"] for run in runs])) / 1e6
    return DriverModel((low + high - c * (few + many)) / 2, c, alone)


def simulate(
    workers: int,
    work: Workload,
    *,
    clock: Callable[[], float] = time.thread_time,
    folder: str | None = None,
) -> dict:
    """One run of the driver.

    Args:
      workers: N.
      work: what they do.
      clock: how the driver's own work is measured, seconds.
      folder: where the store is made; by default among temporary files.

    Returns:
      `prompts_per_s`; `busy`, the driver's share of the time; `driver_ms_per_batch`; and
      `alone_us_per_prompt`, its work before the first batch is sent and after the last is heard.
    """
    batches = max(work.batches, 4 * workers)
    queries = np.repeat(np.arange(4 * batches), -(-work.batch // 4))[: work.batch * batches]
    rng = np.random.default_rng(0)
    pointers = rng.integers(0, 1 << 20, (len(queries), work.shots))

    def answer(request, _):
        result = empty_score(request.rows, work.answers, {})
        result.gt_prob[:] = 0.25
        result.answer_log_probs[:] = -1.5
        return result

    engine = VirtualEngine(
        workers, work.seconds_per_prompt, answer, message_s=work.message_s, clock=clock
    )
    with (
        tempfile.TemporaryDirectory(prefix="simulate_", dir=folder) as path,
        Store.open(pathlib.Path(path) / "store.sqlite", {"model": "simulated"}) as store,
        Environment({}, engine=engine) as environment,
    ):
        service = ScoringService(store, BatchedEnvironment(environment, work.batch), _no_bar)
        started, waited = engine.now(), engine.waited_s
        records = service.score(queries, pointers, label="simulated")
        ended, waited = engine.now(), engine.waited_s - waited
        requests = environment.stats["requests"]
    if any(record.gt_prob != 0.25 for record in records):
        raise RuntimeError("a simulated score did not come back as it was given")
    alone = (engine.sent_at - started) + (ended - engine.heard_at)
    return {
        "workers": workers,
        "prompts": len(queries),
        "batches": requests,
        "prompts_per_s": len(queries) / (ended - started),
        "busy": 1 - waited / (ended - started),
        "driver_ms_per_batch": 1e3 * (ended - started - waited - alone) / requests,
        "alone_us_per_prompt": 1e6 * alone / len(queries),
    }


def _no_bar(label: str, total: int):
    return contextlib.nullcontext(lambda count: None)
