"""How much memory one worker may still take on its device, beside the others."""

import os
import pathlib

import torch

from qwen_bridge.memory import CONTEXT_BYTES, CPU_CAP, CPU_SHARE

MEMINFO = pathlib.Path("/proc/meminfo")


def free_memory(device: torch.device, *, dealt: bool) -> float:
    """Bytes that this worker may still take, its model being loaded.

    Workers on one device start at about the same time. Each expects that the others have not
    loaded their model yet; where they have, it takes less than it could.

    Args:
      device: `cpu` or a GPU.
      dealt: whether the workers were dealt to all GPUs in turn, or share this one.
    """
    workers = workers_on(device, dealt=dealt)
    if device.type == "cpu":
        return _available() / workers
    free, _ = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) + CONTEXT_BYTES
    return max(0.0, (free - (workers - 1) * own) / workers)


def workers_on(device: torch.device, *, dealt: bool) -> int:
    """How many workers of this run are on `device`; one where there is no bridge."""
    workers = int(os.environ.get("QWEN_BRIDGE_WORKERS", 1))
    if device.type == "cpu" or not dealt:
        return workers
    return len(range(device.index or 0, workers, torch.cuda.device_count()))


def _available() -> float:
    """Bytes of main memory that can be had without swapping; a modest guess where unknown."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:  # Not Linux.
        return CPU_CAP / CPU_SHARE
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024.0
