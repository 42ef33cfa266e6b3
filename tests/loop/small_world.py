"""A small world of the policy half: random embeddings, a store, and the fake VLM."""

import dataclasses

import jax
import numpy as np
from fake import FakeEnvironment
from progress import no_bar

from lever_jax.pooled import Embedded, PoolConfig, pool_queries
from lever_jax.proposing import Proposer
from lever_jax.scoring import ScoringService
from lever_jax.selector import SelectorConfig, make_selector
from lever_jax.store import Store

PARTS = {"image": (0, 6), "question": (6, 10), "answer": (10, 14)}


class World:
    """Queries with pools, a selector with `options` and a scoring service over a fake VLM."""

    def __init__(
        self, folder, environment=None, queries=12, bank=40, pool=8, name="store", **options
    ):
        rng = np.random.default_rng(0)
        self.bank = Embedded(
            np.arange(bank),
            tuple(f"b{i}" for i in range(bank)),
            rng.normal(size=(bank, 14)).astype(np.float32),
        )
        embeddings = rng.normal(size=(queries, 14)).astype(np.float32)
        embeddings[:, 10:] = 0
        ids = np.arange(queries) + 1000
        self.environment = environment or FakeEnvironment()
        self.store = Store.open(folder / f"{name}.sqlite", {"model": "fake"})
        self.service = ScoringService(self.store, self.environment, no_bar)
        examples = Embedded(ids, tuple(f"q{i}" for i in ids), embeddings)
        queries = pool_queries(examples, self.bank, PARTS, PoolConfig(size=pool), self.store)
        table = jax.tree.map(jax.numpy.asarray, queries.table)
        self.queries = dataclasses.replace(queries, table=table)
        self.init, self.policy = make_selector(SelectorConfig(width=16, **options), PARTS, 14)
        self.params = jax.jit(self.init)(jax.random.key(0))  # one compilation, not hundreds
        self.proposer = Proposer(self.policy, self.queries.table, batch=8)
