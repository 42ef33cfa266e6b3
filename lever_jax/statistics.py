"""Intervals for the few figures this project reports: means, paired differences, shares, ranks.

A number without an interval is not a result, so every function here returns an `Estimate`: the
value, its bounds and how many observations it rests on. What cannot be known is None, never NaN,
and degenerate data (empty, one value, all equal) give no warning. Intervals are bootstraps seeded
by argument, so a figure printed twice is the same figure.

A bootstrap of equal observations would claim certainty, so where the range of an observation is
known (`bounds`) such data get an interval from how many observations agreed, see `_unanimous`.
"""

import warnings
from typing import NamedTuple

import numpy as np
import scipy.stats

_BCA_LIMIT = 2_000  # SciPy's jackknife is quadratic in n; past this, skewness no longer matters
_CELLS_AT_A_TIME = 4_000_000


class Estimate(NamedTuple):
    """A figure with its interval.

    Attributes:
      value: None if the data cannot give one.
      low, high: bounds of the interval; None if the data cannot give them.
      n: observations (for clustered figures: clusters) behind it.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def interval(self) -> list[float] | None:
        """[low, high] as the JSON files want it, or None."""
        return None if self.low is None else [self.low, self.high]


def mean_ci(
    values: np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Estimate:
    """Mean with a bootstrap interval.

    The interval is BCa (bias-corrected and accelerated) up to 2,000 values and percentile above,
    where the two agree.

    Args:
      values: [n] finite numbers.
      bounds: least and greatest value that an observation can have, such as (0, 1) for
        accuracies and (-1, 1) for their differences.
      confidence: in (0, 1).
      resamples: bootstrap resamples.
      seed: of the resampling.

    Returns:
      `Estimate`. No value if n = 0. Where all values are equal, n = 1 included, the interval comes
      from the bounds; without bounds it has zero width, and there is none if n = 1.

    Raises:
      ValueError: a value is NaN, infinite or outside the bounds.

    References: Efron, Better bootstrap confidence intervals, 1987; `scipy.stats.bootstrap`.
    """
    values = _finite("values", values)
    n = len(values)
    if n == 0:
        return Estimate(None, None, None, 0)
    if bounds is not None and not bounds[0] <= values.min() <= values.max() <= bounds[1]:
        raise ValueError(f"values lie outside the bounds {bounds}")
    if np.ptp(values) == 0:
        value = float(values[0])
        if bounds is not None:
            return Estimate(value, *_unanimous(value, n, bounds, confidence), n)
        bound = value if n > 1 else None
        return Estimate(value, bound, bound, n)
    value = float(values.mean())
    for method in ("BCa", "percentile"):
        if method == "BCa" and n > _BCA_LIMIT:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a degenerate BCa says NaN, and that is enough
            interval = scipy.stats.bootstrap(
                (values,),
                np.mean,
                n_resamples=resamples,
                batch=max(1, _CELLS_AT_A_TIME // n),
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(interval.low) and np.isfinite(interval.high):
            return Estimate(value, float(interval.low), float(interval.high), n)
    return Estimate(value, None, None, n)


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Estimate:
    """Mean of a - b over the same queries, with a paired bootstrap interval.

    Resampling queries keeps each pair together, so what makes a query easy for both methods
    cancels. Average repeated runs per query first: runs on one query are not new queries.

    Args:
      a, b: [n] one finite number a query, in the same order.
      bounds: of a difference; two methods that agree on every query then get the interval that
        n agreeing queries allow, not zero width.
      confidence, resamples, seed: as in `mean_ci`.

    Returns:
      `Estimate` of mean(a) - mean(b), degenerate data as in `mean_ci`.

    Raises:
      ValueError: lengths differ, or a value is NaN or infinite.
    """
    a, b = _finite("a", a), _finite("b", b)
    if len(a) != len(b):
        raise ValueError(f"a and b must hold the same queries; they hold {len(a)} and {len(b)}")
    return mean_ci(a - b, bounds=bounds, confidence=confidence, resamples=resamples, seed=seed)


def share_ci(
    hits: np.ndarray,
    totals: np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Share of yes among yes-or-no observations, alone or clustered by query.

    share = sum_q hits_q / sum_q totals_q

    Without clusters the interval is Wilson's. With clusters it is a percentile bootstrap over
    queries, since candidates of one query are alike; where every observation agrees, a bootstrap
    would claim certainty, and it is Wilson's with each query counted once.

    Args:
      hits: [n] 0 or 1, or with totals [Q] the number of yes in each query.
      totals: [Q] observations in each query; a query with 0 is left out.
      confidence, resamples, seed: as in `mean_ci`.

    Returns:
      `Estimate`; n counts observations, or the queries that have any. None if there are none.

    References: Wilson, Probable inference, 1927; Field & Welsh, Bootstrapping clustered data,
      2007.
    """
    hits = _finite("hits", hits)
    clustered = totals is not None
    totals = _finite("totals", totals) if clustered else np.ones_like(hits)
    hits, totals = hits[totals > 0], totals[totals > 0]
    n = len(hits)
    if n == 0:
        return Estimate(None, None, None, 0)
    value = float(hits.sum() / totals.sum())
    if not clustered or value in (0.0, 1.0):
        wilson = scipy.stats.binomtest(round(value * n), n).proportion_ci(confidence, "wilson")
        return Estimate(value, float(wilson.low), float(wilson.high), n)
    if n == 1:
        return Estimate(value, None, None, 1)
    rng = np.random.default_rng(seed)
    shares = []
    for size in _batches(resamples, n):
        drawn = rng.integers(n, size=(size, n))
        shares.append(hits[drawn].sum(axis=1) / totals[drawn].sum(axis=1))
    return Estimate(value, *_percentiles(np.concatenate(shares), confidence), n)


