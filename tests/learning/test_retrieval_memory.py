"""Memory of the search for pools: a bank on disk, larger than the budget, is never held whole."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

QUERIES, ROWS, PARTS = 1000, 100_000, {"image": (0, 768), "question": (768, 1024)}
BUDGET_MIB = 96

# In a process of its own, as peak memory is a process's. A tiny search first, so that JAX and BLAS
# have what they hold whatever the size.
SEARCH = """
import re, sys
import numpy as np
from lever_jax.retrieval import build_pools
from lever_jax.similarity import column_mean

def peak():
    # Not ru_maxrss, which begins at what the process that started this one held.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

folder, parts = sys.argv[1], {parts}
bank = np.load(folder + "/bank.npy", mmap_mode="r")
queries = np.load(folder + "/queries.npy")
options = dict(
    parts=parts, weights={{"image": 1.0, "question": 0.5}}, near_duplicate=0.98,
    shares={{"image": 16, "random": 4}}, accelerator=False, memory={budget} * 2**20,
)

def pools(queries, bank, k, **more):
    return build_pools(
        queries, bank, pool_size=k, query_ids=-1 - np.arange(len(queries)),
        bank_ids=np.arange(len(bank)), mean=column_mean(bank), **{{**options, **more}},
    )

pools(queries[:10], np.array(bank[:200]), 4, shares={{}})
before = peak()
found = pools(queries, bank, 64)
print(peak() - before, found.excluded.near_duplicate, found.mask.all())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="peak memory is read from /proc"
)
def test_a_bank_on_disk_stays_on_disk(tmp_path):
    rng = np.random.default_rng()
    width = PARTS["question"][1]
    bank = np.lib.format.open_memmap(
        tmp_path / "bank.npy", mode="w+", dtype=np.float32, shape=(ROWS, width)
    )
    for first in range(0, ROWS, 10_000):
        bank[first : first + 10_000] = rng.standard_normal((10_000, width), dtype=np.float32)
    queries = rng.standard_normal((QUERIES, width), dtype=np.float32)
    copies = rng.permutation(ROWS)[:QUERIES]
    bank[copies, : PARTS["image"][1]] = queries[:, : PARTS["image"][1]]
    bank.flush()
    np.save(tmp_path / "queries.npy", queries)
    script = SEARCH.format(parts=PARTS, budget=BUDGET_MIB)
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    grown, near, full = run.stdout.split()
    assert bank.nbytes / 2**20 > 4 * BUDGET_MIB
    assert float(grown) < BUDGET_MIB
    assert int(near) == QUERIES
    assert full == "True"
