"""Where a checkpoint lies: `--model=` names a local folder, or a model on the Hugging Face hub.

The driver resolves the name once and hands the folder to its workers, so that several workers
never download the same files. Only safetensors, JSON and text are fetched: nothing that could
carry code.
"""

import pathlib
import re

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.records import one_line

TINY_QWEN = pathlib.Path(__file__).parent / "tiny_qwen"
# Weights, configuration, tokenizer. Never *.bin, *.pt (pickle) or *.py (code).
ALLOWED_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def hub_id(model: str) -> tuple[str, str | None] | None:
    """(id, revision) where `model` names no local folder but looks like `ORG/NAME[@REVISION]`."""
    match = _HUB_ID.fullmatch(model)
    if match is None or pathlib.Path(model).exists() or model.startswith("."):
        return None
    return match["id"], match["revision"]


def resolve_model(model: str) -> str:
    """The local folder of a checkpoint; a hub id is downloaded, or found in the hub's cache.

    Args:
      model: a local folder, which always wins; `ORG/NAME` or `ORG/NAME@REVISION` on the hub; empty
        for the embedded checkpoint. With HF_HUB_OFFLINE=1 only the cache is looked at.

    Returns:
      A folder; `model` itself where it is no hub id.

    Raises:
      InputError: the hub has no such model or cannot be reached, and the cache does not have it.
    """
    named = hub_id(model)
    if named is None:
        return model
    return _download(model, *named, ALLOWED_FILES)


def resolve_config(model: str) -> pathlib.Path:
    """As `resolve_model`, but of a hub model only the small JSON files are fetched."""
    named = hub_id(model)
    if named is None:
        return pathlib.Path(model)
    return pathlib.Path(_download(model, *named, ("config.json", "preprocessor_config.json")))


def _download(model: str, repo: str, revision: str | None, patterns) -> str:
    from huggingface_hub import snapshot_download  # Slow, and not needed for a local folder.

    try:
        return snapshot_download(repo, revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # Network, cache, names, rights: the library raises many kinds.
        raise InputError(
            f"--model={model} is not a folder, and as a model of the Hugging Face hub it cannot "
            f"be had ({one_line(error)}); check the name, unset HF_HUB_OFFLINE to download it, or "
            "give a folder"
        ) from error
