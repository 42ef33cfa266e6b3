"""The benchmark of retrieval names what ran where: a figure never mixes two devices."""

import json
import subprocess
import sys

import pytest
from main_job import ROOT

SMALL = "--rows=300 --dim=8 --queries=5 --k=3 --rounds=2 --clusters=4 --threads=1".split()
ON_GPU = "import jax; jax.default_backend = lambda: 'gpu'; "  # its products still run on the CPU


@pytest.mark.parametrize(("patch", "gpu"), [("", set()), (ON_GPU, {"ours_gpu"})])
def test_a_gpu_is_a_competitor_of_its_own(tmp_path, patch, gpu):
    out = tmp_path / "retrieval.json"
    code = f"{patch}from experiments import benchmark_retrieval, cli; cli.run("
    done = subprocess.run(
        [sys.executable, "-c", f"{code}benchmark_retrieval.main)", *SMALL, f"--out={out}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    on_cpu = {"ours", "numpy"} | ({"faiss"} if document["versions"]["faiss"] else set())
    assert set(document["seconds"]) == on_cpu | gpu
    assert set(document["cpu_seconds"]) == on_cpu
    assert set(document["ratio_ours_to"]) == set(document["agreement"]) == (on_cpu | gpu) - {"ours"}
    assert ("ours / ours_gpu: median" in done.stdout) == bool(gpu)


WHERE = """
import jax
import numpy as np
from experiments.benchmark_retrieval import our_searches
from lever_jax import topk

made = []
for name in ("HostProducts", "DeviceProducts"):
    products = getattr(topk, name)
    setattr(topk, name, lambda *args, of=products: made.append(of.__name__) or of(*args))
jax.default_backend = lambda: "gpu"
vectors = np.eye(6, dtype=np.float32)
searches = our_searches(vectors[:2], vectors, 1, memory=1 << 20)
print([searches[name]().tolist() for name in ("ours", "ours_gpu")], made)
"""


def test_ours_stays_on_the_cpu_where_jax_has_a_gpu():
    """In a process of its own: the benchmark's flags have names that a run's have, too."""
    done = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [[[0], [1]], [[0], [1]]]
    assert done.stdout.strip() == f"{found} ['HostProducts', 'DeviceProducts']"
