"""The selector learns what this project needs it to learn, from as little as there is.

A world in miniature: the colour of a query's image (8) decides which language (8) its answer is in,
a tenth of the demonstrations is annotated in another one, and pools are random. The parts of the
embeddings have a common offset and different scales, as those of a VLM do.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lever_jax.errors import InputError
from lever_jax.masking import masked_entropy
from lever_jax.policy import sequence_log_probs, step_log_probs
from lever_jax.sampling import beam_search
from lever_jax.selector import SelectorConfig, make_selector
from lever_jax.types import CandidatePool

PARTS = {"image": (0, 48), "question": (48, 72), "answer": (72, 112)}
POOL = 32
DIMENSION = 112


class World:
    """Embeddings of demonstrations and queries with known colours, digits and languages."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        normal = self.rng.normal
        self.colours, self.digits = normal(size=(8, 48)), normal(size=(10, 48))
        self.questions, self.languages = normal(size=(3, 24)), normal(size=(8, 40))
        self.words = normal(size=(8, 10, 40))
        self.language_of = self.rng.permutation(8)

    def embed(self, colour, digit, language):
        noise = lambda width: 0.5 * self.rng.normal(size=(len(colour), width))  # noqa: E731
        question = self.questions[self.rng.integers(3, size=len(colour))]
        image = self.colours[colour] + self.digits[digit] + noise(48)
        answer = self.languages[language] + self.words[language, digit] + noise(40)
        columns = [10.0 * (image + 3.0), question + noise(24) + 3.0, 0.1 * (answer + 3.0)]
        return np.concatenate(columns, axis=1).astype(np.float32)

    def queries(self, count):
        """Queries with pools from a bank of their own, and what each candidate is good for."""
        bank = 1200
        colour, digit = self.rng.integers(8, size=bank), self.rng.integers(10, size=bank)
        foreign = self.rng.random(bank) < 0.1
        language = np.where(foreign, self.rng.integers(8, size=bank), self.language_of[colour])
        demonstrations = self.embed(colour, digit, language)

        query_colour, query_digit = (
            self.rng.integers(8, size=count),
            self.rng.integers(10, size=count),
        )
        query_language = self.language_of[query_colour]
        queries = self.embed(query_colour, query_digit, query_language)
        queries[:, slice(*PARTS["answer"])] = 0.0
        pools = np.stack([self.rng.choice(bank, POOL, replace=False) for _ in range(count)])
        same_language = language[pools] == query_language[:, None]
        same_digit = digit[pools] == query_digit[:, None]
        return queries, demonstrations[pools], same_language, same_digit

    def pointers(self, first, last, group=4):
        """Pointers [N, G, 2] whose first pick is good as `first` says and last as `last` does."""
        pointers = np.full((len(first), group, 2), -1, np.int32)
        for row in range(len(first)):
            for column in range(group):
                goods = np.flatnonzero(last[row])
                goal = self.rng.choice(goods) if len(goods) else -1
                others = np.setdiff1d(np.flatnonzero(first[row]), [goal])
                if goal >= 0 and len(others):
                    pointers[row, column] = self.rng.choice(others), goal
        return pointers


STEPS = 120


class Learner:
    """A selector of default size with its supervised step, compiled once for all tests."""

    def __init__(self):
        self.init, self.policy = make_selector(SelectorConfig(), PARTS, DIMENSION)
        self.init = jax.jit(self.init)
        self.optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS))
        self.step = jax.jit(self._step)
        self.greedy = jax.jit(jax.vmap(self._greedy, in_axes=(None, 0, 0)))

    def _loss(self, params, queries, pools, pointers):
        def one_query(query, embeddings, pointers):
            pool = CandidatePool(embeddings, jnp.ones(POOL, bool))
            return sequence_log_probs(self.policy, params, query, pool, pointers)[0]

        log_probs = jax.vmap(one_query)(queries, pools, pointers)
        where = pointers[..., 0] >= 0
        return -jnp.sum(jnp.where(where, log_probs, 0.0)) / jnp.sum(where)

    def _step(self, params, state, *rows):
        gradient = jax.grad(self._loss)(params, *rows)
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def _greedy(self, params, query, embeddings):
        pool = CandidatePool(embeddings, jnp.ones(POOL, bool))
        encoding = self.policy.encode(params, query, pool)
        rollouts = beam_search(self.policy, params, encoding, pool.mask, num=1, shots=2)
        return rollouts.pointers[0]

    def train(self, seed, world, queries, pools, pointers, batch=32):
        params = self.init(jax.random.key(seed))
        state = self.optimizer.init(params)
        for _ in range(STEPS):
            rows = world.rng.choice(len(queries), batch, replace=False)
            params, state = self.step(params, state, queries[rows], pools[rows], pointers[rows])
        return params


