"""What the flag `--device` may say. Without torch, so that a driver checks it before it starts."""

import re

from qwen_bridge.errors import InputError


def check_device(name: str) -> None:
    """Refuses what is not auto, cpu, cuda or cuda:N, with an InputError."""
    if name != "auto" and not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise InputError(f"--device={name} is not auto, cpu, cuda or cuda:N")


def is_dealt(name: str) -> bool:
    """Whether the workers of a machine take its GPUs in turn; else all are where it says."""
    return name in ("auto", "cuda")
