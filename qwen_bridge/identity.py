"""What identifies a checkpoint: its content, not its place or the names of foreign files.

Every score is stored under this identity, so it must change with anything that changes a score
(weights, configuration, tokenizer, processor settings, adapter) and with nothing else.
"""

import hashlib
import json
import pathlib
import struct

from qwen_bridge.errors import InputError

# What is read of a checkpoint folder, beside weights and processor settings.
_READ = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
# A tensor above it is hashed in pieces: a training step or a merged adapter changes all of it.
_WHOLE = 1 << 20
_PIECES, _PIECE = 16, 1 << 16
# Fields of adapter_config.json that say where an adapter was made, not what it does.
_PROVENANCE = (
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "task_type",
)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weight files that a checkpoint is loaded from: one, or the shards that its index names.

    Raises:
      InputError: there are none, or the index or a shard of it is missing or unreadable.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(
            f"no weights (model.safetensors or model.safetensors.index.json) in {folder}; only "
            "safetensors are read"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{index} is not an index of weights; copy it again") from None
    files = [folder / pathlib.PurePath(name).name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} shards are not in {folder}, as {missing[0]}; copy them"
        )
    return files


def checkpoint_digest(folder: pathlib.Path) -> str:
    """Identifies the files of a checkpoint by content, wherever the folder lies.

    Raises:
      InputError: see `weight_files`.
    """
    digest = hashlib.sha256()
    for file in (folder / name for name in _READ):
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    for file in weight_files(folder):
        _add_safetensors(digest, file)
    return digest.hexdigest()


def adapter_digest(folder: pathlib.Path) -> str:
    """Identifies a LoRA adapter by its tensors and by the settings that decide what they do."""
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = {
        name: sorted(value, key=str) if isinstance(value, list) else value  # sets, saved as lists
        for name, value in config.items()
        if name not in _PROVENANCE
    }
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    digest.update((folder / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()


def _add_safetensors(digest, file: pathlib.Path) -> None:
    """Adds names, types, shapes and content of the tensors; large ones in evenly spread pieces."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(length)
        digest.update(struct.pack("<Q", length) + header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for name in sorted(tensors):
            low, high = tensors[name]["data_offsets"]
            size, start = high - low, 8 + length + low
            if size <= _WHOLE:
                stream.seek(start)
                digest.update(stream.read(size))
                continue
            for piece in range(_PIECES):
                stream.seek(start + piece * (size - _PIECE) // (_PIECES - 1))
                digest.update(stream.read(_PIECE))
