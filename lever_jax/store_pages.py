"""Finds rows in the bytes of an SQLite file that SQLite itself may refuse to open.

A record of SQLite begins with a header: its own length, then a serial type for each column. All
our rows end with a checksum of eight bytes, whose serial type is 28, so a header shows itself as
a byte h with a byte 28 at the h-th place, whatever happened to the page around it: neither page
headers nor cell pointers nor the b-tree are needed. What is found so is only a guess; the caller
takes a row for true where its checksum says so.

The log beside the file is laid over it as SQLite would: its frames up to the last commit before
the first that is not whole.

Reference: https://www.sqlite.org/fileformat2.html
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

_CHECKSUM_TYPE = 28  # A blob of 8 bytes: 12 + 2 * 8.
_LONGEST_HEADER = 48
_LARGEST_ROW = 1 << 24
_SIZES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)
_INTERIOR_INDEX, _LEAF_INDEX, _LEAF_TABLE = 2, 10, 13
_LOG_HEADER, _FRAME_HEADER = 32, 24


class Found(NamedTuple):
    """A record that may be a row.

    Attributes:
      values: of its columns, the row id in the place of a NULL that stands for it.
      in_table: whether it lies in a table with row ids, and not in one without.
      live: whether its page points to it; it may be the remains of a deleted row otherwise.
    """

    values: tuple
    in_table: bool
    live: bool


@dataclass(frozen=True)
class Layout:
    """What the first bytes of a file say: page size and bytes at the end of each that are not used.

    Payload beyond `local` bytes lies on overflow pages; see section 1.6 of the reference.
    """

    page_size: int = 4096
    reserved: int = 0

    @property
    def usable(self) -> int:
        """Bytes of a page that are used."""
        return self.page_size - self.reserved

    def local(self, payload: int, in_table: bool) -> int:
        """Bytes of a payload that lie in its cell."""
        usable = self.usable
        most = usable - 35 if in_table else (usable - 12) * 64 // 255 - 23
        if payload <= most:
            return payload
        least = (usable - 12) * 32 // 255 - 23
        fitting = least + (payload - least) % (usable - 4)
        return fitting if fitting <= most else least


def layouts(path: Path) -> list[Layout]:
    """How the file may be laid out: as SQLite's default is, and as its header says."""
    with path.open("rb") as file:
        head = file.read(100)
    found = [Layout()]
    if len(head) == 100:
        size = struct.unpack(">H", head[16:18])[0]
        said = Layout(65536 if size == 1 else size, head[20])
        if said.page_size in [2**i for i in range(9, 17)] and said.usable >= 480:
            found.append(said)
    return list(dict.fromkeys(found))


class Pages:
    """The pages of a file with its log laid over them; a context manager.

    Attributes:
      count: pages of the file or the log, whichever reaches further.
      beyond: pages of frames that came after the first that is not whole.
    """

    def __init__(self, path: Path, layout: Layout):
        self.layout = layout
        self._logged, self.beyond = _read_log(path.with_name(path.name + "-wal"), layout.page_size)
        self._file = path.open("rb")
        length = -(-path.stat().st_size // layout.page_size)
        self.count = max([length, *self._logged])

    def __enter__(self) -> "Pages":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, number: int) -> bytes:
        """Page `number`, from 1; zeros where the file has been cut."""
        if number in self._logged:
            return self._logged[number]
        self._file.seek((number - 1) * self.layout.page_size)
        return self._file.read(self.layout.page_size).ljust(self.layout.page_size, b"\0")

    def free(self) -> set[int]:
        """The pages that hold nothing any more; none where their list is damaged."""
        head = self.read(1)
        trunk, total = struct.unpack(">II", head[32:40])
        found: set[int] = set()
        while trunk:
            if not 1 < trunk <= self.count:
                return set()
            page = self.read(trunk)
            following, leaves = struct.unpack(">II", page[:8])
            if leaves > self.layout.usable // 4 - 2:
                return set()
            numbers = {trunk, *struct.unpack(f">{leaves}I", page[8 : 8 + 4 * leaves])}
            if numbers & found or len(numbers) != leaves + 1:
                return set()
            found |= numbers
            trunk = following
        return found if len(found) == total and all(1 < n <= self.count for n in found) else set()

    def records(self, page: bytes, number: int = 0) -> Iterator[Found]:
        """What looks like a record in a page; `number` is 1 for the first of the file."""
        cells = _cells(page, 100 if number == 1 else 0)
        data = np.frombuffer(page, np.uint8)[: self.layout.usable]
        ends = data == _CHECKSUM_TYPE
        for size in range(4, _LONGEST_HEADER):
            starts = np.flatnonzero((data[: 1 - size] == size) & ends[size - 1 :])
            for start in starts.tolist():
                yield from self._records_at(page, start, size, cells)

    def _records_at(self, page: bytes, start: int, size: int, cells: set[int]) -> Iterator[Found]:
        types = _serial_types(page, start + 1, start + size)
        if types is None:
            return
        payload = size + sum(map(_size, types))
        if payload > _LARGEST_ROW:
            return
        for cell, row_id in _beginnings(page, start, payload):
            in_table = row_id is not None
            content = self._payload(page, start, payload, in_table)
            if content is None:
                continue
            values = _values(content, size, types)
            if values is not None:
                if in_table and values[0] is None:
                    values = (row_id, *values[1:])
                yield Found(values, in_table, cell in cells)

    def _payload(self, page: bytes, start: int, payload: int, in_table: bool) -> bytes | None:
        local = self.layout.local(payload, in_table)
        parts, left = [page[start : start + local]], payload - local
        if start + local > self.layout.usable:
            return None
        room = self.layout.usable - 4
        at = page[start + local : start + local + 4]
        while left:
            if len(at) < 4 or not 1 < (number := struct.unpack(">I", at)[0]) <= self.count:
                return None
            following = self.read(number)
            parts.append(following[4 : 4 + min(left, room)])
            left -= len(parts[-1])
            at = following[:4]
        return b"".join(parts)


