"""New stores out of whole ones: merge, filter and split, each row verified as it is read.

What is copied is what was paid for: pools, scores, answers, proposals, superseded failures and
the marks of finished stages. The ledger of jobs is not: what is not stored is asked for again by
the run itself. A new file appears whole or not at all, and none is overwritten.
"""

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lever_jax import store_schema as schema
from lever_jax.store import Store, StoreError

# Scores before what refers to them.
TABLES = ("stages", "pools", "scores", "answers", "superseded", "proposals")
_BATCH = 10_000
# What SQLite keeps beside a file.
_LOGS = ("-wal", "-shm", "-journal")
_NAMED = 20
_DUPLICATES = ("duplicate_scores", "duplicate_answers")
_VERBS = {"scores": "score", "answers": "answer"}


@contextlib.contextmanager
def new_store(out: Path, fingerprint: dict[str, str]) -> Iterator[Store]:
    """A new store that becomes `out` if the block ends well, and else disappears.

    Raises:
      StoreError: `out`, or a log under its name, exists.
    """
    check_free(out)
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with Store.open(partial, fingerprint) as store:
            yield store
        check_free(out)
        partial.replace(out)
    finally:
        for suffix in ("", *_LOGS):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)


def check_free(out: Path) -> None:
    """Refuses a name that is taken, by a file or by the log of one that was moved or deleted.

    SQLite would replay such a log into whatever file comes to lie beside it.

    Raises:
      StoreError: with the file, and what to do.
    """
    if out.exists():
        raise StoreError(f"{out} exists and is not overwritten; name another file")
    for suffix in _LOGS:
        log = out.with_name(out.name + suffix)
        if log.exists():
            raise StoreError(
                f"{log} exists without its store and would be replayed into a new {out}; move it "
                f"beside the store that it belongs to, as that store's name with {suffix}, or name "
                "another file"
            )


def settle(store: Store, undone: Iterable[tuple[str, int]] = ()) -> dict[str, int]:
    """Counts the rows of a store that was filled by hand, without those that dangle.

    Mining takes a query that has any proposal for finished. So where one dangles, all that its
    stage proposed to its query goes, and the stage is not marked any more: the query is mined
    again, with the same proposals, and only what is not stored is asked for.

    Args:
      store: filled with `add_row`.
      undone: stages and query ids that are to be mined again for another reason.

    Returns:
      How many answers, proposals and superseded failures were left out, because the score that
      they belong to is not there, or because their query is to be mined again.
    """
    _recount(store)
    before = store.counts()
    with store.transaction():
        for table in schema.REFERENCES:
            keys = store.dangling(table)
            if table == "proposals":
                for stage, query_id in {*undone, *(key[1:3] for key in keys)}:
                    where = "WHERE stage = ? AND query_id = ?"
                    store.delete_rows(table, where, (stage, query_id))
                    store.delete_rows("stages", "WHERE name = ?", (stage,))
                continue
            for key in keys:
                store.delete_rows(table, *schema.where_key(table, key))
    _recount(store)
    after = store.counts()
    left_out = {table: before[table] - after[table] for table in schema.REFERENCES}
    return {table: count for table, count in left_out.items() if count}


def _recount(store: Store) -> None:
    for table in TABLES:
        if table != "stages":
            store.recount(table)


# --- filter and split ---------------------------------------------------------------------------