def ratios_ci(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Estimate]:
    """Ratios of sums over queries, many at once, each with a bootstrap interval over queries.

    ratio_c = sum_q numerators_qc / sum_q denominators_qc

    The queries of a resample are drawn once for all columns, which is one matrix product instead
    of a bootstrap a column.

    Args:
      numerators, denominators: [Q, C] finite; a query where both are 0 is not in a column.
      bounds: least and greatest value of a query's own ratio, such as (0, 1) for shares.
      confidence, resamples, seed: as in `mean_ci`.

    Returns:
      C estimates; n counts the queries in the column. No value where the denominators do not sum
      to more than 0. No interval for a single query, or where the denominators of more than half
      of the resamples do not; the other such resamples are left out. Where the ratios of all
      queries agree the interval is as in `mean_ci`.

    Raises:
      ValueError: shapes differ, or a number is NaN or infinite.
    """
    shape = np.shape(numerators)
    if len(shape) != 2 or shape != np.shape(denominators):
        raise ValueError(
            f"numerators and denominators must be [Q, C]; they are {shape} and "
            f"{np.shape(denominators)}"
        )
    numerators = _finite("numerators", numerators).reshape(shape)
    denominators = _finite("denominators", denominators).reshape(shape)
    present = (denominators != 0) | (numerators != 0)
    counts, totals = present.sum(axis=0), denominators.sum(axis=0)
    num_queries = shape[0]
    resampled = np.full((resamples, shape[1]), np.nan)
    rng = np.random.default_rng(seed)
    done = 0
    for size in _batches(resamples, max(num_queries, 1)):
        drawn = rng.integers(max(num_queries, 1), size=(size, num_queries))
        weights = np.stack([np.bincount(row, minlength=num_queries) for row in drawn])
        bottom = weights @ denominators
        np.divide(weights @ numerators, bottom, out=resampled[done : done + size], where=bottom > 0)
        done += size
    estimates = []
    for column in range(shape[1]):
        n = int(counts[column])
        if n == 0 or totals[column] <= 0:
            estimates.append(Estimate(None, None, None, n))
            continue
        value = float(numerators[:, column].sum() / totals[column])
        own = present[:, column]
        differences = numerators[own, column] - value * denominators[own, column]
        found = resampled[np.isfinite(resampled[:, column]), column]
        if bounds is not None and np.abs(differences).max() <= 1e-12:
            low, high = _unanimous(value, n, bounds, confidence)
        elif n == 1 or 2 * len(found) < resamples:
            low = high = None
        else:
            low, high = _percentiles(found, confidence)
        estimates.append(Estimate(value, low, high, n))
    return estimates


