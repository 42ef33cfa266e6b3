"""How time, memory and the machine's peak are measured, on a CPU and on a GPU."""

import gc
import importlib.metadata
import platform
import resource
import time
from collections.abc import Callable

import torch

_PEAK_SIZE = {"cpu": 1536, "cuda": 8192}  # side of the matrices
_PEAK_REPEATS = 5


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds that `run` takes.

    On a GPU between two events of its stream. On a CPU with one thread processor time, which is
    the time of an otherwise idle machine even where others use it too; with more threads the time
    that passes.
    """
    if device.type == "cuda":
        # An event is recorded on the current device's stream, which need not be of this device.
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    gc.collect()
    start = clock()
    run()
    return clock() - start


def clock_name(device: torch.device) -> str:
    """Which clock `seconds` reads."""
    if device.type == "cuda":
        return "device events"
    return "processor time" if torch.get_num_threads() == 1 else "time that passes"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of a few."""
    size = _PEAK_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.matmul(left, right)
    best = min(seconds(device, lambda: torch.matmul(left, right)) for _ in range(_PEAK_REPEATS))
    return 2 * size**3 / best


def describe(device: torch.device) -> dict:
    """The device's name and what decides its speed."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": found.name,
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
        }
    return {
        "type": "cpu",
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak on a GPU; a CPU process has only one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held since `reset_peak_memory`, or by the process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if platform.system() == "Darwin" else kib << 10


def memory(device: torch.device) -> int:
    """Bytes held now: reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory(device)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
