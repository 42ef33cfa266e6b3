"""Loads a Qwen2.5-VL checkpoint: the published ones, the embedded one and users' own alike."""

import dataclasses
import hashlib
import pathlib

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from qwen_bridge.adapters import merge_adapter
from qwen_bridge.errors import InputError
from qwen_bridge.gpu_settings import set_for_scoring
from qwen_bridge.grids import check_pixels
from qwen_bridge.hub import TINY_QWEN
from qwen_bridge.identity import adapter_digest, checkpoint_digest, weight_files
from qwen_bridge.vision import batch_equal_windows

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    KeyError,
    SafetensorError,
)
"""What the libraries raise over a damaged or foreign folder."""


@dataclasses.dataclass
class LoadedModel:
    """A checkpoint ready to score.

    Attributes:
      model: the network, in evaluation mode.
      tokenizer: its tokenizer.
      image_processor: its image processor (PIL, no torchvision).
      fingerprint: identifies weights, adapter, configuration and processor settings.
    """

    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: object
    image_processor: Qwen2VLImageProcessorPil
    fingerprint: str


def load_model(
    path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    adapter: str = "",
) -> LoadedModel:
    """Loads a checkpoint folder.

    Args:
      path: a local folder with `config.json`, weights (safetensors, whole or in shards),
        tokenizer and preprocessor files; empty means the embedded model.
      device: torch device.
      dtype: `float32` or `bfloat16`.
      min_pixels: images are enlarged to at least as many pixels; None as the checkpoint says.
      max_pixels: images are shrunk to at most as many pixels; None as the checkpoint says.
      adapter: folder of a LoRA adapter that is merged into the weights; empty for none.

    Raises:
      InputError: the folder, its configuration, its weights or the adapter are missing or do not
        fit, or the pixel bounds contradict each other.
    """
    folder = pathlib.Path(path) if path else TINY_QWEN
    if not folder.is_dir():
        raise InputError(f"--model={path} is not a folder; give a local Qwen2.5-VL checkpoint")
    for pattern, what in (
        ("config.json", "configuration"),
        ("tokenizer*.json", "tokenizer"),
        ("preprocessor_config.json", "image processor settings"),
    ):
        if not any(folder.glob(pattern)):
            raise InputError(f"--model={path}: no {what} ({pattern}) in {folder}")
    try:
        weight_files(folder)
    except InputError as error:
        raise InputError(f"--model={path}: {error}") from None
    if not ((folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()):
        raise InputError(f"--model={path}: no tokenizer.json and no vocab.json in {folder}")
    if dtype not in _DTYPES:
        raise InputError(f"--dtype={dtype} is not one of {', '.join(_DTYPES)}")
    try:
        config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != "qwen2_5_vl" or not _is_qwen(folder):
            raise InputError(f"--model={path}: config.json is not of a qwen2_5_vl model")
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=_DTYPES[dtype],
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        sizes = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        processor = Qwen2VLImageProcessorPil.from_pretrained(
            folder,
            local_files_only=True,
            **{name: value for name, value in sizes.items() if value is not None},
        )
    except UNUSABLE as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if "ignore_mismatched_sizes" in line:
            line = "weights of other shapes than config.json says"
        raise InputError(f"--model={path} cannot be loaded: {line}") from error
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    wrong = [str(key) for kind in kinds for key in sorted(report[kind])]
    if wrong:
        raise InputError(
            f"--model={path}: {len(wrong)} weights missing or misshapen or not of the "
            f"architecture in config.json: {wrong[0]}"
        )
    patch = {"patch_size": processor.patch_size, "merge_size": processor.merge_size}
    check_pixels(processor.size["shortest_edge"], processor.size["longest_edge"], **patch)
    parts = [dtype, processor.to_json_string(), checkpoint_digest(folder)]
    if adapter:
        model = merge_adapter(model, pathlib.Path(adapter))
        parts.append(adapter_digest(pathlib.Path(adapter)))
    set_for_scoring(device)
    model.eval().requires_grad_(False).to(device)
    batch_equal_windows(model.model.visual)
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return LoadedModel(model, tokenizer, processor, fingerprint)


def _is_qwen(folder: pathlib.Path) -> bool:
    return '"qwen2_5_vl"' in (folder / "config.json").read_text()
