"""What the file of `lever_jax.store` looks like inside: tables, migrations, checksums, bytes.

The store is one SQLite database. This module owns everything about it that must never change by
accident: the tables as text, the order of the columns that a checksum covers, how a pointer and an
array become bytes, and how an older file is brought forward. `store.py` holds the operations.
"""

import functools
import hashlib
import json
import os
import re
import sqlite3
import struct
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgpack
import numpy as np

from lever_jax.errors import InputError

APPLICATION_ID = 0x4C455652  # "LEVR"; tells our file from any other SQLite file.
_LITTLE_ENDIAN = sys.byteorder == "little"
_PACK = msgpack.Packer().pack

# Key columns first; the number after a table's columns says how many of them name a row.
TABLES: dict[str, tuple[tuple[str, ...], int]] = {
    "meta": (("key", "value"), 1),
    "counters": (("name", "value"), 1),
    "stages": (("name", "info"), 1),
    "pools": (("query_id", "demo_ids", "similarity"), 1),
    "scores": (
        ("query_id", "pointer", "gt_prob", "answer_log_probs", "certified", "margin", "failure"),
        2,
    ),
    "answers": (
        ("query_id", "pointer", "prediction", "accuracy", "accuracy_official", "confidence")
        + ("similarity", "how", "failure"),
        2,
    ),
    "proposals": (("id", "stage", "query_id", "pointer", "source", "log_prob", "kept"), 4),
    "superseded": (("query_id", "pointer", "verb", "number", "failure"), 4),
    "jobs": (("key", "verb", "state", "attempts", "size", "owner", "prompts", "reason"), 1),
}

_VERSION_1 = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum BLOB NOT NULL)"
    " WITHOUT ROWID",
    "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL, checksum BLOB NOT NULL)"
    " WITHOUT ROWID",
    "CREATE TABLE stages (name TEXT PRIMARY KEY, info TEXT NOT NULL, checksum BLOB NOT NULL)"
    " WITHOUT ROWID",
    "CREATE TABLE pools (query_id INTEGER PRIMARY KEY, demo_ids BLOB NOT NULL,"
    " similarity BLOB NOT NULL, checksum BLOB NOT NULL)",
    "CREATE TABLE scores (query_id INTEGER NOT NULL, pointer BLOB NOT NULL, gt_prob REAL,"
    " answer_log_probs BLOB, certified TEXT, margin REAL, failure TEXT, checksum BLOB NOT NULL,"
    " PRIMARY KEY (query_id, pointer)) WITHOUT ROWID",
    "CREATE TABLE answers (query_id INTEGER NOT NULL, pointer BLOB NOT NULL, prediction TEXT,"
    " accuracy REAL, accuracy_official REAL, confidence REAL, similarity REAL, how TEXT,"
    " failure TEXT, checksum BLOB NOT NULL, PRIMARY KEY (query_id, pointer)) WITHOUT ROWID",
    "CREATE TABLE proposals (id INTEGER PRIMARY KEY, stage TEXT NOT NULL,"
    " query_id INTEGER NOT NULL, pointer BLOB NOT NULL, source TEXT NOT NULL, log_prob REAL,"
    " kept INTEGER, checksum BLOB NOT NULL, UNIQUE (stage, query_id, pointer))",
)

# The ledger of jobs, and what a failure said before a later attempt took its place. The indexes
# hold what is rare, so that nothing has to scan the large tables for it.
_VERSION_2 = (
    "CREATE TABLE superseded (query_id INTEGER NOT NULL, pointer BLOB NOT NULL,"
    " verb TEXT NOT NULL, number INTEGER NOT NULL, failure TEXT NOT NULL, checksum BLOB NOT NULL,"
    " PRIMARY KEY (query_id, pointer, verb, number)) WITHOUT ROWID",
    "CREATE TABLE jobs (key BLOB PRIMARY KEY, verb TEXT NOT NULL, state TEXT NOT NULL,"
    " attempts INTEGER NOT NULL, size INTEGER NOT NULL, owner TEXT, prompts BLOB, reason TEXT,"
    " checksum BLOB NOT NULL) WITHOUT ROWID",
    "CREATE INDEX open_jobs ON jobs (state) WHERE state IN ('todo', 'leased')",
    "CREATE INDEX failed_scores ON scores (failure) WHERE failure IS NOT NULL",
    "CREATE INDEX failed_answers ON answers (failure) WHERE failure IS NOT NULL",
)

