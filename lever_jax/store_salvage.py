"""Gets every row that is whole out of a damaged store, into a new one.

A row is whole if its bytes are: the checksum, keyed by the fingerprint, says so. The rows are
looked for page by page (`store_pages`), so it does not matter whether SQLite still reads the
file. The ledger of jobs is left behind, and so are the proposals to queries of which something
is lost: they are drawn again, and what is not stored is asked for again by the run itself.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lever_jax import store_schema as schema
from lever_jax.store import Store, StoreError
from lever_jax.store_copies import TABLES, new_store, settle
from lever_jax.store_lock import WriterLock
from lever_jax.store_pages import Found, Pages, layouts

_BATCH = 1000


@dataclass
class Salvaged:
    """What came out.

    Attributes:
      fingerprint: of the store.
      rows: whole rows by table.
      expected: rows by table as the damaged file counts them; what it does not tell is missing.
      left_out: whole rows that are of no use alone, by table: answers and superseded failures
        whose score is lost, and proposals to queries that have to be mined again; see `settle`.
        These are all, where answers or proposals are lost or may be: of whom nothing tells.
      torn: rows of which two versions are whole and nothing says which one counts; none is taken.
    """

    fingerprint: dict[str, str]
    rows: dict[str, int] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    torn: list[str] = field(default_factory=list)


def salvage(source: Path, out: Path, fingerprint: dict[str, str] | None = None) -> Salvaged:
    """Writes the whole rows of `source`, which is not changed, to the new store `out`.

    Args:
      source: the damaged store; its log, if it has one, lies beside it as `source-wal`, where it
        has to be moved with a store that is moved.
      out: must not exist.
      fingerprint: for a file that has lost its own.

    Raises:
      StoreError: the fingerprint is lost and none is given, or another one is given; `out`, or
        a log under its name, exists; `source` does not, is being written, or cannot be locked.
    """
    if not source.is_file():
        raise StoreError(f"there is no file {source}")
    try:
        lock = WriterLock(source)
    except OSError as error:
        raise StoreError(
            f"{source} cannot be locked ({error}); copy it to another folder"
        ) from None
    try:
        own = _own_fingerprint(source)
        if own and fingerprint:
            schema.check_fingerprint(source, own, fingerprint)
        if not (own or fingerprint):
            raise StoreError(
                f"{source} has lost its fingerprint, without which no row can be verified; give "
                "another store of the same settings with --like"
            )
        with new_store(out, own or fingerprint) as store:
            return _Salvage(source, store).run()
    finally:
        lock.release()


def _pages(source: Path) -> Iterator[tuple[Pages, int, bytes]]:
    """Every page that may hold rows, with its number; 0 for those of a broken log."""
    for layout in layouts(source):
        with Pages(source, layout) as pages:
            free = pages.free()
            for number in range(1, pages.count + 1):
                if number not in free:
                    yield pages, number, pages.read(number)
            for page in pages.beyond:
                yield pages, 0, page


def _own_fingerprint(source: Path) -> dict[str, str] | None:
    rows = _Verified(schema.RowChecksums(), ("meta",))
    for pages, number, page in _pages(source):
        for found in pages.records(page, number):
            for _, row in rows.of(found):
                if row[0] == "fingerprint":
                    return json.loads(row[1])
    return None


class _Verified:
    """Tells rows of some tables from what only looks like a record."""

    def __init__(self, checksums: schema.RowChecksums, tables: tuple[str, ...]):
        self._checksums = checksums
        self._by_shape: dict[tuple[int, bool], list[tuple[str, tuple[int, ...]]]] = {}
        for table in tables:
            has_row_ids, reals = schema.declared(table)
            shape = len(schema.TABLES[table][0]) + 1, has_row_ids
            self._by_shape.setdefault(shape, []).append((table, reals))

    def of(self, found: Found) -> Iterator[tuple[str, tuple]]:
        """The table and the row, the checksum with it; nothing where it is none."""
        shape = len(found.values), found.in_table
        for table, reals in self._by_shape.get(shape, ()):
            values = list(found.values)
            for column in reals:  # SQLite writes whole numbers short.
                if isinstance(values[column], int):
                    values[column] = float(values[column])
            try:
                if self._checksums.of(table, values[:-1]) == values[-1]:
                    yield table, tuple(values)
            except OverflowError:  # A number that no row of ours has.
                continue


class _Salvage:
    def __init__(self, source: Path, store: Store):
        self._source, self._store = source, store
        self._result = Salvaged(store.fingerprint)
        self._torn: dict[tuple, str] = {}
        self._remains: set[tuple] = set()
        self._verified = _Verified(schema.RowChecksums(store.fingerprint), (*TABLES, "counters"))

    def run(self) -> Salvaged:
        remains, batch = [], []
        for pages, number, page in _pages(self._source):
            for found in pages.records(page, number):
                for table, row in self._verified.of(found):
                    if found.live and number:
                        batch.append((table, row))
                    else:
                        remains.append((table, row))
            if len(batch) >= _BATCH:
                self._put(batch, live=True)
                batch = []
        self._put(batch, live=True)
        self._put(remains, live=False)
        self._result.left_out = settle(self._store)
        if self._lacks_mined():
            rows = self._store.read_rows("proposals")
            again = settle(self._store, {row[1:3] for row in rows})
            for table, count in again.items():
                self._result.left_out[table] = self._result.left_out.get(table, 0) + count
            self._store.delete_rows("stages", "", ())
        self._result.torn = list(self._torn.values())
        counts = self._store.counts()
        self._result.rows = {table: counts[table] for table in TABLES}
        return self._result

    def _lacks_mined(self) -> bool:
        """Whether mining may take a query for finished whose answers or proposals are lost."""
        counts, expected = self._store.counts(), self._result.expected
        for table in ("answers", "proposals"):
            found = counts[table] + self._result.left_out.get(table, 0)
            if expected.get(table, 0) != found:
                return True
        return False

    def _put(self, batch: list[tuple[str, tuple]], *, live: bool) -> None:
        with self._store.transaction():
            for table, row in batch:
                key, content = (table, *schema.where_key(table, row)[1]), row[:-1]
                if table == "counters":
                    if live:
                        known = self._result.expected.get(content[0], 0)
                        self._result.expected[content[0]] = max(known, content[1])
                elif key not in self._torn and not self._store.add_row(table, content):
                    self._meet(key, content, live)
                elif not live:
                    self._remains.add(key)

    def _meet(self, key: tuple, row: tuple, live: bool) -> None:
        """A row whose key is taken: mostly the same row again, else an earlier state of it."""
        table, *_ = key
        where = schema.where_key(table, row)
        (there,) = self._store.read_rows(table, *where)
        if there == row or _later(table, there, row):
            return
        if _later(table, row, there):
            self._store.write_rows(table, [row])
        elif live or key in self._remains:
            self._store.delete_rows(table, *where)
            self._torn[key] = f"table {table}, {schema.name_row(table, row)}"


def _later(table: str, row: tuple, other: tuple) -> bool:
    """Whether `row` is what became of `other`: a failure gets a score, a proposal is decided."""
    columns = schema.TABLES[table][0]
    for column, ends_null in (("failure", True), ("kept", False)):
        if column in columns:
            at = columns.index(column)
            return ((row[at] is None) == ends_null) and ((other[at] is None) != ends_null)
    return False
