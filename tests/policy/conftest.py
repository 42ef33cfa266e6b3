"""A policy small enough to be enumerated; the enumeration shares no code with lever_jax."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lever_jax.policy import Policy
from lever_jax.selector import SelectorConfig, make_selector
from lever_jax.types import CandidatePool


class Table:
    """A policy that is a table: logits [S, K+1, K] by step and previous action (K: none yet).

    So what is drawn depends on the history and on the step, and a sampler that forgets either is
    found out.
    """

    policy = Policy(
        encode=lambda params, query, pool: params,
        start=lambda params, encoding: (jnp.int32(0), jnp.int32(encoding.shape[-1])),
        logits=lambda params, encoding, state: encoding[state[0], state[1]],
        update=lambda params, encoding, state, action: (state[0] + 1, jnp.int32(action)),
    )

    @staticmethod
    def params(seed: int, candidates: int = 6, shots: int = 2, scale: float = 1.0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return scale * rng.normal(size=(shots, candidates + 1, candidates)).astype(np.float32)

    @staticmethod
    def enumerate(params, mask, *, adjust=lambda logits: logits) -> dict[tuple[int, ...], float]:
        """Probability of every pointer; `adjust` makes behaviour logits of a step's logits."""
        logits = np.asarray(params, np.float64)
        shots, _, candidates = logits.shape
        candidates_left = [k for k in range(candidates) if mask[k]]
        probabilities = {}
        for pointer in itertools.permutations(candidates_left, shots):
            probability, left, previous = 1.0, list(candidates_left), candidates
            for step, action in enumerate(pointer):
                adjusted = adjust(logits[step, previous][left])
                weights = np.exp(adjusted - adjusted.max())
                probability *= weights[left.index(action)] / weights.sum()
                left.remove(action)
                previous = action
            probabilities[pointer] = probability
        assert len(probabilities) == math.perm(len(candidates_left), shots)
        return probabilities


@pytest.fixture(scope="session")
def table():
    return Table


@pytest.fixture(scope="session")
def batch():
    """A batch [B, ...] of 4 queries with K = 6, each with another mask, the last one short of S."""
    keys = jax.random.split(jax.random.key(7), 2)
    masks = ["111111", "101101", "010111", "000100"]
    mask = jnp.array([[bit == "1" for bit in row] for row in masks])
    queries = jax.random.normal(keys[0], (4, 12))
    return queries, CandidatePool(jax.random.normal(keys[1], (4, 6, 12)), mask)


@pytest.fixture(scope="session")
def parts():
    """Column ranges of the embeddings of `batch`."""
    return {"image": (0, 4), "question": (4, 8), "answer": (8, 12)}


@pytest.fixture(scope="session")
def selector(parts):
    """A small selector and parameters for `batch`; its opinions are strong, so mistakes show."""
    init, policy = make_selector(SelectorConfig(width=16, heads=2), parts, 12)
    params = jax.jit(init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    noisy = lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return policy, jax.tree.map(noisy, params)
