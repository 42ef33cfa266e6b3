"""When memory runs out: what torch and the system raise then, and going on with half as much."""

import gc
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from qwen_bridge.prompts import PromptError

# Parts of messages of plain RuntimeErrors: torch's CPU allocator, cuBLAS and cuDNN.
_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may go through where this exception was raised."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release(device: torch.device) -> None:
    """Hands memory of a GPU that nothing refers to any more back to it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class Limited(Protocol):
    """Who runs prompts in batches of bounded size; `PromptScorer` documents the methods."""

    device: torch.device

    def limits(self) -> tuple[int, ...]: ...

    def set_limits(self, limits: tuple[int, ...]) -> None: ...

    def shrink(self) -> bool: ...

    def empty_caches(self) -> None: ...


def in_halves(count: int, attempt: Callable[[np.ndarray], list], limited: Limited) -> list:
    """Runs prompts together; where memory runs out, in halves and with smaller batches.

    Batches stay smaller from then on. A prompt for which memory runs out even alone and with
    empty caches is given up, and was to blame: batches are then as large as before.

    Args:
      count: how many prompts.
      attempt: int `[n]` rows of prompts to their `n` outcomes; may run out of memory.
      limited: what bounds the batches.

    Returns:
      An outcome for each prompt, a `PromptError` for those given up.
    """
    outcomes: list = [None] * count
    # Rows that wait, the limits before memory ran out for them, and whether it is a second try.
    waiting = [(np.arange(count), None, False)] if count else []
    while waiting:
        rows, before, again = waiting.pop()
        try:
            found = attempt(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = str(error).strip().partition("\n")[0] or type(error).__name__
        else:
            for row, outcome in zip(rows, found):
                outcomes[row] = outcome
            continue
        before = before or limited.limits()
        hope = limited.shrink()
        if again and not hope:
            outcomes[rows[0]] = PromptError(f"out of memory for this prompt alone: {why}")
            limited.set_limits(before)
        else:
            halves = np.array_split(rows, 2) if len(rows) > 1 else [rows]
            waiting += [(half, before, len(rows) == 1) for half in reversed(halves)]
        limited.empty_caches()
        release(limited.device)
    return outcomes
