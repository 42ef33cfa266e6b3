"""Every way of picking, against full enumeration of the pointers."""

import contextlib
import functools
import itertools
import zlib

import jax
import numpy as np
import pytest
from fake import FakeEnvironment, key, worth
from progress import no_bar

from lever_jax.decoding import DECODINGS, answer_best, decode, is_oracle, other_orders
from lever_jax.policy import sequence_log_probs
from lever_jax.scoring import ScoringService
from lever_jax.store import Store

ROWS = np.arange(12)
POINTERS = np.array(list(itertools.permutations(range(8), 2)), np.int32)  # all 56 of them


class UnsureEnvironment(FakeEnvironment):
    """The fake VLM with a confidence that has nothing to do with being right."""

    def _score_batch(self, queries, pointers):
        result = super()._score_batch(queries, pointers)
        result.confidence = self._confidence(queries, pointers)
        return result

    def _answer_batch(self, queries, pointers):
        result = super()._answer_batch(queries, pointers)
        result.confidence = self._confidence(queries, pointers)
        return result

    @staticmethod
    def _confidence(queries, pointers):
        return np.array([confidence(q, p) for q, p in zip(queries, pointers)], np.float32)


def confidence(query, pointer):
    """A number in [0, 1] that follows from the prompt."""
    return zlib.crc32(repr(key(query, pointer)).encode()) / 2**32


@pytest.fixture
def make_service(tmp_path):
    """Makes services over other VLMs, each with a store of its own."""
    with contextlib.ExitStack() as stack:

        def make(environment):
            path = tmp_path / f"{type(environment).__name__}.sqlite"
            store = stack.enter_context(Store.open(path, {"model": "fake"}))
            return ScoringService(store, environment, no_bar)

        yield make


def decoded(world, *decodings, service=None, shots=2, width=3, shuffles=3):
    return decode(
        "selector_rce",
        world.params,
        decodings,
        world.queries,
        world.proposer,
        service or world.service,
        shots=shots,
        accuracy="accuracy",
        beam_width=width,
        rerank_width=width,
        shuffles=shuffles,
        seed=0,
    )


@functools.cache
def ranked(world):
    """All pointers of each query [Q, 56, 2], most probable first, and their log-probabilities."""

    @jax.jit
    def every(table):
        def one(query, pool):
            return sequence_log_probs(world.policy, world.params, query, pool, POINTERS)[0]

        return jax.vmap(one)(*table.read(ROWS))

    log_probs = np.asarray(every(world.queries.table))
    order = np.argsort(-log_probs, axis=1, kind="stable")
    return POINTERS[order], np.take_along_axis(log_probs, order, axis=1)


def test_a_wide_beam_finds_the_most_probable_pointer(world):
    (found,) = decoded(world, "beam", width=56)["selector_rce_beam"]
    best, log_probs = ranked(world)
    assert (log_probs[:, 0] - log_probs[:, 1] > 1e-6).all()  # no ties: the arg-max is one pointer
    assert (found.pointers == best[:, 0]).all()


def test_greedy_takes_the_most_probable_candidate_at_each_shot(world):
    (found,) = decoded(world, "greedy")["selector_rce"]
    for picked, pointers, log_probs in zip(found.pointers, *ranked(world)):
        first = np.bincount(pointers[:, 0], np.exp(log_probs))  # marginal of the first shot
        assert picked[0] == np.argmax(first)
        then = pointers[pointers[:, 0] == picked[0]]  # most probable first
        assert picked.tolist() == then[0].tolist()


@pytest.mark.parametrize("width", [3, 56])
def test_reranks_take_the_best_of_the_most_probable(world, make_service, width):
    service = make_service(UnsureEnvironment())
    found = decoded(world, "rerank", "oracle_rerank", service=service, width=width)
    if width == 56:
        candidates = ranked(world)[0]
    else:
        candidates = world.proposer.beam(world.params, ROWS, shots=2, width=width).pointers
    for row, (query, pool) in enumerate(zip(world.queries.query_ids, world.queries.pool_ids)):
        prompts = [tuple(pool[p]) for p in candidates[row]]
        sure = max(prompts, key=lambda prompt: confidence(query, prompt))
        assert found["selector_rce_rerank"][0].records[row].pointer == sure
        # Of equally right ones, the most probable.
        right = max(prompts, key=lambda prompt: worth(query, prompt) >= 0.6)
        assert found["selector_rce_oracle_rerank"][0].records[row].pointer == right


