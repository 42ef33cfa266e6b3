"""The files that entry points write where a flag such as `--out` says."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from qwen_bridge.errors import InputError


def check_out(path: str | None, flag: str = "out") -> None:
    """Refuses an output file that could not be written, before the work for it is done.

    Raises:
      InputError: its folder does not exist, or it is a folder.
    """
    if path is None:
        return
    out = pathlib.Path(path)
    if out.is_dir() or not out.name:
        raise InputError(f"--{flag}={path} is not the name of a file; give one, as X.json")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--{flag}={path} is in a folder that does not exist; make it first")


def write_out(path: str | None, document: Any) -> None:
    """Writes a JSON file whole or not at all; nothing where no path was given.

    Raises:
      InputError: the file cannot be written.
    """
    if path is None:
        return
    with whole_file(path) as write:
        write(json.dumps(document, indent=1) + "\n")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, flag: str = "out") -> Iterator[Callable[[str], None]]:
    """Yields `write(text)`; the file appears, whole, if the block ends well, and else not at all.

    Raises:
      InputError: the file cannot be written.
    """
    out = pathlib.Path(path)
    partial = out.with_name(f".{out.name}.{os.getpid()}")

    @contextlib.contextmanager
    def named_errors():
        try:
            yield
        except OSError as error:
            raise InputError(
                f"--{flag}={path} cannot be written ({error}); give another file"
            ) from None

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: partial.unlink(missing_ok=True))
        with named_errors():
            stream = stack.enter_context(partial.open("w", encoding="utf-8"))

        def write(text: str) -> None:
            with named_errors():
                stream.write(text)

        yield write
        with named_errors():
            stream.close()
            partial.replace(out)
