"""Vectors on disk by content key: computed once, memory-mapped ever after.

A table is two files: `NAME.f32`, rows of float32 one after another, and `NAME.sqlite`, which says
which row holds the vector of which key, with a checksum. A row counts only once it is in the
index, and it enters the index only after its data are on the disk, so a process killed at any
moment leaves nothing half-written that could be read. Rows are only ever appended, inside
SQLite's write lock: several processes may fill one table at once, and readers never wait.
"""

import contextlib
import os
import pathlib
import sqlite3
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_bridge.errors import InputError

KEY_BYTES = 16
_WAIT_S = 120.0  # for another process that is just appending
_CHECK_ROWS = 4096  # rows whose checksums are verified at a time


class VectorTable:
    """Float32 vectors of one width, by key.

    Args:
      folder: made if it is not there.
      name: of the two files.
      width: floats of a vector.

    Attributes:
      path: of the rows.

    Raises:
      InputError: the files cannot be used; the message names them and the flag.
    """

    def __init__(self, folder: pathlib.Path, name: str, width: int):
        self.path = folder / f"{name}.f32"
        self._index_path = folder / f"{name}.sqlite"
        self.width = width
        with self._named_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self._index_path, timeout=_WAIT_S, isolation_level=None)
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, "
                "row INTEGER NOT NULL UNIQUE, checksum INTEGER NOT NULL)"
            )

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, int]:
        """Looks keys up.

        Args:
          keys: `N` of them.

        Returns:
          int64 `[N]` rows of `data()`, -1 for a key that has none; and how many rows were found
          damaged (by their checksum). Those are taken out of the index and count as missing.
        """
        sql = "SELECT row, checksum FROM vectors WHERE key = ?"
        with self._named_errors():
            found = [self._db.execute(sql, (key,)).fetchone() or (-1, 0) for key in keys]
        rows, checksums = np.array(found, np.int64).reshape(-1, 2).T
        bad = self._damaged(rows, checksums)
        if len(bad):
            gone = [(keys[i],) for i in bad]
            with self._writing():
                self._db.executemany("DELETE FROM vectors WHERE key = ?", gone)
            rows[bad] = -1
        return rows, len(bad)

    def append(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Keeps vectors; those of keys that are there already are left as they are.

        Args:
          keys: `N` of them.
          vectors: float32 `[N, width]`.
        """
        vectors = np.ascontiguousarray(vectors, "<f4")
        if vectors.shape != (len(keys), self.width):
            raise ValueError(f"{len(keys)} keys for vectors {vectors.shape} of width {self.width}")
        with self._writing():
            first = self._db.execute("SELECT COALESCE(MAX(row) + 1, 0) FROM vectors").fetchone()[0]
            self._write(first, vectors)
            self._db.executemany(
                "INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)",
                [(key, first + i, zlib.crc32(vectors[i])) for i, key in enumerate(keys)],
            )

    def data(self) -> np.ndarray:
        """The rows as they are on the disk now, read when they are touched: `[rows, width]`."""
        with self._named_errors():
            size = self.path.stat().st_size if self.path.exists() else 0
            rows = size // (4 * self.width)
            if not rows:
                return np.zeros((0, self.width), np.float32)
            return np.memmap(self.path, "<f4", "r", shape=(rows, self.width))

    def close(self) -> None:
        """Closes the index; arrays of `data` live on."""
        self._db.close()

    def _damaged(self, rows: np.ndarray, checksums: np.ndarray) -> np.ndarray:
        """Which of the found rows are not on the disk as they were written."""
        data = self.data()
        bad = rows >= len(data)
        known = np.flatnonzero((rows >= 0) & ~bad)
        known = known[np.argsort(rows[known], kind="stable")]  # in the order of the disk
        for first in range(0, len(known), _CHECK_ROWS):
            some = known[first : first + _CHECK_ROWS]
            for i, vector in zip(some, data[rows[some]]):
                bad[i] = zlib.crc32(vector) != checksums[i]
        return np.flatnonzero(bad)

    def _write(self, first: int, vectors: np.ndarray) -> None:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            left, offset = memoryview(vectors).cast("B"), first * 4 * self.width
            while left:
                done = os.pwrite(file, left, offset)
                left, offset = left[done:], offset + done
            os.fsync(file)
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Holds the table's write lock; what is indexed meanwhile counts from its end on."""
        with self._named_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"{self._index_path}: embeddings cannot be kept there ({error}); make room, delete "
                "this file, or give another --embeddings_dir"
            ) from error
