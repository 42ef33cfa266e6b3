"""Queries with their pools: the small table of the device, the flags that decide pools, errors."""

import dataclasses

import numpy as np
import pytest

from lever_jax.errors import InputError
from lever_jax.pooled import Embedded, PoolConfig, pool_queries
from lever_jax.retrieval import build_pools
from lever_jax.similarity import column_mean
from lever_jax.store import Store, StoreError

PARTS = {"image": (0, 6), "question": (6, 10), "answer": (10, 14)}
CONFIG = PoolConfig(size=5, question_weight=0.5, shares={"image": 2, "random": 1}, seed=4)


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store.sqlite", {"model": "fake"}) as store:
        yield store


def embedded(rng, count, first_id):
    return Embedded(
        rng.permutation(count) + first_id,
        tuple(f"p{i}" for i in rng.integers(0, 50, count)),
        (rng.normal(size=(count, 14)) + 2).astype(np.float32),
    )


def pools_of(queries, bank, config, **options):
    return build_pools(
        queries.embeddings,
        bank.embeddings,
        pool_size=config.size,
        parts=PARTS,
        weights=config.weights,
        query_ids=queries.ids,
        bank_ids=bank.ids,
        query_images=queries.images,
        bank_images=bank.images,
        mean=column_mean(bank.embeddings),
        shares=config.shares,
        near_duplicate=config.near_duplicate,
        seed=config.seed,
        **options,
    )


def test_the_table_reads_as_the_whole_bank_would(store):
    rng = np.random.default_rng()
    queries, bank = embedded(rng, 7, 1000), embedded(rng, 300, 0)
    pooled = pool_queries(queries, bank, PARTS, CONFIG, store)
    expected = pools_of(queries, bank, CONFIG)
    assert pooled.excluded == expected.excluded
    assert len(pooled.table.bank) == len(np.unique(expected.rows)) <= 35
    rows = rng.permutation(7)[:4]
    read_queries, read = pooled.table.read(rows)
    np.testing.assert_array_equal(read_queries, queries.embeddings[rows])
    np.testing.assert_array_equal(read.embeddings, bank.embeddings[expected.rows[rows]])
    assert np.array(read.mask).all()
    np.testing.assert_array_equal(pooled.pool_ids, bank.ids[expected.rows])
    np.testing.assert_array_equal(store.get_pools(queries.ids)[0], pooled.pool_ids)


def test_the_mean_is_of_the_whole_bank():
    rng = np.random.default_rng()
    bank = embedded(rng, 300, 0)
    np.testing.assert_allclose(bank.mean, bank.embeddings.astype(np.float64).mean(axis=0), 1e-6)
    assert bank.mean.dtype == np.float32


def test_other_pools_name_the_flags_that_decide_them(store):
    rng = np.random.default_rng()
    queries, bank = embedded(rng, 7, 1000), embedded(rng, 300, 0)
    pool_queries(queries, bank, PARTS, CONFIG, store)
    same = dataclasses.replace(CONFIG, memory_mib=1)
    pool_queries(queries, bank, PARTS, same, store)
    for change in ({"seed": 5}, {"shares": {}}, {"question_weight": 9.0}, {"size": 6}):
        with pytest.raises(StoreError, match=r"--pool_shares.*--near_duplicate.*--world_seed"):
            pool_queries(queries, bank, PARTS, dataclasses.replace(CONFIG, **change), store)


def test_bad_config():
    with pytest.raises(InputError, match="--pool_shares add up to 6, more than --pool_size=5"):
        PoolConfig(size=5, shares={"image": 6})
    with pytest.raises(InputError, match="'sound' is no source"):
        PoolConfig(size=5, shares={"sound": 1})
