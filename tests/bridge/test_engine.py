"""Workers that come late, find no place or are not the same; with simulated ones, in no time."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.simulated_workers import SimulatedWorker, VirtualEngine
from qwen_bridge import jobs
from qwen_bridge.channel import PeerGone
from qwen_bridge.client import Environment
from qwen_bridge.errors import WorkerError
from qwen_bridge.jobs import KILLS
from qwen_bridge.messages import Failure, Hello, Result, encode
from qwen_bridge.protocol import empty_score

QUERIES = np.repeat(np.arange(40), 8)
POINTERS = np.random.default_rng(7).integers(0, 1000, (len(QUERIES), 2))


class Elastic(VirtualEngine):
    """One place at first; `joins` says how many there are from which virtual second on.

    Workers in `placeless` places never run; those in `unlike` ones have another hello, those in
    `broken` ones end at their first request, and all end at a request that holds one of `killers`.
    Those in `raising` places, and all at one of `bugs`, answer with an exception at once. `ended`
    has place and job of each end.
    """

    elastic = True

    def __init__(
        self,
        joins=(),
        placeless=(),
        unlike=(),
        broken=(),
        killers=(),
        raising=(),
        bugs=(),
        places=1,
    ):
        super().__init__(places, 1.0, self.score)
        self.raising, self.bugs = raising, np.array(bugs, int)
        self.joins, self.placeless, self.unlike, self.broken = joins, placeless, unlike, broken
        self.killers, self.served, self.ended = np.array(killers, int), {}, []

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
        queries = np.frombuffer(self.arena.view(message.slot)[: 8 * message.rows], "<i8")
        killed = np.isin(queries, self._engine.killers).any()
        if self.index in self._engine.broken or killed or self.dies_at < math.inf:
            started = max(self._engine.now(), self._free_at)
            self.dies_at = min(self.dies_at, started + 0.01)
            self._engine.schedule(self, self.dies_at)
            return
        if self.index in self._engine.raising or np.isin(queries, self._engine.bugs).any():
            self._free_at = max(self._engine.now(), self._free_at) + 0.1
            failure = Failure(message.job, "ZeroDivisionError", "no such kernel", False, "")
            self._replies.append((self._free_at, encode(failure)))
            self._engine.schedule(self, self._free_at)
            return
        served = self._engine.served
        served[self.index] = served.get(self.index, 0) + message.rows
        super().send(message)

    def receive_ready(self):
        messages = super().receive_ready()
        if not messages and self.dies_at <= self._engine.now():
            if self.in_flight:
                self._engine.ended.append((self.index, self.in_flight[0][0].number))
            raise PeerGone("it ended")
        return messages


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


def test_pauses_before_restarts_double_up_to_five_seconds(monkeypatch):
    monkeypatch.setattr(jobs, "KILLS", 100)  # No batch is convicted, which would begin anew.
    engine, starts = Elastic(broken={0}), []
    start = engine.start
    monkeypatch.setattr(engine, "start", lambda *a: starts.append(engine.now()) or start(*a))
    ends = pytest.raises(WorkerError, match="7 workers in a row ended without one result")
    with Environment({}, engine=engine, backoff_s=1.0, max_restarts=6) as env, ends:
        env.score([1], [[2]])
    np.testing.assert_allclose(np.diff(starts), [1, 2, 4, 5, 5, 5], atol=0.3)


def test_a_worker_that_had_nothing_to_do_has_its_whole_deadline():
    """Between two calls, and within one while the driver is busy with something else."""
    engine = Elastic(places=2)
    queries = QUERIES[:40]

    def busy(rows, batch):
        engine._added += 50.0

    with Environment({}, engine=engine, deadline_s=20.0) as env:
        for on_batch in (None, busy, None):
            scores = env.score(queries, POINTERS[:40], on_batch, batch_size=8)
            np.testing.assert_allclose(scores.gt_prob, queries / 100, atol=1e-6)
            engine._added += 1000.0
        assert env.stats["restarts"] == 0


class Confused(Elastic):
    """What its only worker says of its fifth request is put in other words by `change`."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def start(self, index, settings):
        return ConfusedWorker(self, settings, index)


class ConfusedWorker(ElasticWorker):
    """Confused once."""

    def receive_ready(self):
        messages = super().receive_ready()
        for place, message in enumerate(messages):
            if isinstance(message, Result) and message.job == 4 and self._engine.change:
                messages[place], self._engine.change = self._engine.change(message), None
        return messages


