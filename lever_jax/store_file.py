"""One SQLite file with checksummed rows, nested transactions and a single writer.

The half of `lever_jax.store` that does not care what the rows say: opening and refusing, commit
and undo, the marks of finished stages, counters, and the walk over the whole file.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from lever_jax import store_schema as schema
from lever_jax.store_lock import WriterLock
from lever_jax.store_schema import StoreError

# The second is how a message of SQLite that quotes damaged bytes arrives.
_SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)


class StoreFile:
    """An open store without the tables of records; see `lever_jax.store.Store`."""

    def __init__(self, path: Path, db: sqlite3.Connection, lock: WriterLock | None):
        self.path = path
        self.fingerprint: dict[str, str] = {}
        self._db = db
        self._lock = lock
        self._depth = 0
        self._rows = schema.RowChecksums()

    @classmethod
    def open(
        cls,
        path: str | Path,
        fingerprint: dict[str, str] | None = None,
        *,
        read_only: bool = False,
    ) -> Self:
        """Opens a store, making it first where there is none.

        Args:
          path: the file; `-wal`, `-shm` and `.lock` stand beside it while it is open.
          fingerprint: model, prompt template, generation settings, dataset, metric and whatever
            else a score depends on. It must equal the one in the file, unless the file holds
            nothing yet. None takes the file's.
          read_only: needs no lock and changes nothing, but the file must exist.

        Raises:
          StoreError: another process writes, the fingerprint differs, or the file is not a store,
            is newer than this code, or is damaged.
        """
        path = Path(path)
        if read_only and not path.is_file():
            raise StoreError(f"there is no store {path}; mine first, or correct the path")
        lock = db = None
        try:
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = WriterLock(path)
            with named_errors(path):
                db = schema.connect(path, read_only=read_only)
                store = cls(path, db, lock)
                store._set_up(fingerprint, read_only)
            return store
        except BaseException as error:
            if db is not None:
                db.close()
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise StoreError(f"cannot open {path} for writing: {error}") from error
            raise

    def _set_up(self, fingerprint: dict[str, str] | None, read_only: bool) -> None:
        if not schema.is_empty(self._db):
            schema.check_ours(self._db, self.path)
        elif read_only:
            raise StoreError(f"{self.path} holds nothing yet; run what was to fill it again")
        elif fingerprint is None:
            raise ValueError(f"{self.path} is new: a new store needs a fingerprint")
        schema.configure(self._db, read_only=read_only)
        # A reader takes an older file as it is: it only lacks tables that would be empty.
        if not read_only and schema.version(self._db) < len(schema.MIGRATIONS):
            with self.transaction():
                new = schema.version(self._db) == 0
                schema.migrate(self._db)
                if new:
                    self._write_fingerprint(fingerprint)
        schema.check_schema(self._db, self.path)
        row = self._db.execute(schema.select_sql("meta", "WHERE key = 'fingerprint'")).fetchone()
        if row is None:
            raise StoreError(f"{self.path}: table meta has no fingerprint, so the file is damaged")
        self.fingerprint = json.loads(self._rows.open("meta", row, key="fingerprint")[1])
        differs = fingerprint is not None and fingerprint != self.fingerprint
        if differs and not read_only and self._holds_nothing():
            # A run that stopped before its first record, over a wrong path say, decides nothing.
            with self.transaction():
                self._write_fingerprint(fingerprint)
            self.fingerprint = fingerprint
        if fingerprint is not None:
            schema.check_fingerprint(self.path, self.fingerprint, fingerprint)
        self._rows = schema.RowChecksums(self.fingerprint)

    def _holds_nothing(self) -> bool:
        return not any(
            self._db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()
            for table in schema.tables(self._db)
            if table != "meta"
        )

    def _write_fingerprint(self, fingerprint: dict[str, str]) -> None:
        """Writes the fingerprint, unkeyed, in place of another."""
        row = self._rows.seal("meta", ("fingerprint", schema.canonical_json(fingerprint)))
        replace = "ON CONFLICT (key) DO UPDATE SET value = excluded.value, checksum = "
        self._db.execute(schema.insert_sql("meta", replace + "excluded.checksum"), row)

    def close(self) -> None:
        """Closes the file, and folds the write-ahead log into it. Safe to call twice."""
        try:
            self._db.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Self]:
        """All the puts inside commit together or not at all. May be nested.

        An exception undoes everything since the innermost `with`, and goes on upwards.
        """
        if self._lock is None:
            raise StoreError(f"{self.path} is open for reading only")
        if self._depth and not self._db.in_transaction:
            raise StoreError(f"{self.path}: the transaction was undone by an earlier failure")
        begin, end, undo = "BEGIN IMMEDIATE", "COMMIT", ("ROLLBACK",)
        if self._depth:
            name = f"level_{self._depth}"
            begin, end = f"SAVEPOINT {name}", f"RELEASE {name}"
            undo = (f"ROLLBACK TO {name}", f"RELEASE {name}")
        with named_errors(self.path):
            self._db.execute(begin)
            self._depth += 1
            try:
                yield self
                self._db.execute(end)
            except BaseException:
                # SQLite has already rolled back by itself where the disk is full.
                with contextlib.suppress(sqlite3.Error):
                    for statement in undo:
                        self._db.execute(statement)
                raise
            finally:
                self._depth -= 1

    # --- stages ---------------------------------------------------------------------------------

    def mark_done(self, name: str, info: dict) -> None:
        """Notes that a stage is finished; `info` is JSON. A second note replaces the first."""
        row = self._rows.seal("stages", (name, schema.canonical_json(info)))
        with self.transaction():
            self._db.execute("DELETE FROM stages WHERE name = ?", (name,))
            self._db.execute(schema.insert_sql("stages"), row)

    def done(self, name: str) -> dict | None:
        """What `mark_done` noted about a stage, or None if it is not finished."""
        with named_errors(self.path):
            sql = schema.select_sql("stages", "WHERE name = ?")
            row = self._db.execute(sql, (name,)).fetchone()
            return None if row is None else json.loads(self._rows.open("stages", row, name=name)[1])

    def stages(self) -> list[str]:
        """The stages that are finished, by name."""
        with named_errors(self.path):
            rows = self._db.execute("SELECT name FROM stages ORDER BY name").fetchall()
        return [row[0] for row in rows]

    # --- the whole ------------------------------------------------------------------------------

    @property
    def schema_version(self) -> int:
        """Of the file; a reader takes older ones too."""
        return schema.version(self._db)

    def counts(self) -> dict[str, int]:
        """Rows of each kind and the duplicates that were turned away, without a scan."""
        counts = dict.fromkeys(("scores", "answers", "pools", "proposals", "superseded"), 0)
        counts.update({f"duplicate_{name}": 0 for name in ("scores", "answers")})
        with named_errors(self.path):
            rows = self._db.execute(schema.select_sql("counters")).fetchall()
            counts.update(self._rows.open("counters", row) for row in rows)
            counts["stages"] = self._db.execute("SELECT count(*) FROM stages").fetchone()[0]
        return counts

    def verify(self) -> list[str]:
        """Reads the whole file; the faults found, each with its table and key. [] is sound.

        What is checked: SQLite's own structures, the checksum of every row, what tables say of
        each other, and the counts.
        """
        faults = []
        try:
            lines = [row[0] for row in self._db.execute("PRAGMA integrity_check")]
            faults += [f"integrity_check: {line}" for line in lines if line != "ok"]
        except _SQLITE_ERRORS as error:
            faults.append(f"integrity_check: {error}")
        seen = {}
        for table in schema.tables(self._db):
            name = "the first row"
            seen[table] = 0
            try:
                for row in self._db.execute(schema.select_sql(table)):
                    seen[table] += 1
                    name = schema.name_row(table, row)
                    try:
                        self._rows.open(table, row)
                    except StoreError as error:
                        faults.append(str(error))
            except _SQLITE_ERRORS as error:
                faults.append(f"table {table}, at or after {name}: {error}")
        for table, (_, wrong) in schema.REFERENCES.items():
            try:
                for key in self.dangling(table) if table in seen else ():
                    faults.append(f"table {table}, {schema.name_row(table, key)} {wrong}")
            except StoreError as error:
                faults.append(f"table {table}, what it says of others: {error}")
        try:
            for table, count in self.counts().items():
                if table in seen and seen[table] != count:
                    faults.append(f"table {table}: {seen[table]} rows of {count} are there")
        except StoreError as error:
            faults.append(str(error))
        return faults

    # --- for the tables of records --------------------------------------------------------------

    def dangling(self, table: str) -> list[tuple]:
        """Keys of rows that break what `schema.REFERENCES` says of their table."""
        with named_errors(self.path):
            return self._db.execute(schema.REFERENCES[table][0]).fetchall()

    def add_row(self, table: str, row: tuple) -> bool:
        """Whether the row is new; nothing changes where its key is taken. `recount` afterwards."""
        sql = schema.insert_sql(table, "ON CONFLICT DO NOTHING")
        return self._db.execute(sql, self._rows.seal(table, row)).rowcount == 1

    def add_counts(self, counts: dict[str, int]) -> None:
        """Adds to the counters of that name."""
        with self.transaction():
            for name, more in counts.items():
                self._count(name, more)

    def recount(self, table: str) -> None:
        """Counts the rows of a table and makes that its count."""
        with self.transaction():
            count = self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            self._count(table, count - self.counts()[table])

    def read_rows(self, table: str, where: str = "", values: tuple = ()) -> Iterator[tuple]:
        """Rows of a table, each verified, without their checksums; none where there is no table."""
        with named_errors(self.path):
            if table not in schema.tables(self._db):
                return
            for row in self._db.execute(schema.select_sql(table, where), values):
                yield self._rows.open(table, row)

    def write_rows(self, table: str, rows: list[tuple]) -> None:
        """Writes rows of a table that is not counted; each takes the place of one of its key."""
        sql = schema.insert_sql(table).replace("INSERT", "INSERT OR REPLACE", 1)
        with self.transaction():
            self._db.executemany(sql, [self._rows.seal(table, row) for row in rows])

    def delete_rows(self, table: str, where: str, values: tuple) -> None:
        """Deletes rows of a table; `recount` afterwards, if it is one that is counted."""
        with self.transaction():
            self._db.execute(f"DELETE FROM {table} {where}", values)

    def _insert_new(self, table: str, rows: list[tuple], key: str) -> int:
        """Inserts the rows whose key is new, counts them, and returns how many were not."""
        if not rows:
            return 0
        sql = schema.insert_sql(table, f"ON CONFLICT ({key}) DO NOTHING")
        inserted = self._db.executemany(sql, [self._rows.seal(table, row) for row in rows]).rowcount
        duplicates = len(rows) - inserted
        self._count(table, inserted)
        if table in ("scores", "answers"):
            self._count(f"duplicate_{table}", duplicates)
        return duplicates

    def _count(self, name: str, more: int) -> None:
        if not more:
            return
        sql = schema.select_sql("counters", "WHERE name = ?")
        row = self._db.execute(sql, (name,)).fetchone()
        value = more if row is None else self._rows.open("counters", row, name=name)[1] + more
        self._db.execute("DELETE FROM counters WHERE name = ?", (name,))
        sealed = self._rows.seal("counters", (name, value))
        self._db.execute(schema.insert_sql("counters"), sealed)


_TAKES_NO_MORE = (
    "the disk takes no more: make space, or raise the quota or the limit of file sizes, and start "
    "again; what was committed is safe"
)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns an error of SQLite into a StoreError that names the file and the mend."""
    try:
        yield
    except _SQLITE_ERRORS as error:
        name = getattr(error, "sqlite_errorname", None) or type(error).__name__
        mend = {
            "SQLITE_FULL": "make space and start again; what was committed is safe",
            "SQLITE_READONLY": "it was opened read-only, or its folder is not writable",
            "SQLITE_NOTADB": "it is not a store, or its first bytes are damaged",
            "SQLITE_BUSY": "another process holds it; try again when that has ended",
            # The log's index, the -shm file, needs space too, even to open a store.
            **dict.fromkeys(("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"), _TAKES_NO_MORE),
        }.get(name, "the file may be damaged; python -m experiments.store verify lists what is")
        raise StoreError(f"{path}: {error} ({name}); {mend}") from error