def _cells(page: bytes, header: int) -> set[int]:
    """Where the cells of a page begin, by its own pointers, left children not counted."""
    kind = page[header]
    if kind not in (_INTERIOR_INDEX, _LEAF_INDEX, _LEAF_TABLE):
        return set()
    first = header + (12 if kind == _INTERIOR_INDEX else 8)
    count = min(struct.unpack_from(">H", page, header + 3)[0], (len(page) - first) // 2)
    child = 4 if kind == _INTERIOR_INDEX else 0
    return {at + child for at in struct.unpack_from(f">{count}H", page, first)}


def _beginnings(page: bytes, start: int, payload: int) -> Iterator[tuple[int, int | None]]:
    """Where the cell of a record may begin, with its row id; None in a table without.

    A cell is the length of its payload, then the row id if there is one, then the record.
    """
    length = _as_varint(payload)
    at = start - len(length)
    if at >= 0 and page[at:start] == length:
        yield at, None
    for size in range(1, 10):
        at = start - size - len(length)
        if at >= 0 and page[at : start - size] == length:
            row_id, end = _varint(page, start - size)
            if end == start:
                yield at, row_id - (1 << 64) * (row_id >> 63)


def _serial_types(page: bytes, at: int, end: int) -> list[int] | None:
    types = []
    while at < end:
        kind, at = _varint(page, at)
        if kind in (10, 11):
            return None
        types.append(kind)
    return types if at == end else None


def _size(kind: int) -> int:
    return _SIZES[kind] if kind < 12 else (kind - 12) // 2


def _values(content: bytes, at: int, types: list[int]) -> tuple | None:
    if len(content) < at + sum(map(_size, types)):
        return None
    values = []
    for kind in types:
        part = content[at : at + _size(kind)]
        at += len(part)
        if kind == 0:
            values.append(None)
        elif kind < 7:
            values.append(int.from_bytes(part, "big", signed=True))
        elif kind == 7:
            values.append(struct.unpack(">d", part)[0])
        elif kind < 10:
            values.append(kind - 8)
        elif kind % 2:
            values.append(part.decode("utf-8", "surrogateescape"))
        else:
            values.append(part)
    return tuple(values)


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """A number of SQLite, 1 to 9 bytes, and where it ends."""
    value = 0
    for place, byte in enumerate(page[at : at + 9]):
        if place == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + place + 1
    return value, len(page) + 1  # Cut off by the end of the page.


def _as_varint(value: int) -> bytes:
    """The inverse, for lengths: below 2**56."""
    parts = [value & 0x7F]
    while value := value >> 7:
        parts.append(value & 0x7F | 0x80)
    return bytes(reversed(parts))


# --- the log ------------------------------------------------------------------------------------


def _read_log(path: Path, page_size: int) -> tuple[dict[int, bytes], list[bytes]]:
    """The newest committed page of each number, and the pages after the first broken frame."""
    log = path.read_bytes() if path.is_file() else b""
    if len(log) < _LOG_HEADER:
        return {}, []
    magic, _, size, _, *salt = struct.unpack(">6I", log[:24])
    order = {0x377F0682: "<", 0x377F0683: ">"}.get(magic)
    sums = struct.unpack(">2I", log[24:_LOG_HEADER])
    headed = order is not None and sums == _log_sums(order, (0, 0), log[:24])
    if headed and size != page_size:
        return {}, []
    whole = headed
    committed: dict[int, bytes] = {}
    waiting: dict[int, bytes] = {}
    beyond = []
    step = _FRAME_HEADER + page_size
    for at in range(_LOG_HEADER, len(log) - step + 1, step):
        head, page = log[at : at + _FRAME_HEADER], log[at + _FRAME_HEADER : at + step]
        number, commit, *found = struct.unpack(">6I", head)
        ours = found[:2] == salt  # Frames of an earlier round of the log have another.
        if whole and ours:
            sums = _log_sums(order, _log_sums(order, sums, head[:8]), page)
            if tuple(found[2:]) == sums and number:
                waiting[number] = page
                if commit:
                    committed.update(waiting)
                    waiting.clear()
                continue
        whole = False
        if ours or not headed:
            beyond.append(page)
    return committed, [*waiting.values(), *beyond] if beyond else []


def _log_sums(order: str, sums: tuple[int, int], data: bytes) -> tuple[int, int]:
    """SQLite's checksum of a log, continued over more bytes."""
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