def spearman(
    x: np.ndarray,
    y: np.ndarray,
    *,
    clusters: np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Spearman's rank correlation with a bootstrap interval.

    Each resample is ranked anew, ties sharing their rank. With clusters, whole queries are
    resampled, because candidates of one query are not independent.

    Args:
      x, y: [n] finite numbers.
      clusters: [n] query of each row (any integers), or None for independent rows.
      confidence, resamples, seed: as in `mean_ci`.

    Returns:
      `Estimate`; n counts rows. No value for fewer than two rows or where x or y is all equal.
      No interval for fewer than two clusters, or where more than half of the resamples are
      degenerate; the other degenerate ones are left out.

    Raises:
      ValueError: lengths differ, or a value is NaN or infinite.
    """
    x, y = _finite("x", x), _finite("y", y)
    n = len(x)
    if n != len(y):
        raise ValueError(f"x and y must have one length; they have {n} and {len(y)}")
    if n < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(None, None, None, n)
    value = float(scipy.stats.spearmanr(x, y).statistic)
    clusters = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    num_clusters = int(clusters.max()) + 1
    if num_clusters < 2:
        return Estimate(value, None, None, n)
    # A resample is a whole-number weight for each row, so nothing need be sorted again.
    order = np.argsort(x, kind="stable")
    x_code = np.unique(x[order], return_inverse=True)[1]
    x_ends = np.flatnonzero(np.diff(x_code, append=-1))
    y_code = np.unique(y[order], return_inverse=True)[1]
    clusters = clusters[order]
    rng = np.random.default_rng(seed)
    found = np.empty(resamples)
    for i in range(resamples):
        drawn = np.bincount(rng.integers(num_clusters, size=num_clusters), minlength=num_clusters)
        found[i] = _weighted_spearman(drawn[clusters].astype(np.float64), x_ends, x_code, y_code)
    found = found[np.isfinite(found)]
    if 2 * len(found) < resamples:
        return Estimate(value, None, None, n)
    return Estimate(value, *_percentiles(found, confidence), n)


def _weighted_spearman(
    weights: np.ndarray, x_ends: np.ndarray, x_code: np.ndarray, y_code: np.ndarray
) -> float:
    """Spearman of rows repeated `weights` times, rows sorted by x; NaN if degenerate.

    x_ends holds the last row of each different x, and the codes are dense ranks. A rank is the
    average rank of its ties, less that of all rows; the sum over rows of its square is then
    (W^3 - sum of w^3) / 12, for W rows in ties of w, but for terms that cancel in the ratio.
    """
    x_rank, x_weight = np.cumsum(weights), weights
    total = x_rank[-1]
    if len(x_ends) < len(x_rank):
        x_rank = x_rank[x_ends]
        x_weight = np.diff(x_rank, prepend=0.0)
    x_rank -= (x_weight + total) / 2
    y_weight = np.bincount(y_code, weights)
    y_rank = np.cumsum(y_weight) - (y_weight + total) / 2
    x_square, y_square = (total**3 - np.einsum("i,i,i", w, w, w) for w in (x_weight, y_weight))
    if min(x_square, y_square) < 1e-9 * total**3:  # one row apart from the rest gives 3 / n
        return np.nan
    product = y_rank[y_code]
    product *= weights
    if len(x_ends) < len(product):
        x_rank = x_rank[x_code]
    return float(12 * (product @ x_rank) / np.sqrt(x_square) / np.sqrt(y_square))


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64).ravel()
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite; {int((~np.isfinite(values)).sum())} are not")
    return values


def _unanimous(
    value: float, n: int, bounds: tuple[float, float], confidence: float
) -> tuple[float, float]:
    """Interval of a mean where all n observations are equal.

    u = z^2 / (n + z^2)
    [value - u (value - lowest), value + u (highest - value)]

    u is Wilson's upper bound of the share of observations that are otherwise, having seen none of
    n; those may lie anywhere within the bounds. At a value of 0 or 1 with bounds (0, 1) this is
    Wilson's interval itself.
    """
    otherwise = scipy.stats.binomtest(0, n).proportion_ci(confidence, "wilson").high
    lowest, highest = bounds
    low = value - otherwise * (value - lowest)
    return float(low), float(value + otherwise * (highest - value))


def _percentiles(resampled: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _batches(resamples: int, n: int) -> list[int]:
    size = max(1, min(resamples, _CELLS_AT_A_TIME // n))
    return [min(size, resamples - done) for done in range(0, resamples, size)]
