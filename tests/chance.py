"""Chance that is new in every run and can be had again."""

import numpy as np


def fresh_rng():
    """A generator of a new seed, which is printed: pytest shows it where the test fails."""
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return np.random.default_rng(seed)
