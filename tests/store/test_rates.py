"""How fast the store takes records and opens; what `experiments.benchmark_store` prints."""

import json
import subprocess
import sys
import time

import pytest

from experiments import store_cell as benchmark
from lever_jax.store import Store


def test_records_a_second_of_the_processor(tmp_path):
    """20,000 durable records a second; in processor time, which a busy machine cannot stretch."""
    with Store.open(tmp_path / "store", {"model": "benchmark"}) as store:
        best = 0.0
        for i in range(3):
            prepared = [benchmark.records(40 * i + j) for j in range(40)]
            start = time.process_time()
            for batch in prepared:
                store.put_scores(batch)
            best = max(best, 40 * 256 / (time.process_time() - start))
        print(f"{best:,.0f} records a processor second")
        assert best > 20_000
        assert store.counts()["scores"] == 3 * 40 * 256


def pages_read(path, read_only):
    """Bytes that opening a file reads of it and of its log, by the kernel's count."""
    script = f"""
import pathlib
from experiments.store_cell import open_seconds
before = int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])
open_seconds(pathlib.Path({str(path)!r}), {read_only})
print(int(open("/proc/self/io").read().split("rchar: ")[1].split()[0]) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_opening_reads_no_more_of_a_large_file(tmp_path):
    sizes = {}
    for count in (5_000, 200_000):
        path = tmp_path / str(count)
        benchmark.fill(path, count)
        sizes[count] = path.stat().st_size
        assert benchmark.open_seconds(path, read_only=False) < 1
        assert benchmark.killed_open_seconds(path) < 1
        with Store.open(path, read_only=True) as store:
            assert store.counts()["scores"] == count + 20 * 256
    assert sizes[200_000] > 15_000_000
    small, large = (pages_read(tmp_path / str(count), False) for count in (5_000, 200_000))
    print(f"{small:,} and {large:,} bytes read")
    assert large < small + 100_000


def test_each_killed_driver_leaves_new_records_and_a_new_job(tmp_path):
    path = tmp_path / "store"
    benchmark.fill(path, 1000)
    for i in range(3):
        benchmark.killed_open_seconds(path, first=5 * i, batches=5)
        with Store.open(path, read_only=True) as store:
            counts = store.counts()
            assert counts["scores"] == 1000 + (i + 1) * 5 * 256
            assert counts["duplicate_scores"] == 0
            jobs = [(row[2], row[3], row[4]) for row in store.read_rows("jobs")]
            assert jobs == [("todo", 1, 256)] * (i + 1)


@pytest.mark.slow
def test_the_benchmark_writes_what_it_found(tmp_path):
    out = tmp_path / "store.json"
    arguments = ["--sizes=10000,50000", "--rounds=2", "--batches=5", f"--out={out}"]
    command = [sys.executable, "-m", "experiments.benchmark_store", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert set(found["open"]) == {"10000", "50000"}
    assert found["records_per_cpu_s"]["median"] > 0
