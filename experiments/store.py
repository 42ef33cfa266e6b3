"""Looks at stores, checks them, and makes new ones of them.

    python -m experiments.store info    runs/digits/store.sqlite
    python -m experiments.store verify  runs/digits/store.sqlite
    python -m experiments.store merge   --out=all.sqlite a.sqlite b.sqlite ...
    python -m experiments.store filter  --out=some.sqlite [--queries=FILE] [--stage=NAME]
                                        [--drop_failed] store.sqlite
    python -m experiments.store split   --out=part.sqlite --parts=8 store.sqlite
    python -m experiments.store salvage --out=saved.sqlite [--like=other.sqlite] broken.sqlite

`info` and `verify` change nothing and may run beside a writer; `verify` reads the whole file and
exits with 1 if anything is wrong. `merge` wants stores of one fingerprint; `split` cuts by query
into part-1-of-8.sqlite and so on, and `merge` puts the parts together again. `salvage` gets every
whole row out of a file, even of one that SQLite refuses; if the file was moved, move the `-wal`
beside its old name along, for the last records may be in it. No command overwrites a file, and
what one writes appears whole or not at all.
"""

import pathlib

from absl import flags

from experiments import cli
from experiments.progress import note
from lever_jax.errors import InputError
from lever_jax.ledger import count_states
from lever_jax.store import Store, StoreError
from lever_jax.store_copies import filter_store, merge_stores, split_store
from lever_jax.store_lock import writer_of
from lever_jax.store_salvage import salvage

OUT = flags.DEFINE_string("out", None, "The store to write; it must not exist.")
QUERIES = flags.DEFINE_string(
    "queries", None, "filter: a file of query ids, one a line; only these are kept."
)
STAGE = flags.DEFINE_string(
    "stage", None, "filter: a mining stage; only what it proposed is kept, with its scores."
)
DROP_FAILED = flags.DEFINE_bool(
    "drop_failed",
    False,
    "filter: leave out what is eval_failed, and all that was proposed to the queries where it was, "
    "so that a run mines these again and asks for what failed.",
)
PARTS = flags.DEFINE_integer(
    "parts", None, "split: how many stores.", lower_bound=2, upper_bound=256
)
LIKE = flags.DEFINE_string(
    "like", None, "salvage: a store of the same settings, for a file that lost its fingerprint."
)
FAILED = 1
_REASONS_SHOWN = 10
# The flags that each command reads.
_FLAGS = {
    "info": (),
    "verify": (),
    "merge": ("out",),
    "filter": ("out", "queries", "stage", "drop_failed"),
    "split": ("out", "parts"),
    "salvage": ("out", "like"),
}


def main(arguments: list[str]) -> int | None:
    """Does one command; the exit code."""
    command, *paths = arguments or [""]
    if command not in _FLAGS:
        raise InputError(
            f"{command or 'no command'!r}: give one of {', '.join(_FLAGS)}, then the store, as in "
            "python -m experiments.store info runs/digits/store.sqlite"
        )
    for flag in sorted(set().union(*_FLAGS.values())):
        if flags.FLAGS[flag].present and flag not in _FLAGS[command]:
            raise InputError(f"--{flag} is not for {command}")
    if command == "merge":
        if len(paths) < 2:
            raise InputError("merge: give at least two stores")
    elif len(paths) != 1:
        raise InputError(f"{command}: give one store, not {len(paths)}")
    if "out" in _FLAGS[command] and not OUT.value:
        raise InputError(f"{command}: --out is missing; name the store to write")
    stores = [pathlib.Path(path) for path in paths]
    return _COMMANDS[command](*stores)


def _info(path: pathlib.Path) -> None:
    writer = writer_of(path)
    with Store.open(path, read_only=True) as store:
        size = sum(each.stat().st_size for each in (path, _log(path)) if each.exists())
        note(f"{path}: {size:,} bytes, schema version {store.schema_version}")
        note(f"written by {writer}" if writer else "nobody is writing it")
        for name, value in sorted(store.fingerprint.items()):
            note(f"fingerprint: {name} {value}")
        for name, count in store.counts().items():
            note(f"{name}: {count:,}")
        for name in store.stages():
            note(f"finished stage: {name} {store.done(name)}")
        for name in store.proposal_stages():
            note(f"proposals of: {name}")
        for verb in ("score", "answer"):
            reasons = store.reasons(verb)
            note(f"eval_failed at {verb}: {sum(reasons.values()):,}")
            for reason, count in list(reasons.items())[:_REASONS_SHOWN]:
                note(f"  {count:,} x {reason}")
        states = count_states(store)
        note("jobs: " + ", ".join(f"{count:,} {state}" for state, count in states.items()))


