"""Hard prompts, bad machines and bugs are told apart, and each costs no more than it must."""

import os
import signal
import time

import numpy as np
import pytest
from ctrl_c import at_work, press
from faults.injection import hashed

from qwen_bridge import jobs, judgement, supervision
from qwen_bridge.channel import Channel, PeerGone
from qwen_bridge.errors import ScorerError, WorkerError
from qwen_bridge.messages import Settings
from qwen_bridge.worker_process import WorkerProcess

RNG = np.random.default_rng(1)
QUERIES = np.repeat(np.arange(100, 120), 8)
POINTERS = RNG.integers(0, 1000, (len(QUERIES), 2))


def check(scores, failed=()):
    """Everything is scored but the failed rows, which have a reason and no number."""
    assert sorted(scores.reasons) == sorted(failed)
    fine = np.setdiff1d(np.arange(len(QUERIES)), failed)
    expected = hashed(QUERIES, *POINTERS.T)
    np.testing.assert_array_equal(scores.gt_prob[fine], expected[fine])
    assert np.isnan(scores.gt_prob[list(failed)]).all()


def rows_of(*queries):
    return np.flatnonzero(np.isin(QUERIES, queries)).tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_query_that_raises_is_given_up_and_the_rest_is_scored(environment, workers):
    faults = [{"fault": "raise", "query": 107}, {"fault": "raise", "query": 113}]
    env = environment({"faults": faults}, workers=workers)
    scores = env.score(QUERIES, POINTERS, batch_size=32)
    check(scores, rows_of(107, 113))
    assert set(scores.reasons.values()) == {"ZeroDivisionError: a bug in the scorer"}
    assert env.stats["restarts"] == 0
    assert env.stats["prompts_given_up"] == 16


def test_more_queries_that_raise_than_in_vain_are_given_up_if_results_come_between(environment):
    bad = np.arange(100, 118, 3)
    assert len(bad) > judgement.IN_VAIN
    env = environment({"faults": [{"fault": "raise", "query": int(query)} for query in bad]})
    for _ in range(2):
        scores = env.score(QUERIES[::8], POINTERS[::8], batch_size=1)
        assert sorted(scores.reasons) == np.flatnonzero(np.isin(QUERIES[::8], bad)).tolist()


def test_a_bug_ends_the_run_and_nothing_is_recorded(environment):
    env = environment({"faults": [{"fault": "raise"}]}, workers=2)
    landed = []
    message = f"score failed for {judgement.IN_VAIN + 1} queries in a row.*ZeroDivisionError"
    with pytest.raises(ScorerError, match=message) as caught:
        env.score(QUERIES, POINTERS, batch_size=32, on_batch=lambda *args: landed.append(args))
    assert "injection.py" in caught.value.__notes__[0]
    assert landed == []
    assert env.stats["restarts"] == 0
    with pytest.raises(ScorerError):  # No result came, so a single prompt is not to blame either.
        env.score(QUERIES[:1], POINTERS[:1])


def test_an_error_while_a_batch_is_sent_ends_the_call_at_once(environment, monkeypatch):
    env = environment({}, backoff_s=30.0)

    def gone(*args):
        raise PeerGone("it ended")

    def patience():
        raise AssertionError("it waits")

    monkeypatch.setattr(jobs, "KILLS", 1)
    monkeypatch.setattr(WorkerProcess, "send", gone)
    monkeypatch.setattr(env._scheduler, "_patience", patience)
    with pytest.raises(WorkerError, match="query id 5 could not be embedded"):
        env.embed("query", np.array([5]))


def test_workers_that_end_on_everything_end_the_run_and_nothing_is_recorded(environment):
    env = environment({"faults": [{"fault": "crash_before"}]})
    landed = []
    with pytest.raises(WorkerError, match=r"queries in a row, the last with worker died .*code 3"):
        env.score(
            QUERIES[::8], POINTERS[::8], batch_size=1, on_batch=lambda *args: landed.append(args)
        )
    assert landed == []


def test_a_few_prompts_that_fail_alone_are_given_up_all_the_same(environment):
    env = environment({"faults": [{"fault": "raise"}]})
    scores = env.score(QUERIES[:3], POINTERS[:3])
    assert sorted(scores.reasons) == [0, 1, 2]


def test_a_query_that_kills_does_not_count_against_the_workers(environment):
    """Eight prompts end more workers than `max_restarts` in a row, and are the ones to blame."""
    env = environment({"faults": [{"fault": "crash_during", "query": 107}]}, max_restarts=3)
    scores = env.score(QUERIES, POINTERS, batch_size=32)
    check(scores, rows_of(107))
    assert env.stats["restarts"] > 8
    assert env.stats["workers_closed"] == 0


def test_killers_here_and_there_on_several_workers(environment):
    faults = [{"fault": "crash_during", "query": query} for query in (101, 105, 109, 113, 117)]
    env = environment({"faults": faults}, workers=3, max_restarts=4)
    queries, keep = QUERIES.copy(), rows_of(101, 105, 109, 113, 117)[::8]
    queries[np.setdiff1d(rows_of(101, 105, 109, 113, 117), keep)] = 100
    scores = env.score(queries, POINTERS, batch_size=64)
    assert sorted(scores.reasons) == keep
    assert env.stats["prompts_given_up"] == 5
    assert env.stats["workers_closed"] == 0


