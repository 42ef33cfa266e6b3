"""Retrieval: exact against brute force, exclusions, determinism, and the baselines' orderings."""

import numpy as np
import pytest

from lever_jax import retrieval
from lever_jax.errors import InputError
from lever_jax.similarity import (
    column_mean,
    exact_similarity,
    similarity,
    similarity_features,
)

PARTS = {"image": (0, 5), "question": (5, 12), "answer": (12, 15)}
WEIGHTS = {"image": 0.7, "question": 0.3}


def embeddings(rng, n):
    # A large common offset, as real embeddings have, and parts of very different norms.
    return ((rng.normal(size=(n, 15)) + 1.0) * ([100.0] * 5 + [0.1] * 10)).astype(np.float32)


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return 0.0 if norms == 0 else float(a @ b / norms)


def brute_similarity(query, row, weights=WEIGHTS, mean=None):
    query, row = np.float64(query), np.float64(row)
    if mean is not None:
        query, row = query - mean, row - mean
    total = sum(
        weight * cosine(query[slice(*PARTS[name])], row[slice(*PARTS[name])])
        for name, weight in weights.items()
    )
    return total / sum(weights.values())


def defined(query, bank, weights, mean=None):
    """[N] similarities by the float64 definition, which has no near ties of its own making."""
    feature = similarity_features(query[None], PARTS, weights, mean)
    return exact_similarity(feature, similarity_features(bank, PARTS, weights, mean))


def world(rng, num_queries=17, num_bank=60):
    bank_ids = rng.permutation(1000)[:num_bank]
    return {
        "query_embeddings": embeddings(rng, num_queries),
        "bank_embeddings": embeddings(rng, num_bank),
        "query_ids": np.concatenate([bank_ids[:8], 2000 + np.arange(num_queries - 8)]),
        "bank_ids": bank_ids,
        "query_images": np.array([f"p{i}" for i in rng.integers(0, 25, num_queries)]),
        "bank_images": np.array([f"p{i}" for i in rng.integers(0, 25, num_bank)]),
        "parts": PARTS,
        "weights": WEIGHTS,
    }


def allowed(w, q):
    return (w["bank_ids"] != w["query_ids"][q]) & (w["bank_images"] != w["query_images"][q])