def filter_store(
    source: Path,
    out: Path,
    *,
    queries: Iterable[int] | None = None,
    stage: str | None = None,
    drop_failed: bool = False,
) -> dict[str, int]:
    """Copies what all of the conditions keep; the rows of each table that were left out.

    Args:
      source: a store.
      out: must not exist.
      queries: only these.
      stage: only this mining stage, with the scores of what it proposed.
      drop_failed: without scores and answers that failed, and without the proposals of their
        queries to the stages that proposed them, so that a run asks for them again.

    Raises:
      StoreError: `out` exists, there is no such stage, or a row of `source` is damaged.
    """
    wanted = None if queries is None else {int(query_id) for query_id in queries}
    with Store.open(source, read_only=True) as store:
        proposed = None
        if stage is not None:
            if stage not in store.proposal_stages():
                names = ", ".join(store.proposal_stages()) or "none"
                raise StoreError(f"{source} has no stage {stage!r}; it has {names}")
            rows = store.read_rows("proposals", "WHERE stage = ?", (stage,))
            proposed = {(row[2], row[3]) for row in rows}
        failed, undone = set(), set()
        pools = None if proposed is None else {query_id for query_id, _ in proposed}

        def keep(table: str, row: tuple) -> bool:
            named = dict(zip(schema.TABLES[table][0], row, strict=True))
            if table == "stages":
                return stage in (None, named["name"])
            query_id = named["query_id"]
            if wanted is not None and query_id not in wanted:
                return False
            if proposed is not None:
                if table == "pools":
                    return query_id in pools
                if table == "proposals" and named["stage"] != stage:
                    return False
                if (query_id, named["pointer"]) not in proposed:
                    return False
            if drop_failed and table in _VERBS and named["failure"] is not None:
                failed.add((query_id, named["pointer"]))
                return False
            if table == "proposals" and (query_id, named["pointer"]) in failed:
                undone.add((named["stage"], query_id))
            return True

        with new_store(out, store.fingerprint) as copy:
            for table in TABLES:
                _copy(store, copy, table, lambda row, table=table: keep(table, row))
            settle(copy, undone)
            before, after = store.counts(), copy.counts()
    return {table: before[table] - after[table] for table in TABLES}


def split_store(source: Path, outs: list[Path]) -> list[int]:
    """Cuts a store by query into several of near equal size; how many queries each has.

    The marks of finished stages are in each. `merge_stores` puts the parts together again.

    Raises:
      StoreError: an output, or a log under its name, exists, or a row of `source` is damaged.
    """
    for out in outs:
        check_free(out)
    with Store.open(source, read_only=True) as store, contextlib.ExitStack() as stack:
        part = {query_id: i % len(outs) for i, query_id in enumerate(store.queries().tolist())}
        copies = [stack.enter_context(new_store(out, store.fingerprint)) for out in outs]
        for table in TABLES:
            at = schema.TABLES[table][0].index("query_id") if table != "stages" else None
            for batch in _batches(store.read_rows(table)):
                for i, copy in enumerate(copies):
                    with copy.transaction():
                        for row in batch:
                            if at is None or part[row[at]] == i:
                                copy.add_row(table, row)
        for copy in copies:
            settle(copy)
        copies[0].add_counts({name: store.counts()[name] for name in _DUPLICATES})
    return np.bincount(list(part.values()), minlength=len(outs)).tolist()


def _copy(source: Store, out: Store, table: str, keep: Callable[[tuple], bool]) -> None:
    for batch in _batches(filter(keep, source.read_rows(table))):
        with out.transaction():
            for row in batch:
                out.add_row(table, row)


def _batches(rows: Iterable) -> Iterator[list]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


# --- merge --------------------------------------------------------------------------------------


@dataclass
class Merged:
    """What became of several stores.

    Attributes:
      counts: of the new store, as `Store.counts`.
      equal: rows that more than one store had alike.
      settled: failures whose prompt another store has a score or an answer of, which counts, or
        another failure of, of which the first counts.
      open_stages: stages that are finished differently in different stores; not marked any more.
    """

    counts: dict[str, int] = field(default_factory=dict)
    equal: int = 0
    settled: int = 0
    open_stages: set[str] = field(default_factory=set)


def merge_stores(sources: list[Path], out: Path) -> Merged:
    """Puts stores of one fingerprint together into a new one.

    Proposals are ordered by their places in their own stores.

    Raises:
      StoreError: fingerprints differ, with the difference; two stores contradict each other, with
        the keys; `out` exists; or a row is damaged.
    """
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(Store.open(path, read_only=True)) for path in sources]
        first = stores[0]
        for store in stores[1:]:
            differs = schema.differences(
                first.fingerprint, store.fingerprint, f"in {first.path}", f"in {store.path}"
            )
            if found := "; ".join(differs):
                raise StoreError(f"scores of different settings cannot be merged: {found}")
        with new_store(out, first.fingerprint) as copy:
            return _Merge(stores, copy).run()


