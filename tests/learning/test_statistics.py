"""Statistics: equal to SciPy where SciPy has them, and silent on degenerate data."""

import numpy as np
import pytest
import scipy.stats

from lever_jax import statistics
from lever_jax.statistics import Estimate, mean_ci, ratios_ci, share_ci


def test_mean_ci_equals_scipy():
    values = np.random.default_rng().exponential(size=80)
    got = statistics.mean_ci(values, confidence=0.9, resamples=2000, seed=5)
    expected = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=2000,
        confidence_level=0.9,
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    np.testing.assert_allclose(got, (values.mean(), *expected, 80))
    assert got.interval == [got.low, got.high]


def test_mean_ci_of_many_values_is_near_normal():
    values = np.random.default_rng().random(5000)
    got = statistics.mean_ci(values, resamples=1000)
    half = 1.96 * values.std() / np.sqrt(5000)
    np.testing.assert_allclose(got.low, values.mean() - half, atol=0.2 * half)
    np.testing.assert_allclose(got.high, values.mean() + half, atol=0.2 * half)


def test_mean_ci_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        got = statistics.mean_ci(rng.random(60) < 0.3, resamples=300)
        hits += got.low <= 0.3 <= got.high
    assert 0.88 <= hits / 200 <= 1.0  # 95% asked; four standard errors below it is 0.888


def test_mean_ci_is_repeatable_and_seeded():
    values = np.random.default_rng().random(50)
    assert statistics.mean_ci(values) == statistics.mean_ci(values)
    assert statistics.mean_ci(values, seed=1).low != statistics.mean_ci(values, seed=2).low


def test_mean_ci_degenerate():
    assert statistics.mean_ci([]) == Estimate(None, None, None, 0)
    assert statistics.mean_ci([0.3]) == Estimate(0.3, None, None, 1)
    assert statistics.mean_ci([0.1] * 7) == Estimate(0.1, 0.1, 0.1, 7)
    assert statistics.mean_ci([]).interval is None
    for values in ([0.0, 1.0], [0.0] * 99 + [1.0], [0.3, 0.3 + 1e-16, 0.3], [1e-300, 2e-300, 0.0]):
        got = statistics.mean_ci(values)
        assert got.low <= got.value <= got.high
    with pytest.raises(ValueError, match="1 are not"):
        statistics.mean_ci([1.0, np.nan])


def test_paired_difference_is_the_mean_of_the_differences():
    rng = np.random.default_rng()
    easy = rng.random(60)  # what both methods share
    a, b = easy + 0.1 + 0.01 * rng.normal(size=60), easy
    got = statistics.paired_difference(a, b, seed=2)
    assert got == statistics.mean_ci(a - b, seed=2)
    np.testing.assert_allclose(got.value, a.mean() - b.mean())
    assert got.low > 0.08  # far tighter than the spread of the queries
    back = statistics.paired_difference(b, a, seed=2)
    np.testing.assert_allclose(back.value, -got.value)
    assert back.high < 0


def test_paired_difference_degenerate():
    assert statistics.paired_difference([], []) == Estimate(None, None, None, 0)
    assert statistics.paired_difference([1.0], [0.5]) == Estimate(0.5, None, None, 1)
    assert statistics.paired_difference([1.0, 0.0], [1.0, 0.0]) == Estimate(0.0, 0.0, 0.0, 2)
    with pytest.raises(ValueError, match="3 and 2"):
        statistics.paired_difference([1, 2, 3], [1, 2])


@pytest.mark.parametrize("n", [1, 2, 7, 400])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_mean_of_all_right_or_all_wrong_is_wilson(n, value):
    got = statistics.mean_ci([value] * n, bounds=(0, 1), confidence=0.9)
    wilson = scipy.stats.binomtest(int(value) * n, n).proportion_ci(0.9, "wilson")
    np.testing.assert_allclose(got, (value, *wilson, n), atol=1e-12)
    assert got.high - got.low > 0.001