def test_similarity_by_hand():
    parts = {"image": (0, 2), "question": (2, 4)}
    query = np.array([[3.0, 4.0, 1.0, 0.0]])
    bank = np.array([[4.0, 3.0, 0.0, 2.0], [30.0, 40.0, 5.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    got = similarity(query, bank, parts, {"image": 3, "question": 1})
    expected = [(3 * 24 / 25 + 0) / 4, (3 + 1) / 4, (0 + 0.5**0.5) / 4]  # a zero part: cosine 0
    np.testing.assert_allclose(got, [expected], rtol=1e-6)
    assert got.dtype == np.float32


@pytest.mark.parametrize("centred", [False, True])
def test_similarity_against_brute_force(centred):
    rng = np.random.default_rng()
    queries, bank = embeddings(rng, 4), embeddings(rng, 9)
    mean = bank.mean(axis=0, dtype=np.float64) if centred else None
    got = similarity(queries, bank, PARTS, WEIGHTS, mean)
    expected = [[brute_similarity(q, d, mean=mean) for d in bank] for q in queries]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("accelerator", [False, True])  # True runs JAX, here on the CPU
@pytest.mark.parametrize("centred", [False, True])
def test_pools_against_brute_force(centred, accelerator):
    rng = np.random.default_rng()
    w = world(rng)
    mean = column_mean(w["bank_embeddings"]) if centred else None
    pools = retrieval.build_pools(**w, pool_size=12, mean=mean, accelerator=accelerator)
    assert pools.rows.dtype == np.int32
    assert pools.similarity.dtype == np.float32
    assert pools.mask.all()
    for q, query in enumerate(w["query_embeddings"]):
        exact = np.array([brute_similarity(query, d, mean=mean) for d in w["bank_embeddings"]])
        exact[~allowed(w, q)] = -np.inf
        # By value: rows that differ by less than float32 embeddings tell may change places.
        np.testing.assert_allclose(exact[pools.rows[q]], np.sort(exact)[::-1][:12], atol=1e-6)
        np.testing.assert_allclose(pools.similarity[q], exact[pools.rows[q]], atol=1e-6)
        assert len(set(pools.rows[q])) == 12


SHARES = ({}, {"random": 4}, {"random": 10}, {"image": 3, "question": 3, "random": 2})


@pytest.mark.parametrize("shares", SHARES)
def test_a_pool_depends_on_nothing_but_its_query(shares):
    w = world(np.random.default_rng())
    options = {"pool_size": 10, "shares": shares, "seed": 3}
    whole = retrieval.build_pools(**w, **options)
    for how in ({"memory": 1}, {"memory": 9000}, {"memory": 9000, "accelerator": True}):
        again = retrieval.build_pools(**w, **options, **how)
        for a, b in zip(whole, again):
            np.testing.assert_array_equal(a, b)
    order = np.random.default_rng().permutation(17)[:7]
    some = {k: v[order] if k.startswith("query") else v for k, v in w.items()}
    for a, b in zip(whole[:3], retrieval.build_pools(**some, **options)):
        np.testing.assert_array_equal(a[order], b)


def test_ties_fall_to_the_lower_row():
    rng = np.random.default_rng()
    bank = np.tile(embeddings(rng, 7), (30, 1))  # row r equals row r % 7
    query = embeddings(rng, 5)
    pools = retrieval.build_pools(
        query,
        bank,
        pool_size=75,
        parts=PARTS,
        weights=WEIGHTS,
        query_ids=np.arange(5),
        bank_ids=100 + np.arange(210),
    )
    for q in range(5):
        exact = [brute_similarity(query[q], d) for d in bank[:7]]
        first, second, third = np.argsort(exact)[::-1][:3]
        expected = [first + 7 * np.arange(30), second + 7 * np.arange(30)]
        np.testing.assert_array_equal(pools.rows[q, :60], np.concatenate(expected))
        np.testing.assert_array_equal(pools.rows[q, 60:], third + 7 * np.arange(15))
        assert len(np.unique(pools.similarity[q])) == 3


@pytest.mark.parametrize("shares", SHARES)
def test_self_and_same_image_are_excluded(shares):
    w = world(np.random.default_rng())
    w["query_embeddings"][:8] = w["bank_embeddings"][:8]  # the query itself is in the bank
    pools = retrieval.build_pools(**w, pool_size=30, shares=shares)
    for q in range(17):
        assert allowed(w, q)[pools.rows[q]].all()
        assert len(set(pools.rows[q])) == 30
    itself = np.isin(w["query_ids"], w["bank_ids"]).sum()
    barred = sum((~allowed(w, q)).sum() for q in range(17))
    assert pools.excluded == (itself, barred - itself, 0)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_near_duplicates_are_excluded(centred, accelerator):
    rng = np.random.default_rng()
    w = world(rng)
    for q in range(17):  # the photograph again, recompressed; the question is another
        copies = rng.permutation(60)[:2]
        w["bank_embeddings"][copies, :5] = w["query_embeddings"][q, :5] * [[1.0], [3.0]]
        w["bank_embeddings"][copies, :5] += rng.normal(size=(2, 5)).astype(np.float32)
    mean = column_mean(w["bank_embeddings"]) if centred else None
    options = {"pool_size": 15, "mean": mean, "near_duplicate": 0.99, "accelerator": accelerator}
    pools = retrieval.build_pools(**w, **options, memory=2**13)
    barred, near = 0, 0
    for q, query in enumerate(w["query_embeddings"]):
        cosines = defined(query, w["bank_embeddings"], {"image": 1.0}, mean)
        exact = defined(query, w["bank_embeddings"], WEIGHTS, mean)
        keep = allowed(w, q) & (cosines <= 0.99)
        exact[~keep] = -np.inf
        np.testing.assert_array_equal(pools.rows[q], np.argsort(-exact, kind="stable")[:15])
        barred, near = barred + (~keep).sum(), near + (allowed(w, q) & ~keep).sum()
    assert near > 0
    assert sum(pools.excluded) == barred
    assert pools.excluded.near_duplicate == near
    with pytest.raises(InputError, match=r"--near_duplicate=0.1 takes over 1 pairs.*raise it"):
        retrieval.build_pools(**w, pool_size=15, near_duplicate=0.1, memory=64)


@pytest.mark.parametrize("accelerator", [False, True])
def test_mixed_shares_against_brute_force(accelerator):
    w = world(np.random.default_rng())
    shares = {"image": 4, "question": 5, "both": 2, "random": 3}
    pools = retrieval.build_pools(**w, pool_size=16, shares=shares, accelerator=accelerator)
    other = retrieval.build_pools(**w, pool_size=16, shares=shares, seed=1)
    for q, query in enumerate(w["query_embeddings"]):
        chosen = []
        for weights, count in (({"image": 1}, 4), ({"question": 1}, 5), (WEIGHTS, 4)):
            exact = defined(query, w["bank_embeddings"], weights)
            exact[~allowed(w, q)] = -np.inf
            exact[chosen] = -np.inf
            chosen += np.argsort(-exact, kind="stable")[:count].tolist()
        assert set(chosen) <= set(pools.rows[q])
        assert set(chosen) <= set(other.rows[q])
        assert len(set(pools.rows[q])) == 16
        expected = [brute_similarity(query, w["bank_embeddings"][r]) for r in pools.rows[q]]
        np.testing.assert_allclose(pools.similarity[q], expected, atol=1e-5)
        assert (np.diff(pools.similarity[q]) <= 0).all()
    assert (pools.rows != other.rows).any()


def test_bad_shares():
    w = world(np.random.default_rng())
    for shares, message in (
        ({"sound": 1}, "--pool_shares: 'sound' is no source .*image, question, both, random"),
        ({"image": -1}, "--pool_shares: image:-1 must be 0 or more"),
        ({"image": 4, "random": 2}, "--pool_shares add up to 6, more than --pool_size=5"),
    ):
        with pytest.raises(InputError, match=message):
            retrieval.build_pools(**w, pool_size=5, shares=shares)


@pytest.mark.parametrize("side", ["query", "bank"])
def test_embeddings_that_are_not_finite(side):
    w = world(np.random.default_rng())
    w[f"{side}_embeddings"][13, 7] = np.nan
    row = "query" if side == "query" else "demonstration"
    with pytest.raises(InputError, match=f"{row} row 13 is not finite"):
        retrieval.build_pools(**w, pool_size=5, memory=5000)


def test_random_share_is_uniform_over_the_rest():
    rng = np.random.default_rng(0)
    pools = retrieval.build_pools(
        np.tile(embeddings(rng, 1), (4000, 1)),
        embeddings(rng, 6),
        pool_size=3,
        parts=PARTS,
        weights=WEIGHTS,
        query_ids=np.arange(4000),
        bank_ids=-1 - np.arange(6),
        shares={"random": 1},
    )
    counts = np.sort(np.bincount(pools.rows.ravel(), minlength=6))
    np.testing.assert_array_equal(counts[4:], 4000)
    assert (np.abs(counts[:4] - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75)).all()


def test_pool_larger_than_the_bank():
    w = world(np.random.default_rng())
    with pytest.raises(InputError, match=r"--pool_size=61 exceeds the 60 demonstrations.*lower it"):
        retrieval.build_pools(**w, pool_size=61)
    with pytest.raises(InputError, match=r"--pool_size=60 exceeds the \d+ .* query \d+ may use"):
        retrieval.build_pools(**w, pool_size=60)
    with pytest.raises(InputError, match=r"--pool_size=0"):
        retrieval.build_pools(**w, pool_size=0)


@pytest.mark.parametrize("shares", [*SHARES, {"random": 40}, {"image": 64}])
def test_short_pools_by_mask(shares):
    w = world(np.random.default_rng())
    pools = retrieval.build_pools(**w, pool_size=64, shares=shares, allow_short=True)
    assert pools.rows.shape == (17, 64)
    for q in range(17):
        count = allowed(w, q).sum()
        np.testing.assert_array_equal(pools.mask[q], np.arange(64) < count)
        assert set(pools.rows[q, :count]) == set(np.flatnonzero(allowed(w, q)))
        assert not pools.rows[q, count:].any()
        assert not pools.similarity[q, count:].any()


def test_bad_weights():
    bank = np.ones((2, 15), np.float32)
    for weights, message in (
        ({"sound": 1.0}, "'sound' names no part .*image, question, answer"),
        ({"image": -1.0}, "image=-1.0 must be 0 or more"),
        ({"image": 0.0}, "all similarity weights are 0"),
    ):
        with pytest.raises(InputError, match=message):
            similarity(bank, bank, PARTS, weights)


@pytest.mark.parametrize("weights", [{"image": 1}, {"question": 1}, {"image": 1, "question": 1}])
def test_rank_within_pool(weights):
    rng = np.random.default_rng()
    query, pool = embeddings(rng, 1)[0], embeddings(rng, 12)
    pool[7] = pool[2]
    exact = np.array([brute_similarity(query, d, weights) for d in pool])
    exact[7] = exact[2]
    got = retrieval.rank_within_pool(query, pool, PARTS, weights)
    np.testing.assert_array_equal(got, np.argsort(-exact, kind="stable"))
    mask = rng.random(12) < 0.5
    got = retrieval.rank_within_pool(query, pool, PARTS, weights, mask=mask)
    kept = np.flatnonzero(mask)
    np.testing.assert_array_equal(got, kept[np.argsort(-exact[kept], kind="stable")])


def test_a_similarity_pool_is_already_in_order():
    w = world(np.random.default_rng())
    pools = retrieval.build_pools(**w, pool_size=20, shares={"image": 5, "random": 8})
    for q, query in enumerate(w["query_embeddings"]):
        pool = w["bank_embeddings"][pools.rows[q]]
        order = retrieval.rank_within_pool(query, pool, PARTS, WEIGHTS)
        np.testing.assert_array_equal(order, np.arange(20))


@pytest.mark.parametrize("trade_off", [0.0, 0.3, 0.5, 1.0])
def test_mmr_against_brute_force(trade_off):
    rng = np.random.default_rng()
    query, pool = embeddings(rng, 1)[0], embeddings(rng, 9)
    mask = np.arange(9) != 4
    expected = []
    for _ in range(5):
        values = {}
        for d in np.flatnonzero(mask):
            if d in expected:
                continue
            value = trade_off * brute_similarity(query, pool[d])
            if expected:
                repetition = max(brute_similarity(pool[d], pool[e]) for e in expected)
                value -= (1 - trade_off) * repetition
            values[d] = value
        expected.append(max(values, key=lambda d: (values[d], -d)))
    got = retrieval.mmr(query, pool, 5, trade_off, PARTS, WEIGHTS, mask=mask)
    np.testing.assert_array_equal(got, expected)


def test_mmr_prefers_something_new():
    parts = {"image": (0, 2)}
    query = np.array([1.0, 0.2])
    pool = np.array([[1.0, 0.2], [1.0, 0.21], [0.2, 1.0]])
    plain = retrieval.mmr(query, pool, 2, 1.0, parts, {"image": 1})
    np.testing.assert_array_equal(plain, [0, 1])
    diverse = retrieval.mmr(query, pool, 2, 0.4, parts, {"image": 1})
    np.testing.assert_array_equal(diverse, [0, 2])


def test_mmr_bad_input():
    query, pool = np.ones(15), np.ones((3, 15))
    with pytest.raises(InputError, match=r"--shots=3 exceeds the 2 demonstrations"):
        retrieval.mmr(query, pool, 3, 0.5, PARTS, WEIGHTS, mask=np.array([True, True, False]))
    with pytest.raises(InputError, match=r"between 0 and 1"):
        retrieval.mmr(query, pool, 2, 2.0, PARTS, WEIGHTS)
