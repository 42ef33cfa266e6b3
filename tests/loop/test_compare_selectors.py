"""The comparison of selector options: what an option is, and what its figures mean."""

import numpy as np
import pytest

from experiments.compare_selectors import DEFAULT, Measured, compare, parse_option
from lever_jax.errors import InputError


def test_figures_are_means_over_seeds_paired_on_queries():
    plain = np.array([[1.0, 0.0, 0.5, 1.0], [1.0, 0.0, 0.5, np.nan]])
    better = np.array([[1.0, 1.0, 0.5, 1.0], [1.0, 0.5, 0.5, 1.0]])
    shown = np.array([2.0, 2.0])
    rows = compare(
        {DEFAULT: Measured(plain, shown), "stop=true": Measured(better, np.array([1.5, 1.25]))}
    )
    assert "difference" not in rows[DEFAULT]
    assert rows[DEFAULT]["accuracy"] == pytest.approx(0.5)
    assert rows[DEFAULT]["by_seed"] == pytest.approx([0.625, 0.5])
    row = rows["stop=true"]
    assert row["n"] == row["difference"]["n"] == 3  # the last query failed under one seed
    assert row["accuracy"] == pytest.approx((1.0 + 0.75 + 0.5) / 3)
    assert row["difference"]["diff"] == pytest.approx(0.25)
    low, high = row["difference"]["ci95"]
    assert low <= 0.25 <= high
    assert row["mean_shots"] == pytest.approx(1.375)


def test_an_option_is_flags_of_the_selector_with_values():
    assert parse_option("layers=2+dropout=0.1") == {"layers": "2", "dropout": "0.1"}
    for text in ("history", "history=", "pool_size=8", "layers=2+"):
        with pytest.raises(InputError, match="is not of the form flag=value"):
            parse_option(text)
