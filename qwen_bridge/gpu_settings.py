"""How PyTorch is to compute on a GPU: what its defaults get wrong for exact scores."""

import torch


def set_for_scoring(device: torch.device | str) -> None:
    """Sets how convolutions and attention run, in the whole process; nothing on a CPU."""
    if torch.device(device).type != "cuda":
        return
    # Convolutions of float32, which patch embeddings are, would round their inputs to TF32; matrix
    # products do not. Whatever the model's data type: encoders beside a bfloat16 one are float32.
    torch.backends.cudnn.allow_tf32 = False
    # cuDNN's attention, which PyTorch prefers on Hopper from 2.11 on, builds a plan for every new
    # shape, and tries have new shapes all the time. What that costs was not measured here.
    torch.backends.cuda.enable_cudnn_sdp(False)
