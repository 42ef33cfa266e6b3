"""Loads a Qwen2.5-VL checkpoint: the published ones, the embedded one and users' own alike."""

import dataclasses
import hashlib
import pathlib

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from qwen_bridge.errors import InputError
from qwen_bridge.vision import batch_equal_windows

TINY_QWEN = pathlib.Path(__file__).parent / "tiny_qwen"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What the libraries raise over a damaged or foreign folder.
_UNUSABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    KeyError,
    SafetensorError,
)
_HASH_WHOLE = 256 << 20  # bytes; of larger weight files only samples are hashed
_HASH_SAMPLES = 64


@dataclasses.dataclass
class LoadedModel:
    """A checkpoint ready to score.

    Attributes:
      model: the network, in evaluation mode.
      tokenizer: its tokenizer.
      image_processor: its image processor (PIL, no torchvision).
      fingerprint: identifies weights, configuration and processor settings.
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
) -> LoadedModel:
    """Loads a checkpoint folder.

    Args:
      path: a local folder with `config.json`, `*.safetensors`, tokenizer and preprocessor
        files; empty means the embedded model.
      device: torch device.
      dtype: `float32` or `bfloat16`.
      min_pixels: images are enlarged to at least as many pixels; None as the checkpoint says.
      max_pixels: images are shrunk to at most as many pixels; None as the checkpoint says.

    Raises:
      InputError: the folder, its configuration or its weights are missing or do not fit.
    """
    folder = pathlib.Path(path) if path else TINY_QWEN
    if not folder.is_dir():
        raise InputError(f"--model={path} is not a folder; give a local Qwen2.5-VL checkpoint")
    for pattern, what in (
        ("config.json", "configuration"),
        ("*.safetensors", "weights"),
        ("tokenizer*.json", "tokenizer"),
        ("preprocessor_config.json", "image processor settings"),
    ):
        if not any(folder.glob(pattern)):
            raise InputError(f"--model={path}: no {what} ({pattern}) in {folder}")
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
    except _UNUSABLE as error:
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
    model.eval().requires_grad_(False).to(device)
    batch_equal_windows(model.model.visual)
    return LoadedModel(
        model, tokenizer, processor, _fingerprint(folder, dtype, processor.to_json_string())
    )


def _is_qwen(folder: pathlib.Path) -> bool:
    return '"qwen2_5_vl"' in (folder / "config.json").read_text()


def _fingerprint(folder: pathlib.Path, dtype: str, processor: str) -> str:
    digest = hashlib.sha256(f"{dtype}\0{processor}".encode())
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            if file.stat().st_size <= _HASH_WHOLE:
                digest.update(stream.read())
                continue
            for i in range(_HASH_SAMPLES):
                stream.seek(i * file.stat().st_size // _HASH_SAMPLES)
                digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]
