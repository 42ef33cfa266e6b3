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
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import cli
from experiments.output import check_out, write_out
from experiments.progress import note, stage
from experiments.store_cell import (
    BATCH,
    FINGERPRINT,
    fill,
    killed_open_seconds,
    open_seconds,
    records,
    write_rates,
)
from lever_jax.errors import InputError
from lever_jax.store import Store

_SIZES = flags.DEFINE_list("sizes", ["100000", "1000000", "5000000"], "Records of the files.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each measurement.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 80, "Batches written in a round.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", None, "Where the files are made; a temporary folder.")
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")


def main() -> None:
    """Measures, prints and writes."""
    check_out(_OUT.value)
    try:
        sizes = sorted({int(text) for text in _SIZES.value})
    except ValueError:
        raise InputError(f"--sizes={','.join(_SIZES.value)} must be whole numbers") from None
    if not sizes or sizes[0] <= BATCH:
        raise InputError(f"--sizes must be numbers above {BATCH}, as --sizes=100000,1000000")
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        document = _measure(pathlib.Path(folder), sizes)
    write_out(_OUT.value, document)


def _measure(folder: pathlib.Path, sizes: list[int]) -> dict:
    rounds, batches = range(_ROUNDS.value), _BATCHES.value
    stage(f"writes: batches of {BATCH} records, each committed durably")
    with Store.open(folder / "writes.sqlite", FINGERPRINT) as store:
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
            "after_a_kill_s": _summary([killed_open_seconds(path, 20 * i, 20) for i in rounds]),
        }
        for name in ("write_s", "read_s", "after_a_kill_s"):
            note(f"{size:,} records: {name} {found[name]['median']:.4f} s")
    with Store.open(path, FINGERPRINT) as store:
        large = [write_rates(store, 10**6 + i * batches, batches)[0] for i in rounds]
    _say(f"records a second, file of {sizes[-1]:,}", large, "{:,.0f}")
    return {
        "batch": BATCH,
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
