"""Tells that memory ran out from all that torch and the system raise, and gives memory back."""

import gc

import torch

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