@pytest.fixture(scope="module")
def learner():
    return Learner()


def accuracy(picks, good, feasible):
    return good[np.arange(len(picks)), picks][feasible].mean()


def test_learns_which_language_goes_with_the_colour(learner):
    world = World(seed=0)
    queries, pools, language, _ = world.queries(600)
    pointers = world.pointers(first=language, last=language)
    params = learner.train(0, world, queries, pools, pointers)
    queries, pools, language, _ = world.queries(200)
    picks = np.asarray(learner.greedy(params, queries, pools))
    feasible = language.sum(-1) >= 2
    assert accuracy(picks[:, 0], language, feasible) >= 0.9
    assert accuracy(picks[:, 1], language, feasible) >= 0.9


def test_learns_that_the_picks_have_different_parts_to_play(learner):
    world = World(seed=1)
    queries, pools, language, digit = world.queries(600)
    pointers = world.pointers(first=digit, last=language)
    params = learner.train(1, world, queries, pools, pointers)
    queries, pools, language, digit = world.queries(200)
    picks = np.asarray(learner.greedy(params, queries, pools))
    feasible = language.any(-1) & digit.any(-1) & ((language | digit).sum(-1) >= 2)
    assert accuracy(picks[:, 0], digit, feasible) >= 0.9
    assert accuracy(picks[:, 1], language, feasible) >= 0.9


def test_untrained_is_close_to_uniform_but_not_symmetric(learner):
    queries, pools, _, _ = World(seed=2).queries(16)
    params, policy = learner.init(jax.random.key(0)), learner.policy

    @jax.jit
    @jax.vmap
    def first_picks(query, embeddings):
        pool = CandidatePool(embeddings, jnp.ones(POOL, bool))
        encoding = policy.encode(params, query, pool)
        state = policy.start(params, encoding)
        return step_log_probs(policy, params, encoding, state, pool.mask)

    log_probs = first_picks(queries, pools)  # [16, K]
    assert jnp.min(masked_entropy(log_probs)) > math.log(POOL) - 0.2
    assert jnp.min(jnp.std(log_probs, axis=-1)) > 0.01


def test_the_state_remembers_the_picks_and_their_order(selector, batch):
    policy, params = selector
    query, pool = jax.tree.map(lambda x: x[0], batch)
    pointers = jnp.array([[0, 1, 2], [1, 0, 2], [3, 1, 2]])
    read = jax.jit(lambda: sequence_log_probs(policy, params, query, pool, pointers))
    _, steps = read()
    odds = steps[:, 2, 4] - steps[:, 2, 5]  # of two candidates that none of them has picked
    assert len(np.unique(np.round(np.asarray(odds), 6))) == 3


def test_a_pool_of_equals_is_uniform(selector):
    policy, params = selector
    pointers = jnp.array([[0, 1], [1, 0]])
    read = jax.jit(lambda query, pool: sequence_log_probs(policy, params, query, pool, pointers)[0])
    for embedding in (jnp.zeros(12), 7.3 * jnp.ones(12)):
        pool = CandidatePool(jnp.tile(embedding, (2, 1)), jnp.ones(2, bool))
        log_probs = read(embedding.at[8:].set(0.0), pool)
        np.testing.assert_allclose(log_probs, math.log(0.5), atol=1e-3)


def test_scale_of_a_part_does_not_matter(selector, batch):
    policy, params = selector
    query, pool = jax.tree.map(lambda x: x[0], batch)
    pointers = jnp.array([[0, 1], [4, 2]])
    read = jax.jit(lambda query, pool: sequence_log_probs(policy, params, query, pool, pointers)[0])
    scale = jnp.repeat(jnp.array([100.0, 0.01, 1.0]), 4)
    scaled = pool._replace(embeddings=pool.embeddings * scale)
    np.testing.assert_allclose(read(query, pool), read(query * scale, scaled), rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width=0; give 1 or more"),
        ({"heads": 3}, "--width=64 is not a multiple of --heads=3; try --width=66"),
        ({"layers": -1}, "layers=-1; give 0 or more"),
    ],
)
def test_config_that_cannot_be_built(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SelectorConfig(), **change)


@pytest.mark.parametrize("parts", [{}, {"image": (0, 20)}, {"image": (4, 4)}, {"image": (-1, 4)}])
def test_parts_that_do_not_fit(parts):
    with pytest.raises(InputError, match="give"):
        make_selector(SelectorConfig(), parts, 12)
