"""What `experiments.benchmark_store` measures: batches written, files filled, files opened."""

import multiprocessing
import os
import pathlib
import signal
import sqlite3
import time

import numpy as np

from lever_jax.ledger import Ledger
from lever_jax.store import ScoreRecord, Store

BATCH = 256
FINGERPRINT = {"model": "benchmark"}
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
    for i in range(BATCH):
        pointer = (i % _A_QUERY, int(rng.integers(1000, 2000)))
        record = ScoreRecord(batch * BATCH // _A_QUERY + i // _A_QUERY, pointer)
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
    count = batches * BATCH
    return count / (time.perf_counter() - start), count / (time.process_time() - busy)


def fill(path: pathlib.Path, count: int) -> None:
    """Makes a file of `count` records, the first batch of them true ones."""
    with Store.open(path, FINGERPRINT) as store:
        store.put_scores(records(0))
        store.add_counts({"scores": count - BATCH})
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = OFF")
    db.execute("PRAGMA synchronous = OFF")
    db.execute(_FILL, (count - BATCH,))
    db.execute("PRAGMA journal_mode = WAL")
    db.close()


def open_seconds(path: pathlib.Path, read_only: bool) -> float:
    """Seconds to open the file, with none of it in the page cache, and to ask for its counts."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    with Store.open(path, FINGERPRINT, read_only=read_only) as store:
        if not read_only:
            Ledger(store)
        store.counts()
        return time.perf_counter() - start


def killed_open_seconds(path: pathlib.Path, first: int = 0, batches: int = 20) -> float:
    """Seconds until a driver goes on after one that was killed with a log and a job in hand.

    Args:
      path: a file of `fill`.
      first: of the batches that the driver writes; give another range each time, so that each log
        holds new records and each job is in hand for the first time.
      batches: how many of them.
    """
    spawn = multiprocessing.get_context("spawn")
    child = spawn.Process(target=_write_and_die, args=(path, first, batches))
    child.start()
    child.join()
    if child.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the driver ended with {child.exitcode} before it was killed")
    return open_seconds(path, read_only=False)


def _write_and_die(path: pathlib.Path, first: int, batches: int) -> None:
    store = Store.open(path, FINGERPRINT)
    asked = first * BATCH + np.arange(BATCH)
    for lease in Ledger(store).leases("score", asked, np.zeros((BATCH, 2))):
        lease.__enter__()
    for i in range(batches):
        store.put_scores(records(10**5 + first + i))
    os.kill(os.getpid(), signal.SIGKILL)