class _Merge:
    def __init__(self, sources: list[Store], out: Store):
        self._sources, self._out = sources, out
        self._result = Merged()
        self._conflicts: list[str] = []

    def run(self) -> Merged:
        for table in TABLES:
            rows = ((store, row) for store in self._sources for row in store.read_rows(table))
            if table == "proposals":
                rows = self._proposals()
            for batch in _batches(rows):
                with self._out.transaction():
                    for store, row in batch:
                        if not self._out.add_row(table, row):
                            self._meet(table, row, store)
        if self._conflicts:
            named = self._conflicts[:_NAMED]
            more = len(self._conflicts) - len(named)
            raise StoreError(
                f"{len(self._conflicts)} rows contradict each other, so nothing was merged; filter "
                f"one of the stores: {'; '.join(named)}" + (f"; and {more} more" if more else "")
            )
        for name in self._result.open_stages:
            self._out.delete_rows("stages", "WHERE name = ?", (name,))
        settle(self._out)
        for store in self._sources:
            counts = store.counts()
            self._out.add_counts({name: counts[name] for name in _DUPLICATES})
        self._result.counts = self._out.counts()
        return self._result

    def _proposals(self) -> Iterator[tuple[Store, tuple]]:
        """All proposals in rising order, with new places where two stores have the same."""
        ordered = [
            ((row[0], i, row) for row in store.read_rows("proposals", "ORDER BY id"))
            for i, store in enumerate(self._sources)
        ]
        last = 0
        for place, i, row in heapq.merge(*ordered, key=lambda item: item[:2]):
            last = max(last + 1, place)
            yield self._sources[i], (last, *row[1:])

    def _meet(self, table: str, row: tuple, store: Store) -> None:
        """A row of `store` whose key is taken in the new one."""
        out, where = self._out, schema.where_key(table, row)
        if table == "proposals":
            where = "WHERE stage = ? AND query_id = ? AND pointer = ?", row[1:4]
        (there,) = out.read_rows(table, *where)
        if table == "proposals":
            row = (there[0], *row[1:])
        same = there[:2] == row[:2] if table == "pools" else there == row
        if same:
            self._result.equal += 1
        elif table == "stages":
            self._result.open_stages.add(row[0])
        elif table == "superseded":
            self._note(row[:3], row[4])
        elif table in _VERBS and there[-1] != row[-1]:
            self._result.settled += 1
            if row[-1] is None:
                out.write_rows(table, [row])
            self._note((*row[:2], _VERBS[table]), there[-1] if row[-1] is None else row[-1])
        elif table == "proposals" and there[:-1] == row[:-1] and self._may_differ(there, row):
            if there[-1] is None or row[-1] == 1:
                out.write_rows(table, [row])
        else:
            self._conflicts.append(f"table {table}, {schema.name_row(table, row)} in {store.path}")

    def _may_differ(self, there: tuple, row: tuple) -> bool:
        """Whether one store decided, or kept after a retry, what the other did not."""
        if None in (there[-1], row[-1]):
            return True
        prompt = row[2:4]
        where = "WHERE query_id = ? AND pointer = ?"
        tables = ("superseded", "answers")
        return any(next(self._out.read_rows(table, where, prompt), None) for table in tables)

    def _note(self, key: tuple, failure: str) -> None:
        """Adds a failure to those that were superseded for a prompt and a verb."""
        where = "WHERE query_id = ? AND pointer = ? AND verb = ? ORDER BY number"
        known = list(self._out.read_rows("superseded", where, key))
        if failure not in (row[4] for row in known):
            number = known[-1][3] + 1 if known else 1
            self._out.add_row("superseded", (*key, number, failure))
