"""Times the exact search for pools against faiss's flat index and plain NumPy, side by side.

    python -m experiments.benchmark_retrieval --rows=443757 --dim=768 --queries=1000 --k=64 \\
        --rounds=5 --out=benchmarks/retrieval.json

All competitors work on the same vectors with the same number of threads. They take turns within a
round and start in another order each round, so that a busy machine slows all of them; what is
reported is the median of the rounds' ratios. Before anything is timed, their answers are compared.
NumPy, faiss and `ours` compute on the CPU; where JAX has an accelerator, `ours_gpu` is our search
with its products there, a competitor of its own.

The vectors are like embeddings in that they cluster: a random unit centre plus noise of the same
length, `--clusters` of them, so that a query's nearest are within its cluster (cosine about 0.5).
"""

import functools
import os
import platform
import resource
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from threadpoolctl import threadpool_limits

from experiments import cli
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE, note
from experiments.side_by_side import timed_by
from lever_jax.errors import InputError
from lever_jax.products import Pairs
from lever_jax.topk import Search

try:
    import faiss
except ImportError:
    faiss = None

_ROWS = flags.DEFINE_integer("rows", 443_757, "Demonstrations; VQAv2's.", lower_bound=1)
_DIM = flags.DEFINE_integer("dim", 768, "Width of a vector.", lower_bound=1)
_QUERIES = flags.DEFINE_integer("queries", 1000, "Queries.", lower_bound=1)
_K = flags.DEFINE_integer("k", 64, "Nearest rows wanted.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; each times all competitors.", lower_bound=1)
_CLUSTERS = flags.DEFINE_integer("clusters", 1000, "Clusters of the vectors.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the vectors.", lower_bound=0)
_THREADS = flags.DEFINE_integer("threads", 0, "CPU threads; 0 is one a core.", lower_bound=0)
_MIB = flags.DEFINE_integer("retrieval_mib", 512, "Memory of our search, MiB.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")
_ON_GPU = "ours_gpu"


def vectors(rng: np.random.Generator, count: int, centres: np.ndarray) -> np.ndarray:
    """Unit vectors float32 [count, D] around random ones of the centres [C, D]."""
    out = np.empty((count, centres.shape[1]), np.float32)
    for first in range(0, count, 8192):
        some = out[first : first + 8192]
        rng.standard_normal(out=some, dtype=np.float32)
        some /= np.float32(np.sqrt(some.shape[1]))
        some += centres[rng.integers(0, len(centres), len(some))]
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    return out


def our_searches(
    queries: np.ndarray, bank: np.ndarray, k: int, *, memory: int
) -> dict[str, Callable[[], np.ndarray]]:
    """Our search on the CPU, and with its products on the accelerator where JAX has one.

    Returns:
      By name, what gives the rows [B, k], most similar first.
    """
    whole, weights = {"whole": (0, bank.shape[1])}, {"whole": 1.0}

    def on(accelerator: bool) -> np.ndarray:
        search = Search(queries, bank, whole, weights, memory=memory, accelerator=accelerator)
        return search.top_k(k, Pairs.none())[0]

    searches = {"ours": functools.partial(on, False)}
    if jax.default_backend() != "cpu":
        searches[_ON_GPU] = functools.partial(on, True)
    return searches


def plain_numpy(queries: np.ndarray, bank: np.ndarray, k: int) -> np.ndarray:
    """Rows [B, k] of the largest products, in no order: what one would write at once."""
    rows = []
    for first in range(0, len(queries), 100):
        scores = queries[first : first + 100] @ bank.T
        rows.append(np.argpartition(scores, len(bank) - k, axis=1)[:, len(bank) - k :])
    return np.concatenate(rows)


