"""Embeddings put together when they are read, against the array they stand for."""

import numpy as np
import pytest

from qwen_bridge.gathered import Gathered, GatheredRows


@pytest.fixture(params=[0, 1, 7, 9000])
def both(request):
    """Gathered rows of three parts with a gap between them, and the plain array."""
    count, dim = request.param, 12
    rng = np.random.default_rng(count)
    images, texts = (rng.normal(size=(20, w)).astype(np.float32) for w in (4, 3))
    parts = [((0, 4), images), ((5, 8), texts), ((8, 11), texts)]
    plain = np.zeros((count, dim), np.float32)
    gathered = []
    for (low, high), vectors in parts:
        rows = rng.integers(-1, 20, count)  # -1: no vector
        plain[:, low:high] = np.where(rows[:, None] >= 0, vectors[rows], 0.0)
        gathered.append(Gathered((low, high), vectors, rows))
    return GatheredRows(count, dim, gathered), plain


def test_it_is_indexed_as_an_array(both):
    rows, plain = both
    assert (rows.shape, rows.ndim, rows.dtype, len(rows)) == (plain.shape, 2, "f4", len(plain))
    rng = np.random.default_rng(1)
    count = len(plain)
    indices = [slice(None), slice(2, 5), slice(None, None, -2), rng.random(count) < 0.5]
    if count:
        indices += [0, -1, rng.integers(0, count, 6), rng.integers(0, count, (2, 3)), [count - 1]]
    columns = [slice(None), slice(0, 4), slice(2, 9), slice(4, 5), slice(10, 3), slice(-3, None)]
    for index in indices:
        np.testing.assert_array_equal(rows[index], plain[index])
        for some in columns:
            np.testing.assert_array_equal(rows[index, some], plain[..., some][index])


def test_it_becomes_an_array_and_has_its_mean(both):
    rows, plain = both
    np.testing.assert_array_equal(np.asarray(rows), plain)
    assert np.asarray(rows, np.float64).dtype == np.float64
    if len(plain):
        np.testing.assert_allclose(
            np.mean(rows, axis=0, dtype=np.float64), plain.mean(0, dtype=np.float64), atol=1e-12
        )
        assert rows.mean(axis=0, dtype=np.float32).dtype == np.float32


def test_some_rows_are_taken(both):
    rows, plain = both
    some = np.random.default_rng(2).permutation(len(plain))[: len(plain) // 2].tolist()
    taken = rows.take(some)
    assert taken.shape == plain[some].shape
    np.testing.assert_array_equal(np.asarray(taken), plain[some])
    assert rows.take([]).shape == (0, 12)


def test_no_vectors_at_all_are_zeros():
    part = Gathered((1, 3), np.zeros((0, 2), np.float32), np.full(4, -1))
    rows = GatheredRows(4, 5, [part])
    assert not np.asarray(rows).any()
    assert rows[2].shape == (5,)
    assert not rows.mean().any()


def test_what_it_cannot_do_is_an_error(both):
    rows, plain = both
    with pytest.raises(TypeError, match="slice without a step"):
        rows[:, 3]
    with pytest.raises(IndexError):
        rows[len(plain)]
    with pytest.raises(ValueError, match="only axis=0"):
        rows.mean(axis=1)
    with pytest.raises(ValueError, match="a copy is needed"):
        np.array(rows, copy=False)


def test_parts_that_do_not_fit_are_a_bug():
    vectors = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="columns"):
        GatheredRows(1, 5, [Gathered((0, 4), vectors, np.zeros(1, np.int64))])
    with pytest.raises(ValueError, match="rows"):
        GatheredRows(2, 5, [Gathered((0, 3), vectors, np.zeros(1, np.int64))])