# MIGRATIONS[v] takes a file from version v to v + 1. Append; never edit one that was released.
MIGRATIONS: list[tuple[str, ...]] = [_VERSION_1, _VERSION_2]

# What one table says of another: how to find the keys of rows that break it, and in words.
REFERENCES = {
    "answers": (
        "SELECT a.query_id, a.pointer FROM answers a LEFT JOIN scores s"
        " ON s.query_id = a.query_id AND s.pointer = a.pointer"
        " WHERE s.query_id IS NULL OR s.failure IS NOT NULL",
        "is an answer to a prompt without a score",
    ),
    "proposals": (
        "SELECT p.id, p.stage, p.query_id, p.pointer FROM proposals p LEFT JOIN scores s"
        " ON s.query_id = p.query_id AND s.pointer = p.pointer WHERE s.query_id IS NULL",
        "was proposed and has no score",
    ),
    "superseded": (
        "SELECT u.query_id, u.pointer, u.verb, u.number FROM superseded u LEFT JOIN scores s"
        " ON s.query_id = u.query_id AND s.pointer = u.pointer WHERE s.query_id IS NULL",
        "is a failure of a prompt without a score",
    ),
}


class StoreError(InputError):
    """A store that is damaged, busy or used wrongly; the message names the table and the key."""


def select_sql(table: str, where: str = "") -> str:
    """SELECT of a table's columns in the order that its checksum covers, the checksum last."""
    return f"SELECT {', '.join(TABLES[table][0])}, checksum FROM {table} {where}"


def where_key(table: str, row: Sequence) -> tuple[str, tuple]:
    """WHERE for the row that has the key of `row`, and its values."""
    columns, keys = TABLES[table]
    names = ("id",) if columns[0] == "id" else columns[:keys]
    return "WHERE " + " AND ".join(f"{name} = ?" for name in names), tuple(row[: len(names)])


@functools.cache
def declared(table: str) -> tuple[bool, tuple[int, ...]]:
    """Whether a table has row ids, and which of its columns hold real numbers."""
    (text,) = (
        statement
        for statements in MIGRATIONS
        for statement in statements
        if statement.startswith(f"CREATE TABLE {table} ")
    )
    columns = TABLES[table][0]
    reals = [i for i, name in enumerate(columns) if re.search(rf"\b{name} REAL\b", text)]
    return not text.endswith("WITHOUT ROWID"), tuple(reals)


def insert_sql(table: str, conflict: str = "") -> str:
    """INSERT of a whole row, the checksum last."""
    columns = (*TABLES[table][0], "checksum")
    marks = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) {conflict}"


# --- rows and their checksums -------------------------------------------------------------------


class RowChecksums:
    """Eight bytes of BLAKE2b over a row's content, keyed by the store's fingerprint.

    The key makes the fingerprint part of every row: a row that another model or prompt template
    produced does not verify here, however it got into the file. `meta` and `counters` are not
    keyed, because the fingerprint itself is read from there.
    """

    def __init__(self, fingerprint: dict[str, str] | None = None):
        key = b""
        if fingerprint is not None:
            key = hashlib.blake2b(canonical_json(fingerprint).encode(), digest_size=32).digest()
        self._hashers = {
            table: hashlib.blake2b(
                digest_size=8,
                key=b"" if table in ("meta", "counters") else key,
                person=table.encode(),
            )
            for table in TABLES
        }
        # Text that is not UTF-8 any more must fail as a wrong checksum, not as a codec error.
        self._pack = msgpack.Packer(unicode_errors="surrogateescape").pack

    def of(self, table: str, row: Sequence) -> bytes:
        """The checksum of a row's content, its columns in the order of `TABLES`."""
        hasher = self._hashers[table].copy()
        hasher.update(self._pack(tuple(row)))
        return hasher.digest()

    def seal(self, table: str, row: tuple) -> tuple:
        """The row with its checksum appended, as it goes into the file."""
        return (*row, self.of(table, row))

    def open(self, table: str, row: tuple, **key: object) -> tuple:
        """A row as read, verified, without its checksum.

        Args:
          table: the table.
          row: its columns and its checksum.
          **key: the values that the row was looked up by; through a damaged index SQLite can
            answer with a row that is whole and another one.
        """
        content = row[:-1]
        if row[-1] != self.of(table, content):
            raise StoreError(
                f"table {table}, {name_row(table, content)}: the content does not match its "
                "checksum, so the file is damaged; restore a backup, or get the rest out with "
                "python -m experiments.store salvage"
            )
        columns = TABLES[table][0]
        if any(content[columns.index(name)] != value for name, value in key.items()):
            raise StoreError(
                f"table {table}: asked for {_in_words(key)}, found {name_row(table, content)}, so "
                "the order of the table is damaged; restore a backup, or get the rest out with "
                "python -m experiments.store salvage"
            )
        return content