def test_a_place_where_every_worker_ends_is_closed_and_blames_no_prompt(environment):
    faults = [{"fault": "crash_before", "worker": 0}]
    env = environment({"faults": faults, "delay_s": 0.05}, workers=2, max_restarts=2)
    for _ in range(3):
        check(env.score(QUERIES, POINTERS, batch_size=4))
    assert env.stats["prompts_given_up"] == 0
    assert env.stats["workers_closed"] == 1
    assert env.stats["restarts"] == 2
    assert env._scheduler.seats[0].closed


def test_a_place_that_fails_on_what_gave_a_result_is_closed(environment, tmp_path):
    """Two of its workers end, and the next ones raise an exception on the control."""
    ends = [{"fault": "crash_before", "worker": 0, "once": str(tmp_path / str(i))} for i in (1, 2)]
    faults = [*ends, {"fault": "raise", "worker": 0}]
    env = environment({"faults": faults, "delay_s": 0.05}, workers=2, max_restarts=3)
    for _ in range(4):
        check(env.score(QUERIES, POINTERS, batch_size=4))
    assert [seat.closed for seat in env._scheduler.seats] == [True, False]
    assert (env.stats["prompts_given_up"], env.stats["restarts"]) == (0, 3)


def test_the_last_place_is_not_closed_but_ends_the_call(environment, monkeypatch):
    monkeypatch.setattr(jobs, "KILLS", 100)  # No batch is convicted.
    faults = [{"fault": "crash_before"}]
    env = environment({"faults": faults}, workers=2, max_restarts=1)
    for _ in range(2):
        with pytest.raises(WorkerError, match="workers in a row ended without one result"):
            env.score(QUERIES, POINTERS, batch_size=32)
    assert sum(seat.closed for seat in env._scheduler.seats) == 1


def test_a_lost_gpu_is_the_end_of_the_worker_and_not_of_the_prompt(environment, tmp_path):
    """After such an error of CUDA a process can do nothing more."""
    faults = [{"fault": "lost_device", "query": 103, "once": str(tmp_path / "struck")}]
    env = environment({"faults": faults})
    check(env.score(QUERIES, POINTERS, batch_size=32))
    assert env.stats["restarts"] == 1


def test_a_process_that_cannot_be_had_now_is_asked_for_again(environment, tmp_path, monkeypatch):
    faults = [{"fault": "crash_before", "query": 103, "once": str(tmp_path / "struck")}]
    env = environment({"faults": faults})
    start, refused = WorkerProcess._start, []

    def refuse_twice(*args):
        if len(refused) < 2:
            refused.append(1)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(*args)

    monkeypatch.setattr(WorkerProcess, "_start", refuse_twice)
    check(env.score(QUERIES, POINTERS, batch_size=32))
    assert len(refused) == 2
    assert env.stats["restarts"] == 3


@pytest.mark.parametrize(("owner", "name"), [(Channel, "pair"), (WorkerProcess, "_start")])
def test_a_failed_start_leaves_nothing(nothing_left, monkeypatch, owner, name):
    def refuse(*args):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(OSError, match="Too many open files"):
        WorkerProcess(Settings("trivial_scorer:build", {}, 2, 4096), {})


@pytest.mark.parametrize("in_callback", [False, True])
def test_ctrl_c_lets_the_batches_in_hand_land(environment, in_callback):
    env = environment({"delay_s": 0.4}, workers=2)
    landed = []

    def on_batch(rows, batch):
        if in_callback and not landed:
            os.kill(os.getpid(), signal.SIGINT)
        landed.extend(rows.tolist())

    env.score(QUERIES[:8], POINTERS[:8])  # Both workers are up.
    if not in_callback:
        press(at_work(env))
    with pytest.raises(KeyboardInterrupt):
        env.score(QUERIES, POINTERS, on_batch=on_batch, batch_size=8)
    # Those that the two workers were at; in the callback's case also the one that called it.
    assert 16 <= len(landed) <= 32
    assert len(landed) == len(set(landed))
    check(env.score(QUERIES, POINTERS, on_batch=on_batch))
    assert [seat.worker.slots.num_free for seat in env._scheduler.seats] == [4, 4]
    assert env.stats["restarts"] == 0


def test_a_second_ctrl_c_stops_at_once(environment, caplog):
    env = environment({"faults": [{"fault": "hang"}]})
    press(at_work(env), lambda: "finishing the" in caplog.text)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        env.score(QUERIES, POINTERS, on_batch=lambda *_: None)
    assert "finishing the" in caplog.text
    assert time.monotonic() - started < 30.0  # It would hang for the deadline, 600 s.


def test_ctrl_c_during_restarts_does_not_wait_for_them(environment, monkeypatch):
    monkeypatch.setattr(supervision, "_LONGEST_BACKOFF_S", 60.0)
    env = environment({"faults": [{"fault": "crash_before"}]}, backoff_s=60.0)
    times = press(lambda: env._scheduler.seats[0].worker is None)
    with pytest.raises(KeyboardInterrupt):
        env.score(QUERIES, POINTERS, on_batch=lambda *_: None)
    assert time.monotonic() - times[0] < 20.0
    assert env._scheduler.seats[0].worker is None
