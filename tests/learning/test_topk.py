"""The blocked search against brute force: budgets, ties, odd rows, files, NumPy and JAX."""

import numpy as np
import pytest

from lever_jax import topk
from lever_jax.products import Pairs
from lever_jax.similarity import exact_similarity, similarity_features
from lever_jax.topk import Search

PARTS = {"image": (0, 7), "question": (9, 21)}
WEIGHTS = {"image": 1.0, "question": 0.4}
ways = pytest.mark.parametrize("accelerator", [False, True])


def clustered(rng, count, clusters=6, spread=0.3):
    centres = rng.normal(size=(clusters, 24)) * 3
    rows = centres[rng.integers(0, clusters, count)] + spread * rng.normal(size=(count, 24))
    return (rows + 5.0).astype(np.float32)


def brute(queries, bank, mean, k, excluded):
    """Order by the definition itself: every exact similarity, a stable sort."""
    left = similarity_features(queries, PARTS, WEIGHTS, mean)
    right = similarity_features(bank, PARTS, WEIGHTS, mean)
    exact = np.array([exact_similarity(q[None], right) for q in left])
    exact[excluded.queries, excluded.rows] = -np.inf
    rows = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(exact, rows, axis=1)


def some_pairs(rng, num_queries, num_rows, count):
    return Pairs.of(
        rng.integers(0, num_queries, count), rng.integers(0, num_rows, count), num_queries
    )


@ways
@pytest.mark.parametrize("memory", [1, 20_000, 400_000, 2**29])
@pytest.mark.parametrize("k", [1, 9])
def test_top_k_bit_equal_to_brute_force(accelerator, memory, k):
    rng = np.random.default_rng()
    queries, bank = clustered(rng, 13), clustered(rng, 700 if memory > 1 else 40)
    mean = bank.mean(axis=0)
    excluded = some_pairs(rng, 13, len(bank), 60)
    search = Search(queries, bank, PARTS, WEIGHTS, mean, memory=memory, accelerator=accelerator)
    for got, expected in zip(search.top_k(k, excluded), brute(queries, bank, mean, k, excluded)):
        np.testing.assert_array_equal(got, expected)


