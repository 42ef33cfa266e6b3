"""Times competitors in turns, so that a busy machine slows all of them.

Each round runs every competitor once, in another order each round; what is reported is the median
of the rounds' ratios. On one CPU thread the seconds are those that the process had the processor,
which other processes cannot lengthen; on a GPU they are those of the clock.
"""

import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import torch

from experiments.progress import bar, note
from lever_jax.errors import InputError
from qwen_bridge.benchmark import clock

_CPU = torch.device("cpu")


def one_device() -> torch.device:
    """The GPU for both, or else one core for this process. To be called before JAX is used.

    JAX has a thread for each core that it may run on when it is first used.

    Returns:
      Where PyTorch competes, which is where JAX computes.

    Raises:
      InputError: one of the two sees a GPU and the other does not.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    if gpu != (jax.default_backend() == "gpu"):
        raise InputError(
            f"JAX computes on a {jax.default_backend()}, PyTorch on a {'gpu' if gpu else 'cpu'}: "
            "give both the GPU (pip install 'lever[cuda12]' or 'lever[cuda13]', and PyTorch built "
            "for the same CUDA), or neither (CUDA_VISIBLE_DEVICES= JAX_PLATFORMS=cpu before the "
            "command)"
        )
    return torch.device("cuda" if gpu else "cpu")


def warm_up(competitors: Mapping[str, Callable[[], object]], device: torch.device) -> None:
    """Compiles everything; PyTorch records its CUDA graphs in the second call, not the first."""
    for run in competitors.values():
        for _ in range(3 if device.type == "cuda" else 1):
            run()


def finished(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """PyTorch's `run`, returning when the device has done it, as ours do."""
    if device.type == "cpu":
        return run

    def whole():
        result = run()
        torch.cuda.synchronize(device)
        return result

    return whole


def compile_options(device: torch.device) -> dict[str, object]:
    """How a PyTorch user would compile for speed: on a GPU as one graph, launched at once."""
    mode = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
    return {"dynamic": False, **mode}


def without_compiler(wanted: bool) -> str | None:
    """Why torch.compile, which is `wanted`, cannot work here, as it also notes; None if it can."""
    if not wanted or shutil.which("g++") or shutil.which("clang++"):
        return None
    missing = "no C++ compiler (g++ or clang++) for torch.compile"
    note(f"without the compiled version: {missing}")
    return missing


def numbers(flag) -> list[int]:
    """The whole numbers of a list flag.

    Raises:
      InputError: one is not a whole number of 1 or more.
    """
    if not flag.value or not all(text.isdigit() and int(text) for text in flag.value):
        raise InputError(f"--{flag.name}={','.join(flag.value)} must be whole numbers of 1 or more")
    return [int(text) for text in flag.value]


def timed(
    competitors: Mapping[str, Callable[[], object]], rounds: int, label: str
) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each competitor; every one has run before, so nothing is compiled here.

    Args:
      competitors: what to run; each returns when its work is done.
      rounds: how often.
      label: of the progress bar.
    """
    if jax.default_backend() != "gpu":
        return timed_by((time.process_time,), competitors, rounds, label)[0]
    repeats = {name: _repeats(run) for name, run in competitors.items()}
    often = {name: _repeated(run, repeats[name]) for name, run in competitors.items()}
    seconds = timed_by((time.perf_counter,), often, rounds, label)[0]
    return {name: values / repeats[name] for name, values in seconds.items()}


def _repeats(run: Callable[[], object]) -> int:
    """How often `run` fits into `_LEAST_S`: the clock is too coarse for a few microseconds."""
    start = time.perf_counter()
    run()
    return max(1, math.ceil(_LEAST_S / (time.perf_counter() - start)))


def _repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    def all_of_them():
        for _ in range(times):
            run()

    return all_of_them


def timed_by(
    clocks: Sequence[Callable[[], float]],
    competitors: Mapping[str, Callable[[], object]],
    rounds: int,
    label: str,
) -> list[dict[str, np.ndarray]]:
    """As `timed`, by each of some clocks, which read in seconds."""
    names = list(competitors)
    seconds = {name: [] for name in names}
    with bar(label, rounds * len(names)) as advance:
        for turn in range(rounds):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                start = [clock() for clock in clocks]
                competitors[name]()
                seconds[name].append([clock() - at for clock, at in zip(clocks, start)])
                advance(1)
    return [
        {name: np.array(values)[:, i] for name, values in seconds.items()}
        for i in range(len(clocks))
    ]


def ratio(slow: np.ndarray, fast: np.ndarray) -> dict[str, float]:
    """How many times faster, by round: median, min and max."""
    values = slow / fast
    return {name: float(f(values)) for name, f in _STATISTICS.items()}


_STATISTICS = {"median": np.median, "min": np.min, "max": np.max}


_LEAST_S = 0.05  # of a round on a GPU


def machine(device: torch.device = _CPU) -> dict[str, object]:
    """Device, versions and load, for the JSON of a benchmark."""
    return {
        "device": f"{platform.machine()}, {os.cpu_count()} cores, JAX on {jax.default_backend()}",
        "processor": clock.describe(device),
        "clock": "wall" if jax.default_backend() == "gpu" else "CPU seconds of the process",
        "cores_used": len(os.sched_getaffinity(0)),
        "load_average_at_end": os.getloadavg(),
        "versions": {
            **clock.versions(),
            "jax": jax.__version__,
            "numpy": np.__version__,
        },
    }