@pytest.mark.parametrize(
    "change",
    [
        lambda result: replace(result, job=5),
        lambda result: replace(result, slot=result.slot ^ 1),
        lambda result: replace(result, rows=result.rows - 1, texts=result.texts[1:]),
        lambda result: Failure(5, "ZeroDivisionError", "of another request", False, ""),
        lambda result: Hello({"embedding_dim": 1, "parts": {}, "model": "simulated"}),
    ],
    ids=["job", "slot", "rows", "failure", "hello"],
)
def test_a_reply_to_something_else_is_nonsense(change, caplog):
    engine = Confused(change)
    with Environment({}, engine=engine, backoff_s=0.001) as env:
        scores = env.score(QUERIES, POINTERS, batch_size=8)
        np.testing.assert_allclose(scores.gt_prob, QUERIES / 100, atol=1e-6)
        assert engine.change is None
        assert (env.stats["restarts"], env.stats["prompts_given_up"]) == (1, 0)
    assert "answered nonsense" in caplog.text


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize(("places", "broken"), [(2, {0}), (2, {1}), (3, {0, 2})])
def test_broken_places_are_closed_and_convict_no_batch(places, broken, size):
    """They must not take back the batches that the busy one is to try."""
    engine = Elastic(places=places, broken=broken)
    queries, pointers = QUERIES[: 6 * size], POINTERS[: 6 * size]
    with Environment({}, engine=engine, backoff_s=0.001) as env:
        for _ in range(40):
            scores = env.score(queries, pointers, batch_size=size)
            assert not scores.reasons
            np.testing.assert_allclose(scores.gt_prob, queries / 100, atol=1e-6)
        assert len(set(engine.ended)) == len(engine.ended)  # No batch twice in one of them.
        assert {seat.index for seat in env._scheduler.seats if seat.closed} == broken
        assert env.stats["restarts"] == 16 * len(broken)


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize(
    ("places", "broken"), [(1, set()), (2, set()), (2, {0}), (2, {1}), (3, {1}), (3, {0, 2})]
)
def test_broken_places_beside_prompts_that_kill(places, broken, size):
    """Neither is forgiven for the other, wherever the prompts are, the end of the call included."""
    rng = np.random.default_rng(size)
    queries = np.arange(1500)
    killers = np.concatenate([rng.choice(1400, 9, replace=False), np.arange(1494, 1500)])
    engine = Elastic(places=places, broken=broken, killers=killers)
    with Environment({}, engine=engine, backoff_s=0.001) as env:
        keys = queries // size
        scores = env.score(queries, queries[:, None], None, batch_size=size, affinity=keys)
        assert sorted(scores.reasons) == sorted(killers)
        fine = np.setdiff1d(queries, killers)
        np.testing.assert_allclose(scores.gt_prob[fine], fine / 100, rtol=1e-6)
        assert {seat.index for seat in env._scheduler.seats if seat.closed} == broken


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize(("places", "raising"), [(2, {0}), (2, {1}), (3, {1}), (3, {0, 2})])
def test_places_that_raise_on_everything_blame_no_prompt(places, raising, size):
    """What fails there is tried elsewhere, and then they fail on what gave a result there."""
    engine = Elastic(places=places, raising=raising, bugs=[7, 21, 33])
    with Environment({}, engine=engine, backoff_s=0.001) as env:
        for _ in range(2):
            scores = env.score(QUERIES, POINTERS, batch_size=size)
            wrong = np.isin(QUERIES, engine.bugs)
            assert sorted(scores.reasons) == np.flatnonzero(wrong).tolist()
            np.testing.assert_allclose(scores.gt_prob[~wrong], QUERIES[~wrong] / 100, atol=1e-6)
        closed = {seat.index for seat in env._scheduler.seats if seat.closed}
        assert closed <= set(raising)


def test_a_whole_query_that_kills_closes_no_sound_place():
    """Its 32 prompts each end two workers before they come to trial."""
    queries = np.repeat(np.arange(60), 32)
    killers = [7, 21, 33, 48]
    engine = Elastic(places=2, killers=killers)
    with Environment({}, engine=engine, backoff_s=0.001, max_restarts=4) as env:
        scores = env.score(queries, np.arange(len(queries))[:, None], batch_size=1)
        assert sorted(scores.reasons) == np.flatnonzero(np.isin(queries, killers)).tolist()
        assert env.stats["workers_closed"] == 0


@pytest.mark.parametrize("places", [1, 2])
def test_a_call_of_nothing_but_killers_ends_with_their_reasons(places):
    """Each ends three workers and no result comes between, but the prompts are the reason."""
    engine = Elastic(places=places, killers=[1, 2, 3])
    with Environment({}, engine=engine, backoff_s=0.001, max_restarts=3) as env:
        scores = env.score(np.array([1, 2, 3]), np.array([[1]] * 3), batch_size=1)
        assert sorted(scores.reasons) == [0, 1, 2]
        assert env.stats["workers_closed"] == 0
        assert len(engine.ended) == 3 * KILLS


def test_killers_that_are_convicted_side_by_side_are_believed():
    """More than `IN_VAIN` of them and no result between; but each ended a worker that had one."""
    queries = np.arange(64)
    killers = queries[-16:]
    engine = Elastic(places=16, killers=killers)
    with Environment({}, engine=engine, backoff_s=0.001) as env:
        scores = env.score(queries, queries[:, None], batch_size=1)
        assert sorted(scores.reasons) == killers.tolist()
        assert env.stats["prompts_given_up"] == len(killers)


def test_a_place_that_breaks_for_good_ends_the_call_and_blames_no_prompt():
    """Its workers end on what gave a result before."""
    engine = Elastic()
    landed = []

    def on_batch(rows, _):
        landed.extend(rows)
        if len(landed) == 80:
            engine.broken = {0}

    with Environment({}, engine=engine, backoff_s=0.001) as env:
        with pytest.raises(WorkerError, match="17 workers in a row ended without one result"):
            env.score(QUERIES, POINTERS, on_batch, batch_size=8)
        assert env.stats["prompts_given_up"] == 0
