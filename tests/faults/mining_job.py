"""A mining job of its own process that starts fast: the real loop, store and bridge, no model.

    PYTHONPATH=.:tests python tests/faults/mining_job.py FOLDER QUERIES '{"log": "served", ...}'

It prints "mining" when it begins and "done" at the end; the same command resumes it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from progress import no_bar

from lever_jax.mining import MiningConfig, mine
from lever_jax.pooled import PooledQueries
from lever_jax.scoring import ScoringService
from lever_jax.store import Store
from lever_jax.types import SOURCES, Rollouts
from qwen_bridge.client import Environment

POOL, SHOTS, STAGE, BATCH = 8, 2, "mine", 8
CONFIG = MiningConfig(
    proposals=24, quotas={"sample": 20}, verify_best=5, verify_low=3, verify_uniform=2, batch=10
)


class HashedProposer:
    """Proposes pointers by chance, the same ones to a query in every process."""

    def __init__(self, query_ids):
        self._query_ids = query_ids

    def mixture(self, params, key, rows, *, shots, num, quotas, temperature, top_p):
        """Different pointers [n, num, S], as `Proposer.mixture`."""
        pointers = np.stack([self._pointers(self._query_ids[row], num) for row in rows])
        shape = pointers.shape[:2]
        sources = np.full(shape, SOURCES.index("sample(temp=1.0)"))
        return Rollouts(pointers, np.full(shape, -4.0, np.float32), sources, np.ones(shape, bool))

    @staticmethod
    def _pointers(query_id, num):
        pairs = [(a, b) for a in range(POOL) for b in range(POOL) if a != b]
        order = np.random.default_rng(int(query_id)).permutation(len(pairs))
        return np.array(pairs)[order[:num]]


class Batched:
    """The environment with small requests, as `ScoringService` calls it."""

    def __init__(self, environment):
        self._environment = environment

    def score(self, queries, pointers, on_batch=None):
        """See `Environment.score`."""
        return self._environment.score(queries, pointers, on_batch, batch_size=BATCH)

    def answer(self, queries, pointers, on_batch=None):
        """See `Environment.answer`."""
        return self._environment.answer(queries, pointers, on_batch, batch_size=BATCH)


def run(folder: Path, queries: int, settings: dict, **options) -> tuple[dict, dict]:
    """Mines, or goes on mining; returns the environment's and the store's counters."""
    query_ids = np.arange(1000, 1000 + queries)
    pools = np.random.default_rng(0).integers(0, 900, (queries, 1)) + np.arange(POOL) * 3
    pooled = PooledQueries(query_ids, pools, None, None, None)
    options = {"workers": 2, "threads": 1, "backoff_s": 0.01, **options}
    with (
        Environment(settings, factory="trivial_scorer:build", **options) as environment,
        Store.open(folder / "store.sqlite", {"model": "trivial"}) as store,
    ):
        print("mining", flush=True)
        service = ScoringService(store, Batched(environment), no_bar)
        proposer = HashedProposer(query_ids)
        mine(STAGE, pooled, proposer, None, None, service, CONFIG, shots=SHOTS)
        return environment.stats, store.counts()


def content(folder: Path) -> tuple[dict, list]:
    """What the store holds, without when it came: records by prompt, and the proposals."""
    with Store.open(folder / "store.sqlite", None, read_only=True) as store:
        assert store.verify() == []
        scores = {(r.query_id, r.pointer): r for r in store.iter_scores()}
        mined = store.get_proposals(STAGE, np.sort(store.proposed_queries(STAGE)))
    columns = (
        mined.query_ids.tolist(),
        mined.pointers.tolist(),
        mined.sources,
        mined.kept.tolist(),
    )
    return scores, list(zip(*columns))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
    print("done", flush=True)