@ways
@pytest.mark.parametrize("distinct", [1, 3])
def test_ties_fall_to_the_lower_row_and_stay_bounded(accelerator, distinct):
    """As with one question asked of thousands of images: far more equals than places."""
    rng = np.random.default_rng()
    bank = np.tile(clustered(rng, distinct), (900 // distinct, 1))
    queries = clustered(rng, 4)
    excluded = some_pairs(rng, 4, 900, 400)
    search = Search(queries, bank, PARTS, WEIGHTS, memory=50_000, accelerator=accelerator)
    for got, expected in zip(search.top_k(5, excluded), brute(queries, bank, None, 5, excluded)):
        np.testing.assert_array_equal(got, expected)


@ways
@pytest.mark.parametrize("memory", [50_000, 2**29])
def test_near_ties_that_float32_cannot_tell(accelerator, memory):
    rng = np.random.default_rng()
    one = clustered(rng, 1)
    bank = (one * (1 + 1e-6 * rng.normal(size=(900, 24)))).astype(np.float32)
    queries = clustered(rng, 4)
    search = Search(queries, bank, PARTS, WEIGHTS, memory=memory, accelerator=accelerator)
    expected = brute(queries, bank, None, 5, Pairs.none())
    for got, wanted in zip(search.top_k(5, Pairs.none()), expected):
        np.testing.assert_array_equal(got, wanted)


@ways
@pytest.mark.parametrize("rising", [False, True])
def test_a_sorted_bank(accelerator, rising):
    """Every row beats all before it, or none does."""
    rng = np.random.default_rng()
    query = clustered(rng, 1)
    noise = np.linspace(1, 0, 800)[:, None] if rising else np.linspace(0, 1, 800)[:, None]
    bank = (query + noise * rng.normal(size=(1, 24)) * 4).astype(np.float32)
    search = Search(query, bank, PARTS, WEIGHTS, memory=40_000, accelerator=accelerator)
    expected = brute(query, bank, None, 7, Pairs.none())
    for got, wanted in zip(search.top_k(7, Pairs.none()), expected):
        np.testing.assert_array_equal(got, wanted)


@ways
def test_rows_of_odd_size(accelerator):
    """Zero parts, and norms whose squares float32 cannot hold."""
    rng = np.random.default_rng()
    queries, bank = clustered(rng, 5), clustered(rng, 300)
    bank[::7, :7] = 0
    bank[1::7] *= np.float32(1e25)
    bank[2::7] *= np.float32(1e-25)
    bank[3::7] = 0
    queries[2] *= np.float32(1e30)
    search = Search(queries, bank, PARTS, WEIGHTS, memory=30_000, accelerator=accelerator)
    expected = brute(queries, bank, None, 250, Pairs.none())
    for got, wanted in zip(search.top_k(250, Pairs.none()), expected):
        np.testing.assert_array_equal(got, wanted)


@ways
def test_fewer_rows_than_places(accelerator):
    rng = np.random.default_rng()
    queries, bank = clustered(rng, 3), clustered(rng, 6)
    excluded = Pairs.of(np.array([1, 1]), np.array([0, 4]), 3)
    search = Search(queries, bank, PARTS, WEIGHTS, accelerator=accelerator)
    rows, exact = search.top_k(8, excluded)
    np.testing.assert_array_equal((rows >= 0).sum(axis=1), [6, 4, 6])
    assert set(rows[1, :4]) == {1, 2, 3, 5}
    assert np.isneginf(exact[rows < 0]).all()
    rows, exact = Search(queries, bank[:0], PARTS, WEIGHTS).top_k(2, Pairs.none())
    assert (rows == -1).all()
    assert np.isneginf(exact).all()


@ways
@pytest.mark.parametrize("memory", [5000, 2**29])
def test_above_against_brute_force(accelerator, memory):
    rng = np.random.default_rng()
    queries, bank = clustered(rng, 11), clustered(rng, 500)
    bank[400:450] = bank[:50]
    _, exact = brute(queries, bank, None, 500, Pairs.none())
    threshold = float(np.sort(exact.ravel())[-300])  # equal to one of them: not above
    search = Search(queries, bank, PARTS, WEIGHTS, memory=memory, accelerator=accelerator)
    found = search.above(threshold, 1000)
    rows, exact = brute(queries, bank, None, 500, Pairs.none())
    expected = Pairs.of(np.nonzero(exact > threshold)[0], rows[exact > threshold], len(queries))
    for got, wanted in zip(found, expected):
        np.testing.assert_array_equal(got, wanted)
    assert 250 < len(found.rows) < 300
    assert search.above(threshold, len(found.rows) - 1) is None


def test_a_memory_mapped_bank_is_read_by_its_columns(tmp_path):
    rng = np.random.default_rng()
    queries, bank = clustered(rng, 9), clustered(rng, 400)
    bank[:, 21:] = np.nan  # the answer part, which no similarity reads
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    for view in (mapped, np.asarray(mapped)):
        got = Search(queries, view, PARTS, WEIGHTS, memory=20_000).top_k(6, Pairs.none())
        expected = brute(queries, bank, None, 6, Pairs.none())
        np.testing.assert_array_equal(got[0], expected[0])
    changed = np.load(tmp_path / "bank.npy", mmap_mode="c")
    changed[3] = queries[2]  # lives in memory only, and must stay there
    assert Search(queries, changed, PARTS, WEIGHTS).top_k(1, Pairs.none())[0][2] == 3
    np.testing.assert_array_equal(changed[3], queries[2])


def test_the_error_bound_holds():
    """Products and exact similarities differ by less than what the search allows for."""
    rng = np.random.default_rng()
    bank, queries = clustered(rng, 2000) + 100, clustered(rng, 50) + 100
    search = Search(queries, bank, PARTS, WEIGHTS, bank.mean(axis=0))
    fast = search._fast_features(slice(0, 2000), np.empty((2000, 19), np.float32))
    left = similarity_features(queries, PARTS, WEIGHTS, bank.mean(axis=0))
    right = similarity_features(bank, PARTS, WEIGHTS, bank.mean(axis=0))
    exact = np.array([exact_similarity(q[None], right) for q in left])
    assert np.abs(left @ fast.T - exact).max() < search._error


def test_few_candidates_are_kept(monkeypatch):
    """The floor does its work: a random bank leaves about K candidates a doubling."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(8, 24)).astype(np.float32)
    bank = rng.normal(size=(20_000, 24)).astype(np.float32)
    counted = []
    add = topk._Best.add
    monkeypatch.setattr(
        topk._Best, "add", lambda self, c, seen: (counted.append(len(c[0])), add(self, c, seen))
    )
    Search(queries, bank, PARTS, WEIGHTS, memory=150_000).top_k(10, Pairs.none())
    assert sum(counted) < 8 * 10 * 25
