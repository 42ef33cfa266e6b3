"""Queries with their candidate pools: where actions and demonstration ids meet.

Mining, training and evaluation get a query's pool here, and here only. Actions are positions in
the pool and live in arrays that JAX sees; demonstration ids are the dataset's and go to the VLM,
to the store and to files. The two are never mixed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lever_jax.errors import InputError
from lever_jax.parallel import replicated
from lever_jax.retrieval import Excluded, Pools, build_pools, pool_quotas
from lever_jax.similarity import column_mean
from lever_jax.store import Store
from lever_jax.training import PoolTable


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How pools are made.

    Attributes:
      size: K, candidates a query.
      image_weight: weight of the image part's cosine, >= 0.
      question_weight: weight of the question part's cosine, >= 0.
      shares: places by source, `image`, `question`, `both` or `random`; the rest is `both`.
      near_duplicate: a demonstration whose image part has a cosine above this with the query's
        is left out, in [0, 1]; 1 is off.
      seed: of the random places.
      memory_mib: what the search may hold beside the embeddings, MiB; decides no pool.

    Raises:
      InputError: shares of a source that does not exist, or more than K.
    """

    size: int = 32
    image_weight: float = 1.0
    question_weight: float = 1.0
    shares: Mapping[str, int] = dataclasses.field(default_factory=dict)
    near_duplicate: float = 1.0
    seed: int = 0
    memory_mib: int = 512

    def __post_init__(self):
        pool_quotas(self.size, self.shares)

    def recipe(self) -> dict[str, Any]:
        """What decides the pools: all fields, but for the memory always at its default."""
        return dataclasses.asdict(dataclasses.replace(self, memory_mib=PoolConfig.memory_mib))

    @property
    def weights(self) -> dict[str, float]:
        """Weights by part, as retrieval takes them."""
        return {"image": self.image_weight, "question": self.question_weight}


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Embeddings of a set of examples.

    Attributes:
      ids: int64 [N] the dataset's ids.
      images: N image keys.
      embeddings: float32 [N, D], an array or what is indexed like one (`qwen_bridge.gathered`).
    """

    ids: np.ndarray
    images: tuple[str, ...]
    embeddings: np.ndarray

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """Mean embedding, float32 [D]; read once however many searches share it."""
        return column_mean(self.embeddings)


@dataclasses.dataclass(frozen=True)
class PooledQueries:
    """Queries and their pools.

    Attributes:
      query_ids: int64 [Q].
      pool_ids: int64 [Q, K] demonstration id of each action, -1 where masked.
      table: the same as arrays, with the demonstrations that some pool holds and no other; on the
        host as `pool_queries` makes it, on all devices after `placed`.
      mean: float32 [D] mean of the whole bank, which similarity subtracts.
      excluded: how many demonstrations the pools had to leave out.
    """

    query_ids: np.ndarray
    pool_ids: np.ndarray
    table: PoolTable
    mean: np.ndarray
    excluded: Excluded

    def __len__(self) -> int:
        return len(self.query_ids)

    def demo_ids(self, rows: np.ndarray, pointers: np.ndarray) -> np.ndarray:
        """Demonstration ids int64 [..., S] of pointers [..., S] of the queries rows [...]."""
        picked = self.pool_ids[np.asarray(rows)[..., None], np.maximum(pointers, 0)]
        return np.where(pointers >= 0, picked, -1)


def pool_queries(
    queries: Embedded,
    bank: Embedded,
    parts: dict,
    config: PoolConfig,
    store: Store,
    bar: Callable | None = None,
) -> PooledQueries:
    """Builds the pools of `queries` and stores them.

    They are built anew each time, which is exact and cheap beside one forward pass of a VLM. The
    store keeps the first and holds every later one against it, so that mining, training and
    evaluation cannot work on different pools unnoticed.

    Args:
      queries: the queries.
      bank: all demonstrations.
      parts: column ranges of the embeddings' parts.
      config: how pools are made.
      store: where they are kept.
      bar: `bar(label, total)`, a context manager that yields `advance(count)`; or None.

    Raises:
      InputError: pools that cannot be filled.
      StoreError: the store has another pool for one of the queries.
    """
    pools = make_pools(queries, bank, parts, config, bar)
    pool_ids = np.where(pools.mask, bank.ids[pools.rows], -1)
    store.put_pools(queries.ids, pool_ids, pools.similarity)
    # A bank of VQAv2 is 11 GB; what the pools of a run use of it is a small part.
    used, rows = np.unique(pools.rows, return_inverse=True)
    table = PoolTable(
        queries=np.asarray(queries.embeddings),
        bank=np.asarray(bank.embeddings[used]),
        rows=rows.reshape(pools.rows.shape).astype(np.int32),
        mask=np.asarray(pools.mask),
        query_ids=(queries.ids % (1 << 32)).astype(np.uint32),
    )
    return PooledQueries(queries.ids, pool_ids, table, bank.mean, pools.excluded)


def placed(queries: PooledQueries, mesh: jax.sharding.Mesh | None) -> PooledQueries:
    """The same with its table on the devices, once: whoever replicates it again copies nothing."""
    return dataclasses.replace(queries, table=replicated(mesh, queries.table))


def make_pools(
    queries: Embedded,
    bank: Embedded,
    parts: dict,
    config: PoolConfig,
    bar: Callable | None = None,
) -> Pools:
    """Pools of `queries` as a run makes them; arguments as for `pool_queries`."""
    if config.near_duplicate < 1 and "image" not in parts:
        raise InputError(f"--near_duplicate={config.near_duplicate} needs embeddings of images")
    return build_pools(
        queries.embeddings,
        bank.embeddings,
        pool_size=config.size,
        parts=parts,
        weights=config.weights,
        query_ids=queries.ids,
        bank_ids=bank.ids,
        query_images=queries.images,
        bank_images=bank.images,
        mean=bank.mean,
        shares=config.shares,
        near_duplicate=config.near_duplicate,
        seed=config.seed,
        memory=config.memory_mib * 2**20,
        bar=bar,
    )