def test_mean_of_equal_values_within_bounds():
    # n = 4: u = z^2 / (4 + z^2) of the queries may be otherwise, and lie at 0 or at 1.
    u = 1.959963984540054**2 / (4 + 1.959963984540054**2)
    got = statistics.mean_ci([0.3] * 4, bounds=(0, 1))
    np.testing.assert_allclose(got, (0.3, 0.3 - 0.3 * u, 0.3 + 0.7 * u, 4))
    same = statistics.paired_difference([1.0] * 4, [1.0] * 4, bounds=(-1, 1))
    np.testing.assert_allclose(same, (0.0, -u, u, 4), atol=1e-15)
    worse = statistics.paired_difference([0.0] * 4, [1.0] * 4, bounds=(-1, 1))
    np.testing.assert_allclose(worse, (-1.0, -1.0, -1 + 2 * u, 4))
    assert statistics.mean_ci([], bounds=(0, 1)) == Estimate(None, None, None, 0)


def test_bounds_change_nothing_where_values_differ():
    values = np.random.default_rng().random(40)
    assert statistics.mean_ci(values, bounds=(0, 1)) == statistics.mean_ci(values)
    with pytest.raises(ValueError, match="outside the bounds"):
        statistics.mean_ci([0.5, 1.5], bounds=(0, 1))


def test_share_ci_is_wilson():
    # n = 10, k = 3, z = 1.96: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, p, n = 1.959963984540054, 0.3, 10
    root = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(p + z**2 / (2 * n) + sign * root) / (1 + z**2 / n) for sign in (-1, 1)]
    got = statistics.share_ci([1] * 3 + [0] * 7)
    np.testing.assert_allclose(got, (0.3, *expected, 10))
    none = statistics.share_ci(np.zeros(20, bool))
    assert none.low == 0
    assert 0.1 < none.high < 0.2


def test_share_ci_by_query_is_wider_where_queries_differ():
    rng = np.random.default_rng(0)
    hits = np.where(rng.random(100) < 0.5, 10, 0)  # all or nothing in every query
    clustered = statistics.share_ci(hits, np.full(100, 10))
    alone = statistics.share_ci(np.repeat(hits > 0, 10))
    assert clustered.value == alone.value
    assert clustered.n == 100
    ratio = (clustered.high - clustered.low) / (alone.high - alone.low)
    np.testing.assert_allclose(ratio, np.sqrt(10), rtol=0.15)


