"""Reads one huge JSON object entry by entry, in the memory of its largest entry.

The `json` module wants the whole text; a file of mined data can be many gigabytes, but each query
in it is small. Everything unclear is refused: duplicate keys, NaN, a cut file, text after the end.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lever_jax.errors import InputError

CHUNK = 1 << 20  # Characters read at a time.
MAX_ENTRY = 1 << 28  # Characters; far above any query, far below the memory of a machine.

_SPACE = re.compile(r"[ \t\r\n]*")


def read_entries(path: str | Path) -> Iterator[tuple[str, object]]:
    """The `(key, value)` pairs of the JSON object in a file, in order, each parsed when asked for.

    Raises:
      InputError: the file cannot be read or is not one whole JSON object; names file and place.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _Entries(file, path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


class _Entries:
    def __init__(self, file: IO[str], path: str | Path):
        self._file = file
        self._path = path
        self._buffer = ""
        self._at = 0  # Position of the next character in the buffer.
        self._dropped = 0  # Characters of the file before the buffer.
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._unique,
            parse_constant=self._constant,
            parse_float=self._real,
        )
        self._last = "the beginning"

    def __iter__(self) -> Iterator[tuple[str, object]]:
        self._expect("{")
        seen = set()
        separator = self._expect('"}') == "}"
        while not separator:
            self._at -= 1
            key = self._value("a key")
            if key in seen:
                raise InputError(f"{self._path}: the key {key!r} is there twice; remove one")
            seen.add(key)
            self._expect(":")
            self._peek()
            self._last = f"entry {key!r}"
            yield key, self._value(self._last)
            separator = self._expect(",}") == "}"
            if not separator:
                self._expect('"')
        if self._peek():
            self._fail("there is text after the end of the object")

    def _peek(self) -> str:
        """Skips white space; the next character, or "" at the end of the file."""
        while True:
            self._at = _SPACE.match(self._buffer, self._at).end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more(CHUNK):
                return ""

    def _expect(self, allowed: str) -> str:
        found = self._peek()
        if not found:
            self._fail("the file ends too early, so it was cut")
        if found not in allowed:
            self._fail(f"expected {' or '.join(allowed)}, found {found!r}")
        self._at += 1
        return found

    def _value(self, what: str) -> object:
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._buffer, self._at)
                return value
            except json.JSONDecodeError as error:
                # Incomplete rather than wrong, if the complaint is about the end of the buffer.
                cut = error.pos > len(self._buffer) - 64 or error.msg.startswith("Unterminated")
                length = len(self._buffer) - self._at
                if not cut or not self._more(max(CHUNK, length)):
                    self._at = error.pos
                    self._fail(f"{what} is not whole JSON: {error.msg}")
                if length > MAX_ENTRY:
                    self._fail(f"{what} is longer than {MAX_ENTRY} characters")
            except ValueError as error:  # A whole number of thousands of digits.
                self._fail(f"{what} contains an impossible number: {error}")
            except RecursionError:
                self._fail(f"{what} is nested too deeply")

    def _more(self, size: int) -> bool:
        chunk = self._file.read(size)
        self._dropped += self._at
        self._buffer = self._buffer[self._at :] + chunk
        self._at = 0
        return bool(chunk)

    def _unique(self, pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputError(
                f"{self._path}: {self._last} has the field {twice!r} twice in one object"
            )
        return found

    def _constant(self, name: str) -> None:
        raise InputError(f"{self._path}: {self._last} contains {name}, which is not JSON; use null")

    def _real(self, text: str) -> float:
        value = float(text)
        if math.isinf(value):
            raise InputError(f"{self._path}: {self._last} contains {text}, beyond any float")
        return value

    def _fail(self, why: str) -> None:
        place = self._dropped + self._at
        raise InputError(f"{self._path}, character {place}, after {self._last}: {why}")
