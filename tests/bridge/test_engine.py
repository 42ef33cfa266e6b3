"""Workers that come late, find no place or are not the same; with simulated ones, in no time."""

import logging
import math

import numpy as np
import pytest

from experiments.simulated_workers import SimulatedWorker, VirtualEngine
from qwen_bridge.channel import PeerGone
from qwen_bridge.client import Environment
from qwen_bridge.errors import WorkerError
from qwen_bridge.protocol import empty_score

QUERIES = np.repeat(np.arange(40), 8)
POINTERS = np.random.default_rng(7).integers(0, 1000, (len(QUERIES), 2))


class Elastic(VirtualEngine):
    """One place at first; `joins` says how many there are from which virtual second on.

    Workers in `placeless` places never run; those in `unlike` ones have another hello, and those
    in `broken` ones end at their first request.
    """

    elastic = True

    def __init__(self, joins=(), placeless=(), unlike=(), broken=(), places=1):
        super().__init__(places, 1.0, self.score)
        self.joins, self.placeless, self.unlike, self.broken = joins, placeless, unlike, broken
        self.served = {}

    def score(self, request, view):
        queries = np.frombuffer(view[: 8 * request.rows], "<i8")
        result = empty_score(request.rows, 1, {})
        result.gt_prob[:] = queries / 100
        result.answer_log_probs[:] = -1
        return result

    def places(self):
        return max([self._workers, *(n for when, n in self.joins if self.now() >= when)])

    def look_at(self):
        return min([when for when, _ in self.joins if when > self.now()], default=math.inf)

    def start(self, index, settings):
        return ElasticWorker(self, settings, index)


class ElasticWorker(SimulatedWorker):
    """A simulated worker that knows its place."""

    def __init__(self, engine, settings, index):
        self.index = index
        self.placed = index not in engine.placeless
        self.where = f" (on machine {index})"
        model = "other" if index in engine.unlike else "simulated"
        self.hello_fields = {"embedding_dim": 1, "parts": {}, "model": model}
        self.dies_at = math.inf
        super().__init__(engine, settings)
        if not self.placed:
            self._replies.clear()

    def send(self, message):
        if self.index in self._engine.broken:
            self.dies_at = min(self.dies_at, self._engine.now() + 0.01)
            self._engine.schedule(self, self.dies_at)
            return
        served = self._engine.served
        served[self.index] = served.get(self.index, 0) + message.rows
        super().send(message)

    def receive_ready(self):
        if self.dies_at <= self._engine.now():
            raise PeerGone("it ended")
        return super().receive_ready()


def check(env, engine):
    landed = []
    scores = env.score(QUERIES, POINTERS, lambda rows, _: landed.extend(rows), batch_size=8)
    np.testing.assert_allclose(scores.gt_prob, QUERIES / 100, atol=1e-6)
    assert sorted(landed) == list(range(len(QUERIES)))
    assert sum(engine.served.values()) == len(QUERIES)


def test_workers_join_while_a_call_runs():
    engine = Elastic(joins=[(30.0, 2), (100.0, 4)])
    with Environment({}, engine=engine) as env:
        check(env, engine)
        assert sorted(engine.served) == [0, 1, 2, 3]
        assert len(env.stats["busy_s"]) == 4
        # 320 s of work: 30 s alone, 70 s by two, and the rest by four.
        assert 30 + 70 + (320 - 30 - 140) / 4 - 1 <= engine.now() <= 30 + 70 + 150 / 4 + 24
        assert env.stats["restarts"] == 0


def test_workers_without_a_place_wait_and_their_share_is_done_by_the_others():
    engine = Elastic(places=3, placeless={0, 2})
    with Environment({}, engine=engine, startup_s=5.0, deadline_s=20.0) as env:
        check(env, engine)
        assert sorted(engine.served) == [1]
        assert env.stats["restarts"] == 0


def test_no_place_anywhere_is_an_error_and_no_wait_for_ever():
    engine = Elastic(places=2, placeless={0, 1})
    with pytest.raises(WorkerError, match="no worker found a place within 5 s; 2 simulated work"):
        Environment({}, engine=engine, startup_s=5.0)
    assert 5.0 <= engine.now() < 6.0


def test_a_late_worker_that_is_not_the_same_is_refused_and_named(caplog):
    engine = Elastic(joins=[(20.0, 2)], unlike={1})
    with Environment({}, engine=engine, max_restarts=3) as env, caplog.at_level(logging.WARNING):
        check(env, engine)
        assert sorted(engine.served) == [0]
        assert env.stats["restarts"] == 3
        assert env.stats["workers_closed"] == 1
    assert "model was 'simulated' and is now 'other' (on machine 1)" in caplog.text


def test_workers_that_are_not_the_same_from_the_start_are_an_error():
    engine = Elastic(places=2, unlike={1})
    with pytest.raises(WorkerError, match=r"model was 'simulated' and is now 'other' \(on machine"):
        Environment({}, engine=engine)


def test_a_place_that_is_closed_during_the_start_is_not_waited_for():
    """Its worker says hello and ends before the other one is ready."""

    class Uneven(Elastic):
        elastic = False

        def start(self, index, settings):
            worker = super().start(index, settings)
            if index == 0:
                worker.dies_at = 0.5
            else:
                worker._replies[0] = (1.0, worker._replies[0][1])
            self.schedule(worker, 0.5 + 0.5 * index)
            return worker

    engine = Uneven(places=2)
    with Environment({}, engine=engine, max_restarts=0) as env:
        assert [seat.closed for seat in env._scheduler.seats] == [True, False]
        check(env, engine)
        assert sorted(engine.served) == [1]


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize(("places", "broken"), [(2, {0}), (2, {1}), (3, {0, 2})])
def test_broken_places_are_closed_and_convict_no_batch(places, broken, size):
    """They must not take back the batches that the busy one is to try."""
    engine = Elastic(places=places, broken=broken)
    queries, pointers = QUERIES[: 6 * size], POINTERS[: 6 * size]
    with Environment({}, engine=engine, backoff_s=0.001) as env:
        for call in range(1, 40):
            scores = env.score(queries, pointers, batch_size=size)
            assert not scores.reasons
            np.testing.assert_allclose(scores.gt_prob, queries / 100, atol=1e-6)
            # No batch twice in one of them.
            assert env.stats["restarts"] <= call * -(-len(queries) // size) * len(broken)
        assert {seat.index for seat in env._scheduler.seats if seat.closed} == broken
        assert env.stats["restarts"] == 16 * len(broken)
