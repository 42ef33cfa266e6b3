"""The JSON files that entry points write where `--out` says."""

import json
import os
import pathlib
from typing import Any

from qwen_bridge.errors import InputError


def check_out(path: str | None) -> None:
    """Refuses an output file that could not be written, before the work for it is done.

    Raises:
      InputError: its folder does not exist, or it is a folder.
    """
    if path is None:
        return
    out = pathlib.Path(path)
    if out.is_dir() or not out.name:
        raise InputError(f"--out={path} is not the name of a file; give one, as X.json")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out={path} is in a folder that does not exist; make it first")


def write_out(path: str | None, document: Any) -> None:
    """Writes a JSON file whole or not at all; nothing where no path was given.

    Raises:
      InputError: the file cannot be written.
    """
    if path is None:
        return
    out = pathlib.Path(path)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"--out={path} cannot be written ({error}); give another file") from None
