"""What the tests hold samplers to: counts of draws against enumerated probabilities."""

from collections import Counter

import jax
import numpy as np
from scipy import stats


def fits(observed, expected):
    """Chi-square p-value of counts against probabilities, both dicts over the same pointers.

    Cells expecting fewer than 5 are joined, as the test wants.
    """
    total = sum(observed.values())
    assert set(observed) <= {pointer for pointer, p in expected.items() if p > 0}
    np.testing.assert_allclose(sum(expected.values()), 1.0, rtol=1e-6)
    cells = sorted((total * p, observed.get(pointer, 0)) for pointer, p in expected.items())
    rare = [cell for cell in cells if cell[0] < 5]
    cells = [cell for cell in cells if cell[0] >= 5]
    if rare:
        cells.append(tuple(sum(column) for column in zip(*rare)))
    wanted, seen = (np.array(column, float) for column in zip(*cells))
    statistic = np.sum((seen - wanted) ** 2 / np.maximum(wanted, 1e-9))
    return stats.chi2.sf(statistic, max(len(cells) - 1, 1))


def counts(pointers):
    return Counter(map(tuple, np.asarray(pointers).tolist()))


def nucleus_by_hand(p):
    """Logits outside the nucleus become -inf; written with a sorted loop."""

    def adjust(logits):
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        inside = [sum(q for q in probabilities if q > mine) < p for mine in probabilities]
        return np.where(inside, logits, -np.inf)

    return adjust


def rows_of(tree):
    """A batch of arrays [B, ...], as NumPy, query by query."""
    tree = jax.tree.map(np.asarray, tree)
    return [jax.tree.map(lambda x: x[row], tree) for row in range(len(jax.tree.leaves(tree)[0]))]  # noqa: B023
