"""How fast the store takes records, and how long it takes to open however much is in it.

    python -m experiments.benchmark_store --out=benchmarks/store.json

Writes: batches of 256 records, each committed durably (synced) by one process, as the scoring
service commits them; the last round is written into the largest file. Opening: files of
`--sizes` records, filled by SQL with rows that have no valid checksum, since opening reads none
of them, after a first batch of true records, which is read back. A file is opened with its pages
evicted from the page cache, for writing and for reading, and once as a killed writer left it.
"""

import os
import pathlib
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import cli
from experiments.output import check_out, write_out
from experiments.progress import note, stage
from lever_jax.errors import InputError
from lever_jax.ledger import Ledger
from lever_jax.store import ScoreRecord, Store

_SIZES = flags.DEFINE_list("sizes", ["100000", "1000000", "5000000"], "Records of the files.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each measurement.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 80, "Batches written in a round.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", None, "Where the files are made; a temporary folder.")
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")
_BATCH = 256
_FINGERPRINT = {"model": "benchmark"}
_A_QUERY = 64

# Rows as large as true ones: 4 answers, some certified.
_FILL = f"""
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ? - 1)
INSERT INTO scores
SELECT 1000000 + i / {_A_QUERY}, randomblob(16), 0.3 + i, randomblob(28),
  CASE WHEN i % 3 THEN NULL ELSE 'sept' END, 0.7 + i, NULL, randomblob(8) FROM n"""


def records(batch: int) -> list[ScoreRecord]:
    """A batch as stage A gives it: four queries, a third of the answers certified."""
    rng = np.random.default_rng(batch)
    found = []
    for i in range(_BATCH):
        pointer = (i % _A_QUERY, int(rng.integers(1000, 2000)))
        record = ScoreRecord(batch * _BATCH // _A_QUERY + i // _A_QUERY, pointer)
        record.gt_prob, record.margin = float(rng.random()), float(rng.normal())
        record.answer_log_probs = rng.normal(size=4).astype(np.float32)
        if i % 3 == 0:
            record.certified = record.prediction = "sept"
            record.accuracy = record.accuracy_official = 1.0
            record.confidence, record.similarity, record.how = 0.5, 1.0, "verified"
        found.append(record)
    return found


def write_rates(store: Store, first: int, batches: int) -> tuple[float, float]:
    """Records a second, and a second of the processor, over batches committed one by one."""
    prepared = [records(first + i) for i in range(batches)]
    start, busy = time.perf_counter(), time.process_time()
    for batch in prepared:
        store.put_scores(batch)
    count = batches * _BATCH
    return count / (time.perf_counter() - start), count / (time.process_time() - busy)


def fill(path: pathlib.Path, count: int) -> None:
    """Makes a file of `count` records, the first batch of them true ones."""
    with Store.open(path, _FINGERPRINT) as store:
        store.put_scores(records(0))
        store.add_counts({"scores": count - _BATCH})
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = OFF")
    db.execute("PRAGMA synchronous = OFF")
    db.execute(_FILL, (count - _BATCH,))
    db.execute("PRAGMA journal_mode = WAL")
    db.close()


def open_seconds(path: pathlib.Path, read_only: bool) -> float:
    """Seconds to open the file, with none of it in the page cache, and to ask for its counts."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    with Store.open(path, _FINGERPRINT, read_only=read_only) as store:
        if not read_only:
            Ledger(store)
        store.counts()
        return time.perf_counter() - start


def killed_open_seconds(path: pathlib.Path, batches: int = 20) -> float:
    """Seconds until a driver goes on after one that was killed with a log and a job in hand."""
    child = os.fork()
    if not child:
        store = Store.open(path, _FINGERPRINT)
        for lease in Ledger(store).leases("score", np.arange(_BATCH), np.zeros((_BATCH, 2))):
            lease.__enter__()
        for i in range(batches):
            store.put_scores(records(10**5 + i))
        os._exit(0)
    os.waitpid(child, 0)
    return open_seconds(path, read_only=False)


def main() -> None:
    """Measures, prints and writes."""
    check_out(_OUT.value)
    try:
        sizes = sorted({int(text) for text in _SIZES.value})
    except ValueError:
        raise InputError(f"--sizes={','.join(_SIZES.value)} must be whole numbers") from None
    if not sizes or sizes[0] <= _BATCH:
        raise InputError(f"--sizes must be numbers above {_BATCH}, as --sizes=100000,1000000")
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        document = _measure(pathlib.Path(folder), sizes)
    write_out(_OUT.value, document)


def _measure(folder: pathlib.Path, sizes: list[int]) -> dict:
    rounds, batches = range(_ROUNDS.value), _BATCHES.value
    stage(f"writes: batches of {_BATCH} records, each committed durably")
    with Store.open(folder / "writes.sqlite", _FINGERPRINT) as store:
        rates = [write_rates(store, i * batches, batches) for i in rounds]
    rates, busy = zip(*rates, strict=True)
    _say("records a second, new file", rates, "{:,.0f}")
    _say("records a second of the processor", busy, "{:,.0f}")
    stage("opening")
    opened = {}
    for size in sizes:
        path = folder / f"{size}.sqlite"
        fill(path, size)
        with Store.open(path, read_only=True) as store:
            if list(store.iter_scores(range(4))) != sorted(
                records(0), key=lambda r: (r.query_id, np.asarray(r.pointer, "<i8").tobytes())
            ):
                raise RuntimeError("the records that were written are not those that are read")
        opened[str(size)] = found = {
            "bytes": path.stat().st_size,
            "write_s": _summary([open_seconds(path, False) for _ in rounds]),
            "read_s": _summary([open_seconds(path, True) for _ in rounds]),
            "after_a_kill_s": _summary([killed_open_seconds(path) for _ in rounds]),
        }
        for name in ("write_s", "read_s", "after_a_kill_s"):
            note(f"{size:,} records: {name} {found[name]['median']:.4f} s")
    with Store.open(path, _FINGERPRINT) as store:
        large = [write_rates(store, 10**6 + i * batches, batches)[0] for i in rounds]
    _say(f"records a second, file of {sizes[-1]:,}", large, "{:,.0f}")
    return {
        "batch": _BATCH,
        "records_per_s": _summary(rates),
        "records_per_cpu_s": _summary(busy),
        "records_per_s_in_the_largest": _summary(large),
        "open": opened,
        "load_average_at_end": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "numpy": np.__version__,
        },
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _say(what: str, values: Sequence[float], form: str) -> None:
    found = {name: form.format(value) for name, value in _summary(values).items()}
    note(f"{what}: {found['median']} ({found['min']} to {found['max']})")


if __name__ == "__main__":
    cli.run(main)