def _verify(path: pathlib.Path) -> int:
    if not path.is_file():
        raise InputError(f"there is no store {path}")
    counts = {}
    try:
        with Store.open(path, read_only=True) as store:
            faults = store.verify()
            if not faults:
                counts = store.counts()
    except StoreError as error:
        faults = [str(error)]
    for fault in faults:
        print(fault)
    if faults:
        note(f"{path}: {len(faults):,} faults; salvage gets out what is whole")
        return FAILED
    rows = ", ".join(f"{counts[name]:,} {name}" for name in ("scores", "answers", "proposals"))
    note(f"{path} is sound: {rows}")
    return 0


def _merge(*paths: pathlib.Path) -> None:
    for path in paths:
        if [each.resolve() for each in paths].count(path.resolve()) > 1:
            raise InputError(f"merge: {path} is named twice; give each store once")
    merged = merge_stores(list(paths), _out())
    note(
        f"{OUT.value}: {merged.counts['scores']:,} scores and {merged.counts['answers']:,} answers "
        f"of {len(paths)} stores; {merged.equal:,} rows were in more than one, and "
        f"{merged.settled:,} failures have a score, an answer or another failure in another"
    )
    for name in sorted(merged.open_stages):
        note(f"stage {name} is finished differently in them, so it is not marked any more")


def _filter(path: pathlib.Path) -> None:
    if QUERIES.value is None and STAGE.value is None and not DROP_FAILED.value:
        raise InputError("filter: give --queries, --stage or --drop_failed")
    left_out = filter_store(
        path,
        _out(),
        queries=None if QUERIES.value is None else _query_ids(QUERIES.value),
        stage=STAGE.value,
        drop_failed=DROP_FAILED.value,
    )
    note(f"{OUT.value}: left out " + ", ".join(f"{n:,} {table}" for table, n in left_out.items()))


def _split(path: pathlib.Path) -> None:
    if PARTS.value is None:
        raise InputError("split: --parts is missing; say how many stores to make")
    out, count = _out(), PARTS.value
    outs = [out.with_name(f"{out.stem}-{i}-of-{count}{out.suffix}") for i in range(1, count + 1)]
    for part, queries in zip(outs, split_store(path, outs), strict=True):
        note(f"{part}: {queries:,} queries")


def _salvage(path: pathlib.Path) -> int:
    fingerprint = None
    if LIKE.value is not None:
        with Store.open(LIKE.value, read_only=True) as like:
            fingerprint = like.fingerprint
    saved = salvage(path, _out(), fingerprint)
    if not _log(path).exists():
        note(
            f"{_log(path)} is not there; if {path} was moved from another name, move the -wal "
            "beside that name along and salvage again: the last records may be in it"
        )
    lost = 0
    for table, count in saved.rows.items():
        whole = count + saved.left_out.get(table, 0)
        expected = saved.expected.get(table)
        missing = "" if expected is None else f", {max(expected - whole, 0):,} lost"
        lost += max((expected or 0) - count, 0)
        note(f"{table}: {count:,} saved{missing}")
    for table, count in saved.left_out.items():
        why = "the scores they belong to are lost"
        if table == "proposals":
            why = "something of their queries is lost, which are mined again; import imported ones"
        note(f"{table}: {count:,} more are whole and left out, {why}")
    for name in saved.torn:
        note(f"{name}: there are two versions of it, neither is taken")
    note(
        f"{OUT.value}: what is lost will be asked for again by the run"
        if lost or saved.left_out
        else OUT.value
    )
    return 0


def _out() -> pathlib.Path:
    out = pathlib.Path(OUT.value)
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out={out} is in a folder that does not exist; make it first")
    return out


def _log(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + "-wal")


def _query_ids(path: str) -> list[int]:
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--queries={path} cannot be read: {error}") from None
    for number, word in enumerate(lines, start=1):
        if not word.isdecimal():
            raise InputError(f"--queries={path}, entry {number}: {word!r} is not a query id")
    if not lines:
        raise InputError(f"--queries={path} names no query, so nothing would be kept")
    return list(map(int, lines))


_COMMANDS = {
    "info": _info,
    "verify": _verify,
    "merge": _merge,
    "filter": _filter,
    "split": _split,
    "salvage": _salvage,
}

if __name__ == "__main__":
    cli.run(main, takes_arguments=True)