def name_row(table: str, row: Sequence) -> str:
    """A row's key in words: `query_id 7, pointer (3, 1)`."""
    columns, keys = TABLES[table]
    return _in_words(dict(zip(columns[:keys], row, strict=False)))


def _in_words(key: dict[str, object]) -> str:
    parts = []
    for column, value in key.items():
        if column == "pointer" and isinstance(value, bytes) and len(value) % 8 == 0:
            value = unpack_pointer(value)
        if column != "id":
            parts.append(f"{column} {value}")
    return ", ".join(parts)


# --- values as bytes ----------------------------------------------------------------------------


def pack_array(array: np.ndarray | None) -> bytes | None:
    """An array as msgpack `[dtype, shape, little-endian bytes]`."""
    if array is None:
        return None
    array = np.asarray(array)
    if not array.dtype.isnative or not _LITTLE_ENDIAN:
        array = array.astype(array.dtype.newbyteorder("<"))
    return _PACK((array.dtype.str, array.shape, array.tobytes()))


def unpack_array(blob: bytes | None) -> np.ndarray | None:
    """The inverse of `pack_array`; the result is writable and owns its memory."""
    if blob is None:
        return None
    dtype, shape, data = msgpack.unpackb(blob, max_bin_len=len(blob), max_array_len=8)
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()


def pack_pointer(pointer: Sequence[int]) -> bytes:
    """An ordered tuple of demonstration ids as little-endian int64; empty for zero-shot."""
    return struct.pack(f"<{len(pointer)}q", *pointer)


def unpack_pointer(blob: bytes) -> tuple[int, ...]:
    """The inverse of `pack_pointer`."""
    return tuple(np.frombuffer(blob, "<i8").tolist())


def pack_padded(ids: np.ndarray, what: str) -> list[bytes]:
    """Rows of non-negative ids, right-padded with -1, as blobs without the padding.

    Args:
      ids: [n, S] int64.
      what: the name of the argument, for the error message.

    Returns:
      n blobs as `pack_pointer` makes them.
    """
    ids = np.ascontiguousarray(ids, "<i8")
    if ids.ndim != 2:
        raise ValueError(f"{what} has shape {ids.shape}; it must be [n, S], right-padded with -1")
    used = ids >= 0
    lengths = used.sum(axis=1)
    misplaced = (used != (np.arange(ids.shape[1]) < lengths[:, None])) | (ids < -1)
    if misplaced.any():
        row = int(misplaced.any(axis=1).argmax())
        raise ValueError(
            f"{what} row {row} is {ids[row].tolist()}; ids are >= 0 and -1 stands only at the end"
        )
    data, width = ids.tobytes(), 8 * ids.shape[1]
    return [data[i * width : i * width + 8 * n] for i, n in enumerate(lengths.tolist())]