def compare(ours: np.ndarray, theirs: np.ndarray, queries: np.ndarray, bank: np.ndarray) -> dict:
    """How far two answers [B, k] agree: as sets, and where those differ, by value in float64.

    Raises:
      InputError: the values differ by more than float32 products can.
    """
    apart, worst = 0, 0.0
    for query, a, b in zip(queries, ours, theirs):
        if set(a) == set(b):
            continue
        apart += 1
        ranked = [np.sort(bank[rows].astype(np.float64) @ query) for rows in (a, b)]
        worst = max(worst, float(np.abs(ranked[0] - ranked[1]).max()))
    if worst > 1e-6:
        raise InputError(f"the answers differ by {worst:.1e}, which rounding cannot explain")
    return {"queries_with_equal_sets": len(ours) - apart, "worst_difference_by_value": worst}


def main() -> None:
    """Compares, times, prints and writes."""
    check_out(_OUT.value)
    if _K.value > _ROWS.value:
        raise InputError(f"--k={_K.value} exceeds --rows={_ROWS.value}; lower it")
    threads = _THREADS.value or os.cpu_count()
    rng = np.random.default_rng(_SEED.value)
    centres = rng.standard_normal((_CLUSTERS.value, _DIM.value), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    bank, queries = (vectors(rng, n, centres) for n in (_ROWS.value, _QUERIES.value))

    competitors = {
        **our_searches(queries, bank, _K.value, memory=_MIB.value * 2**20),
        "numpy": lambda: plain_numpy(queries, bank, _K.value),
    }
    built = None
    if faiss is None:
        note("faiss is not installed (pip install 'lever[benchmark]'); compared with NumPy only")
    else:
        faiss.omp_set_num_threads(threads)
        start = time.perf_counter()
        index = faiss.IndexFlatIP(_DIM.value)
        index.add(bank)
        built = time.perf_counter() - start
        competitors["faiss"] = lambda: index.search(queries, _K.value)[1]
    with threadpool_limits(threads):
        found = {name: run() for name, run in competitors.items()}  # warms up as well
        agreement = {
            name: compare(found["ours"], rows, queries, bank)
            for name, rows in found.items()
            if name != "ours"
        }
        for name, result in agreement.items():
            note(
                f"{result['queries_with_equal_sets']:,} of {len(queries):,} sets equal {name}'s, "
                f"others by value within {result['worst_difference_by_value']:.0e}"
            )
        clocks = (time.perf_counter, time.process_time)  # of the wall, and of all threads
        seconds, cpu_seconds = timed_by(clocks, competitors, _ROUNDS.value, "time the competitors")
    cpu_seconds.pop(_ON_GPU, None)  # They leave out what the GPU did.
    ratios = {name: seconds["ours"] / seconds[name] for name in competitors if name != "ours"}
    for name, values in seconds.items():
        cpu = f", {np.median(cpu_seconds[name]):7.2f} s of CPU" if name in cpu_seconds else ""
        CONSOLE.print(f"  {name:8} median {np.median(values):7.2f} s{cpu}")
    for name, values in ratios.items():
        CONSOLE.print(
            f"  ours / {name}: median {np.median(values):.2f} "
            f"(min {values.min():.2f}, max {values.max():.2f} of {len(values)} rounds)"
        )
    document = {
        "settings": {
            "rows": _ROWS.value,
            "dim": _DIM.value,
            "queries": _QUERIES.value,
            "k": _K.value,
            "clusters": _CLUSTERS.value,
            "seed": _SEED.value,
            "retrieval_mib": _MIB.value,
            "threads": threads,
        },
        "data": "unit vectors: random unit centre + Gaussian noise of expected length 1",
        "agreement": agreement,
        "seconds": {name: values.tolist() for name, values in seconds.items()},
        "cpu_seconds": {name: values.tolist() for name, values in cpu_seconds.items()},
        "faiss_index_built_s": built,
        "ratio_ours_to": {
            name: {
                "median": float(np.median(values)),
                "min": float(values.min()),
                "max": float(values.max()),
            }
            for name, values in ratios.items()
        },
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "load_average_at_end": os.getloadavg(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores, JAX on {jax.default_backend()}",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "jax": jax.__version__,
            "faiss": None if faiss is None else faiss.__version__,
        },
    }
    write_out(_OUT.value, document)


if __name__ == "__main__":
    cli.run(main)
