"""Queries with their candidate pools: where actions and demonstration ids meet.

Mining, training and evaluation get a query's pool here, and here only. Actions are positions in
the pool and live in arrays that JAX sees; demonstration ids are the dataset's and go to the VLM,
to the store and to files. The two are never mixed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lever_jax.retrieval import build_pools
from lever_jax.store import Store
from lever_jax.training import PoolTable


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How pools are made.

    Attributes:
      size: K, candidates a query.
      image_weight: weight of the image part's cosine, >= 0.
      question_weight: weight of the question part's cosine, >= 0.
      random_share: share of the pool drawn at random from the bank, in [0, 1].
      seed: of that share.
    """

    size: int = 32
    image_weight: float = 1.0
    question_weight: float = 1.0
    random_share: float = 0.0
    seed: int = 0

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
    def on_device(self) -> jax.Array:
        """The embeddings on the device, put there once however many tables share them."""
        return jnp.asarray(self.embeddings)


@dataclasses.dataclass(frozen=True)
class PooledQueries:
    """Queries and their pools.

    Attributes:
      query_ids: int64 [Q].
      pool_ids: int64 [Q, K] demonstration id of each action, -1 where masked.
      table: the same for the device.
      mean: float32 [D] mean of the bank, which similarity subtracts.
    """

    query_ids: np.ndarray
    pool_ids: np.ndarray
    table: PoolTable
    mean: np.ndarray

    def __len__(self) -> int:
        return len(self.query_ids)

    def demo_ids(self, rows: np.ndarray, pointers: np.ndarray) -> np.ndarray:
        """Demonstration ids int64 [..., S] of pointers [..., S] of the queries rows [...]."""
        picked = self.pool_ids[np.asarray(rows)[..., None], np.maximum(pointers, 0)]
        return np.where(pointers >= 0, picked, -1)


def pool_queries(
    queries: Embedded, bank: Embedded, parts: dict, config: PoolConfig, store: Store
) -> PooledQueries:
    """Builds the pools of `queries`, or reads them where the store has them already.

    A stored pool that differs from the one that the settings give is an error of the store.
    """
    pools = build_pools(
        queries.embeddings,
        bank.embeddings,
        pool_size=config.size,
        parts=parts,
        weights=config.weights,
        query_ids=queries.ids,
        bank_ids=bank.ids,
        query_images=queries.images,
        bank_images=bank.images,
        center=True,
        random_share=config.random_share,
        seed=config.seed,
    )
    pool_ids = np.where(pools.mask, bank.ids[pools.rows], -1)
    store.put_pools(queries.ids, pool_ids, pools.similarity)
    table = PoolTable(
        queries=queries.on_device,
        bank=bank.on_device,
        rows=jnp.asarray(pools.rows),
        mask=jnp.asarray(pools.mask),
        query_ids=jnp.asarray((queries.ids % (1 << 32)).astype(np.uint32)),
    )
    mean = bank.embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    return PooledQueries(queries.ids, pool_ids, table, mean)