def unpack_padded(blobs: Sequence[bytes]) -> np.ndarray:
    """The inverse of `pack_padded`: [n, longest] int64, right-padded with -1."""
    width = max(map(len, blobs), default=0)
    data = b"".join(blob.ljust(width, b"\xff") for blob in blobs)
    return np.frombuffer(data, "<i8").reshape(len(blobs), width // 8).astype(np.int64)


def real(value: float | None) -> float | None:
    """A float as SQLite keeps it: NaN becomes NULL there and -0.0 becomes 0.0."""
    if value is None or value != value:
        return None
    return float(value) + 0.0


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces, the same text for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# --- the file -----------------------------------------------------------------------------------


def connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """Opens the database without changing it; transactions are begun and committed by hand."""
    mode = "rwc"
    if read_only:
        # A reader that may write its folder can tidy away `-wal` and `-shm` when it closes, which
        # mode=ro never does; `configure` still forbids it to change anything. One that may not
        # needs `immutable` to open at all, which is right where no log waits to be read.
        mode = "rw"
        if not (os.access(path, os.W_OK) and os.access(path.absolute().parent, os.W_OK)):
            mode = "ro" if path.with_name(f"{path.name}-wal").exists() else "ro&immutable=1"
    name = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(name, uri=True, timeout=10.0, isolation_level=None)
    db.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    return db


def configure(db: sqlite3.Connection, *, read_only: bool) -> None:
    """Sets caution, cache and durability of a connection.

    `synchronous=FULL` syncs the log at every commit, so that a committed batch survives a power
    cut as well as a killed process. A batch stands for seconds of a GPU and the sync for
    milliseconds; NORMAL would save those and lose the last batches with the power.
    """
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    db.execute("PRAGMA cache_size = -65536")  # KiB
    if read_only:
        db.execute("PRAGMA query_only = ON")
    else:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")


def tables(db: sqlite3.Connection) -> list[str]:
    """Our tables that the file has; an older file lacks the newer ones."""
    rows = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return [table for table in TABLES if (table,) in rows]


def version(db: sqlite3.Connection) -> int:
    """The schema version of the file; 0 for a new and empty one."""
    return db.execute("PRAGMA user_version").fetchone()[0]


def is_empty(db: sqlite3.Connection) -> bool:
    """Whether nothing was ever created in the file."""
    return version(db) == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


def check_ours(db: sqlite3.Connection, path: Path) -> None:
    """Refuses a database that is not a store, or that a newer version of this code wrote."""
    found = db.execute("PRAGMA application_id").fetchone()[0]
    if found != APPLICATION_ID:
        raise StoreError(
            f"{path} is an SQLite file but not a store (application id {found:#x}, not "
            f"{APPLICATION_ID:#x}); name another file"
        )
    if not 1 <= version(db) <= len(MIGRATIONS):
        raise StoreError(
            f"{path} has schema version {version(db)}, this code knows 1 to {len(MIGRATIONS)}; "
            "use the version of the code that wrote it, or a newer one"
        )


def migrate(db: sqlite3.Connection) -> int:
    """Brings the file to the newest schema inside the caller's transaction; the steps taken."""
    start = version(db)
    for statements in MIGRATIONS[start:]:
        for statement in statements:
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    return len(MIGRATIONS) - start


def check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Refuses a file whose tables are not exactly those of its schema version."""
    listing = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
    fresh = sqlite3.connect(":memory:")
    try:
        for statements in MIGRATIONS[: version(db)]:
            for statement in statements:
                fresh.execute(statement)
        expected = dict(fresh.execute(listing))
    finally:
        fresh.close()
    found = dict(db.execute(listing))
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise StoreError(f"{path}: table {name} is missing, so the file is damaged")
        if found[name] != expected.get(name):
            raise StoreError(f"{path}: table {name} is not as this code creates it")


def differences(
    stored: dict[str, str], given: dict[str, str], there: str = "in the file", here: str = "now"
) -> Iterator[str]:
    """What differs between two fingerprints, a phrase for each key."""
    for key in sorted(stored.keys() | given.keys()):
        if key not in given:
            yield f"{key} is {stored[key]!r} {there} and not given {here}"
        elif key not in stored:
            yield f"{key} is not {there} and {given[key]!r} {here}"
        elif stored[key] != given[key]:
            yield f"{key} is {stored[key]!r} {there} and {given[key]!r} {here}"


# What the keys of a run's fingerprint follow, for messages; a store may have other keys.
_DECIDED_BY = {
    "dataset": "--dataset, what its files say, --world_seed and --bank_size",
    "generation": "--max_new_tokens",
    "metric": "--answer_weight and --gt_prob",
    "model": "--model, --dtype, --min_pixels and --max_pixels",
    "prompt_template": "--prompt_style and --instruction",
}


def check_fingerprint(where: str | os.PathLike, stored: dict, given: dict) -> None:
    """Refuses another fingerprint, and spells out every key that differs."""
    found = list(differences(stored, given))
    if found:
        keys = [key for key in _DECIDED_BY if stored.get(key) != given.get(key)]
        follows = "".join(f" ({key} follows {_DECIDED_BY[key]})" for key in keys)
        raise StoreError(
            f"{where} was made with other settings: {'; '.join(found)}. Scores of different "
            f"settings cannot be mixed; use the same settings or another file{follows}"
        )