def test_the_deployable_rerank_reads_no_ground_truth(world, make_service):
    class Blind(UnsureEnvironment):
        """Judges every answer wrong."""

        def _judge(self, result):
            for name in ("accuracy", "accuracy_official"):
                setattr(result, name, np.where(np.isnan(result.accuracy), np.nan, 0.0))
            return result

        def _score_batch(self, queries, pointers):
            return self._judge(super()._score_batch(queries, pointers))

        def _answer_batch(self, queries, pointers):
            return self._judge(super()._answer_batch(queries, pointers))

    picks = [
        decoded(world, "rerank", service=make_service(vlm))["selector_rce_rerank"][0].pointers
        for vlm in (UnsureEnvironment(), Blind())
    ]
    assert (picks[0] == picks[1]).all()


def test_a_rerank_takes_what_could_be_answered(world, make_service):
    beams = world.proposer.beam(world.params, ROWS, shots=2, width=3).pointers
    pools = zip(world.queries.query_ids, world.queries.pool_ids, beams)
    broken = {key(query, pool[pointers[0]]) for query, pool, pointers in pools}

    class Failing(FakeEnvironment):
        """Fails on the most probable prompt of each query."""

        def _score_batch(self, queries, pointers):
            result = super()._score_batch(queries, pointers)
            keys = [key(q, p) for q, p in zip(queries, pointers)]
            result.reasons = {i: "broken" for i, k in enumerate(keys) if k in broken}
            return result

    service = make_service(Failing())
    (reranked,) = decoded(world, "rerank", service=service)["selector_rce_rerank"]
    assert all(record.eval_failed is None for record in reranked.records)
    assert (reranked.pointers != beams[:, 0]).any(axis=1).all()


def test_a_query_without_candidates_fails_and_says_so(world):
    candidates = [POINTERS[:3]] * 11 + [POINTERS[:0]]
    found = answer_best(world.queries, candidates, world.service, by="accuracy", label="test")
    assert found.records[11].eval_failed == "no prompt of its pool could be scored"
    assert found.pointers[11].tolist() == [-1, -1]
    assert [record.query_id for record in found.records] == world.queries.query_ids.tolist()
    assert all(record.eval_failed is None for record in found.records[:11])


@pytest.mark.parametrize("shots", [2, 3, 4])
def test_other_orders_are_other_orders_of_the_same(world, shots):
    greedy = np.argsort(np.random.default_rng().random((12, 8)), axis=1)[:, :shots]
    ids = world.queries.query_ids
    orders = other_orders(greedy, ids, draws=3, seed=0)
    assert len(orders) == (1 if shots == 2 else 3)  # two demonstrations have one other order
    for order in orders:
        assert (np.sort(order) == np.sort(greedy)).all()
        assert (order != greedy).any(axis=1).all()
    # A query's order does not depend on the batch.
    part = other_orders(greedy[5:7], ids[5:7], draws=3, seed=0)
    assert all((a == b[5:7]).all() for a, b in zip(part, orders))


def test_orders_are_uniform_over_those_that_are_not_the_given_one():
    pointers = np.tile(np.arange(3, dtype=np.int32), (3000, 1))
    (orders,) = other_orders(pointers, np.arange(3000), draws=1, seed=0)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 5
    # Binomial of 3,000 at 1/5: four standard deviations are 88.
    assert np.abs(counts - 600).max() < 88


def test_one_demonstration_has_one_order():
    pointers = np.arange(5, dtype=np.int32)[:, None]
    (order,) = other_orders(pointers, np.arange(5), draws=3, seed=0)
    assert (order == pointers).all()


def test_oracles_are_those_that_read_the_ground_truth(world):
    names = {name: is_oracle(name) for name in decoded(world, *DECODINGS)}
    assert [name for name, oracle in names.items() if oracle] == ["selector_rce_oracle_rerank"]
    assert len(names) == len(DECODINGS)
    assert is_oracle("oracle_in_pool")
    assert not is_oracle("mmr")