def test_share_ci_by_query_equals_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    totals = rng.integers(0, 9, 70)
    hits = rng.binomial(totals, 0.4)
    got = statistics.share_ci(hits, totals, resamples=4000)
    assert got.value == hits.sum() / totals.sum()
    assert got.n == (totals > 0).sum()
    kept = totals > 0
    expected = scipy.stats.bootstrap(
        (hits[kept], totals[kept]),
        lambda h, t, axis: h.sum(axis=axis) / t.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    np.testing.assert_allclose(got[1:3], expected, atol=0.01)


def test_share_ci_degenerate():
    assert statistics.share_ci([]) == Estimate(None, None, None, 0)
    assert statistics.share_ci([0, 0], [0, 0]) == Estimate(None, None, None, 0)
    assert statistics.share_ci([2], [4]) == Estimate(0.5, None, None, 1)
    certain = statistics.share_ci([4, 4], [4, 4])
    assert certain.value == certain.high == 1
    assert certain.low < 0.5  # two queries prove little


def test_spearman_equals_scipy():
    rng = np.random.default_rng()
    for _ in range(10):
        x, y = rng.random(40), rng.choice([0, 0.3, 0.6, 1.0], 40)
        got = statistics.spearman(x, y, resamples=20)
        np.testing.assert_allclose(got.value, scipy.stats.spearmanr(x, y).statistic)
        assert got.low <= got.high


def test_weighted_spearman_equals_scipy_on_repeated_rows():
    rng = np.random.default_rng()
    for digits in (0, 1, 9):  # many ties, some, none
        x, y = np.sort(rng.normal(size=50).round(digits)), rng.normal(size=50).round(1)
        weights = rng.integers(0, 4, 50)
        x_code, y_code = (np.unique(v, return_inverse=True)[1] for v in (x, y))
        ends = np.flatnonzero(np.diff(x_code, append=-1))
        got = statistics._weighted_spearman(weights.astype(float), ends, x_code, y_code)
        repeated = np.repeat(x, weights), np.repeat(y, weights)
        np.testing.assert_allclose(got, scipy.stats.spearmanr(*repeated).statistic, atol=1e-12)


def test_weighted_spearman_degenerate_at_any_size():
    for n in (2, 300_000):
        same, different = np.zeros(n, int), np.arange(n)
        weights = np.ones(n)
        ends = np.array([n - 1])
        assert np.isnan(statistics._weighted_spearman(weights, ends, same, different))
        assert np.isnan(statistics._weighted_spearman(weights, different, different, same))


def test_spearman_interval_equals_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    x = rng.normal(size=100)
    y = np.round(x + rng.normal(size=100))
    got = statistics.spearman(x, y, resamples=1500)
    draws = rng.integers(100, size=(1500, 100))
    expected = np.quantile(
        [scipy.stats.spearmanr(x[d], y[d]).statistic for d in draws], [0.025, 0.975]
    )
    np.testing.assert_allclose(got[1:3], expected, atol=0.04)


def test_spearman_by_query_is_wider_where_queries_differ():
    rng = np.random.default_rng(0)
    query = rng.permutation(np.repeat(np.arange(30), 20))
    level = rng.normal(size=(2, 30))  # correlated within a query only by chance of 30 levels
    x, y = (level[i, query] + 0.1 * rng.normal(size=600) for i in range(2))
    by_row = statistics.spearman(x, y, resamples=300)
    by_query = statistics.spearman(x, y, clusters=query, resamples=300)
    assert by_query.value == by_row.value
    assert by_query.high - by_query.low > 2.5 * (by_row.high - by_row.low)


def test_spearman_degenerate():
    for x, y in (([], []), ([1.0], [2.0]), ([1, 2, 3], [1, 1, 1]), ([0, 0], [0, 0])):
        assert statistics.spearman(x, y) == Estimate(None, None, None, len(x))
    one_query = statistics.spearman([1, 2, 3], [1, 3, 2], clusters=[7, 7, 7])
    np.testing.assert_allclose(one_query.value, 0.5)
    assert one_query.interval is None
    rare = statistics.spearman(np.arange(40), np.arange(40) == 3)  # a third have no such row
    assert rare.value is not None
    assert np.isfinite(rare.interval).all()
    with pytest.raises(ValueError, match="x must be finite"):
        statistics.spearman([1.0, np.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="3 and 2"):
        statistics.spearman([1, 2, 3], [1, 2])


def test_ratios_against_numpy_and_the_single_column_bootstrap():
    rng = np.random.default_rng()
    totals = rng.integers(0, 5, (60, 4))
    hits = rng.binomial(totals, [0.1, 0.4, 0.6, 0.9])
    found = ratios_ci(hits, totals, resamples=2000)
    for column, estimate in enumerate(found):
        own = totals[:, column] > 0
        assert estimate.n == own.sum()
        np.testing.assert_allclose(estimate.value, hits[:, column].sum() / totals[:, column].sum())
        alone = share_ci(hits[:, column], totals[:, column], resamples=2000, seed=1)
        np.testing.assert_allclose(estimate.interval, alone.interval, atol=0.03)


def test_ratios_by_an_explicit_bootstrap():
    rng = np.random.default_rng(3)
    top, bottom = rng.random((7, 2)), 1 + rng.random((7, 2))
    drawn = np.random.default_rng(0).integers(7, size=(50, 7))  # one batch, as in ratios_ci
    resampled = np.stack([top[rows].sum(axis=0) / bottom[rows].sum(axis=0) for rows in drawn])
    expected = np.quantile(resampled, [0.025, 0.975], axis=0)
    for column, estimate in enumerate(ratios_ci(top, bottom, resamples=50)):
        np.testing.assert_allclose(estimate.interval, expected[:, column])


def test_ratios_of_degenerate_columns():
    zero, one = np.zeros((4, 1)), np.ones((4, 1))
    assert ratios_ci(zero, zero)[0] == (None, None, None, 0)
    assert ratios_ci(zero[:0], zero[:0])[0] == (None, None, None, 0)
    assert ratios_ci(np.zeros((3, 0)), np.zeros((3, 0))) == []
    # All agree: from Wilson's bound, as in mean_ci, where bounds are known.
    (agreed,) = ratios_ci(one, one, bounds=(0.0, 1.0))
    assert agreed == mean_ci(one[:, 0], bounds=(0.0, 1.0))
    assert ratios_ci(one[:1], one[:1])[0] == (1.0, None, None, 1)
    # A negative sum below has no ratio; a query of 0 below counts above.
    assert ratios_ci(one, -one)[0].value is None
    assert ratios_ci(np.array([[1.0], [1.0]]), np.array([[2.0], [0.0]]))[0].value == 1.0
    with pytest.raises(ValueError, match="must be"):
        ratios_ci(one, one[:2])
