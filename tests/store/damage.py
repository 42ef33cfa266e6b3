"""A plain reader of SQLite's b-trees for the tests of damage: where each row's bytes lie.

It follows the b-trees of a sound file from their roots, as SQLite does, and so is another way to
the rows than `lever_jax.store_pages`, which looks for them anywhere.
"""

import sqlite3
import struct

from lever_jax import store_schema as schema

PAGE = 4096


def row_places(path):
    """{(table, row): byte ranges [(start, end)]} of the rows of a sound store without a log.

    The row is as `select_sql` gives it, so it can be compared with what is read elsewhere.
    """
    data = path.read_bytes()
    db = sqlite3.connect(path)
    db.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    places = {}
    for table in schema.TABLES:
        (root,) = db.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)
        ).fetchone()
        cells = list(_cells(data, root))
        rows = db.execute(f"{schema.select_sql(table)} ORDER BY {_order(table)}").fetchall()
        assert len(cells) == len(rows), table
        places.update({(table, row): cell for row, cell in zip(rows, cells)})
    db.close()
    return places


def _order(table):
    columns, keys = schema.TABLES[table]
    return columns[0] if schema.declared(table)[0] else ", ".join(columns[:keys])


def _cells(data, number):
    """Byte ranges of each cell of a b-tree in its order."""
    base = (number - 1) * PAGE
    head = base + (100 if number == 1 else 0)
    kind, _, count = struct.unpack_from(">BHH", data, head)
    interior = kind in (2, 5)
    pointers = struct.unpack_from(f">{count}H", data, head + (12 if interior else 8))
    for pointer in pointers:
        at = base + pointer
        if interior:
            yield from _cells(data, struct.unpack_from(">I", data, at)[0])
        if kind != 5:
            yield _cell(data, at, kind)
    if interior:
        yield from _cells(data, struct.unpack_from(">I", data, head + 8)[0])


def _cell(data, start, kind):
    at = start + (4 if kind == 2 else 0)
    payload, at = _varint(data, at)
    if kind == 13:
        _, at = _varint(data, at)
    most = PAGE - 35 if kind == 13 else (PAGE - 12) * 64 // 255 - 23
    least = (PAGE - 12) * 32 // 255 - 23
    local = payload
    if payload > most:
        local = least + (payload - least) % (PAGE - 4)
        local = least if local > most else local
    ranges = [(start + (4 if kind == 2 else 0), at + local + (4 if payload > local else 0))]
    left, following = payload - local, at + local
    while left > 0:
        (number,) = struct.unpack_from(">I", data, following)
        following = (number - 1) * PAGE
        ranges.append((following, following + PAGE))
        left -= PAGE - 4
    return tuple(ranges)


def _varint(data, at):
    value = 0
    for place in range(9):
        byte = data[at + place]
        if place == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + place + 1
    raise AssertionError
