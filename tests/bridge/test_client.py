"""The environment gives the same results whatever happens to its workers, and leaves nothing."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import trivial_scorer
from ctrl_c import at_work, press
from leaks import alive, children, descriptors

from qwen_bridge import jobs, supervision
from qwen_bridge.client import Environment
from qwen_bridge.errors import InputError, WorkerError
from qwen_bridge.protocol import JUDGED, ProtocolError

RNG = np.random.default_rng(0)
QUERIES = RNG.permutation(np.repeat(np.arange(100, 130), 5))
POINTERS = RNG.integers(0, 1000, (len(QUERIES), 2))
POINTERS[::7, 1] = -1
POINTERS[::21] = -1
EXPECTED = trivial_scorer.TrivialScorer({}).score(QUERIES, POINTERS)
EXPECTED_ANSWERS = trivial_scorer.TrivialScorer({}).answer(QUERIES, POINTERS)


def check(scores, *, failed=()):
    """The scores are those of an undisturbed scorer, but for the failed rows."""
    fine = np.setdiff1d(np.arange(len(QUERIES)), failed)
    assert sorted(scores.reasons) == sorted(failed)
    assert np.isnan(scores.gt_prob[list(failed)]).all()
    for name in ("gt_prob", "answer_log_probs", "certified", "margin", *JUDGED):
        np.testing.assert_array_equal(getattr(scores, name)[fine], getattr(EXPECTED, name)[fine])
    assert [scores.texts[row] for row in fine] == [EXPECTED.texts[row] for row in fine]


def test_hello_is_the_factorys_and_the_scorers(shared):
    assert shared.hello == {
        "model": "trivial",
        "threads": "3",
        "dataset": "sha",
        "embedding_dim": 6,
        "parts": {"image": (0, 2), "question": (2, 4), "answer": (4, 6)},
    }


def test_each_worker_may_be_on_a_device_of_its_own(shared):
    assert shared.devices == ["cpu, the worker 0", "cpu, the worker 1"]


def test_round_trips(shared):
    before = shared.stats
    check(shared.score(QUERIES, POINTERS, batch_size=32))
    answers = shared.answer(QUERIES.astype(np.int32), POINTERS.tolist(), batch_size=32)
    assert answers.texts == EXPECTED_ANSWERS.texts
    np.testing.assert_array_equal(answers.accuracy, EXPECTED_ANSWERS.accuracy)
    np.testing.assert_array_equal(answers.similarity, EXPECTED_ANSWERS.similarity)
    ids = np.arange(100)[::-1]
    embedded = shared.embed("bank", ids, batch_size=16)
    embeddings = embedded.embeddings
    np.testing.assert_array_equal(embeddings[:, 2], trivial_scorer.hashed(ids, ids * 0 + 2))
    assert (embeddings.dtype, embeddings.shape, embedded.reasons) == (np.float32, (100, 6), {})
    after = shared.stats
    grown = {name: after[name] - before[name] for name in before if name != "busy_s"}
    assert grown == {
        "requests": 5 + 5 + 7,
        "prompts_scored": 150,
        "prompts_answered": 150,
        "ids_embedded": 100,
        "prompts_given_up": 0,
        "restarts": 0,
        "workers_closed": 0,
    }


def test_nothing_to_do_and_zero_shot(shared):
    before = shared.stats["requests"]
    assert len(shared.score([], np.zeros((0, 2), np.int64))) == 0
    assert len(shared.answer([], np.zeros((0, 2)))) == 0
    assert shared.embed("query", []).embeddings.shape == (0, 6)
    assert shared.stats["requests"] == before
    none = shared.score([1, 2], np.zeros((2, 0), np.int64))
    np.testing.assert_array_equal(none.gt_prob, shared.score([1, 2], [[-1], [-1]]).gt_prob)


def test_batches_as_they_land(shared):
    seen, threads = [], set()

    def on_batch(rows, batch):
        assert len(rows) == len(batch) <= 8
        np.testing.assert_array_equal(batch.gt_prob, EXPECTED.gt_prob[rows])
        assert len(np.unique(QUERIES[rows])) == 1  # five prompts each: a second would not fit
        seen.extend(rows.tolist())
        threads.add(threading.get_ident())

    check(shared.score(QUERIES, POINTERS, on_batch=on_batch, batch_size=8))
    assert sorted(seen) == list(range(len(QUERIES)))
    assert threads == {threading.get_ident()}
    assert min(shared.stats["busy_s"]) > 0


def test_rows_with_a_reason_come_back_as_such(shared):
    queries = QUERIES.copy()
    queries[[3, 77]] = 1005, 1006
    scores = shared.score(queries, POINTERS, batch_size=16)
    check(scores, failed=[3, 77])
    assert scores.reasons == {3: "no image for 1005", 77: "no image for 1006"}
    answers = shared.answer(queries, POINTERS)
    assert np.flatnonzero(np.isnan(answers.accuracy)).tolist() == [3, 77]
    seen = {}
    embedded = shared.embed(
        "query",
        queries,
        lambda rows, batch: seen.update({int(rows[i]): why for i, why in batch.reasons.items()}),
        batch_size=16,
    )
    assert embedded.reasons == seen == scores.reasons
    assert not embedded.embeddings[[3, 77], :2].any()
    assert embedded.embeddings[:, 2:].all()
    assert np.delete(embedded.embeddings, [3, 77], axis=0).all()


def test_out_of_memory_shrinks_the_batch(shared):
    before = shared.stats["requests"]
    scores = shared.score([1004] * 16, [[3]] * 16, batch_size=16)
    assert scores.gt_prob.tolist() == [trivial_scorer.hashed([1004], [3])[0]] * 16
    assert shared.stats["requests"] - before == 1 + 2 + 4 + 8


def test_a_prompt_that_never_fits(shared):
    scores = shared.score([1, 1003, 3], [[7]] * 3)
    assert scores.reasons == {1: "MemoryError: the batch does not fit"}


def test_errors_of_the_scorer_reach_the_driver(shared):
    queries = np.arange(10, 40)
    with pytest.raises(InputError, match=r"^query 5 is not in the dataset; use ids"):
        shared.score([*queries, 1001], [[1]] * 31, batch_size=2)
    with pytest.raises(WorkerError, match="bank id 1002 could not be embedded: ZeroDiv") as caught:
        shared.embed("bank", [1002, *queries], batch_size=2)
    assert "injection.py" in caught.value.__notes__[0]
    check(shared.score(QUERIES, POINTERS, batch_size=4))


def test_replies_beside_an_error_are_not_lost(shared):
    """They wait in the socket together, and are read together."""
    queries = [7, 1001, 8, 9, 10, 11, 1001, 12]  # one worker from the left, one from the right
    with pytest.raises(InputError):
        shared.score(
            queries,
            [[1]] * 8,
            affinity=[0] * 8,
            batch_size=1,
            on_batch=lambda *_: time.sleep(0.2),
        )
    check(shared.score(QUERIES, POINTERS, batch_size=4))
    assert [seat.worker.slots.num_free for seat in shared._scheduler.seats] == [2, 2]


def test_what_on_batch_raises_ends_the_call_only(shared):
    def stop(rows, batch):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            shared.score(QUERIES, POINTERS, on_batch=stop, batch_size=4)
    check(shared.score(QUERIES, POINTERS))


def test_no_call_from_within_a_call(shared):
    with pytest.raises(RuntimeError, match="on_batch may not call"):
        shared.score([1], [[2]], on_batch=lambda *_: shared.embed("bank", [1]))
    assert len(shared.score([1], [[2]])) == 1


def test_malformed_requests_never_leave_the_driver(shared):
    before = shared.stats["requests"]
    with pytest.raises(ProtocolError, match="pads on the right"):
        shared.score([1], [[-1, 2]])
    with pytest.raises(ProtocolError, match="affinity"):
        shared.score([1], [[2]], affinity=[1.5])
    with pytest.raises(InputError, match="batch_size=0"):
        shared.score([1], [[2]], batch_size=0)
    with pytest.raises(InputError, match="kind 'banks'"):
        shared.embed("banks", [1])
    assert shared.stats["requests"] == before


def test_affinity_keeps_a_pool_together(shared):
    keys = QUERIES % 3
    batches = []
    scores = shared.score(
        QUERIES, POINTERS, affinity=keys, on_batch=lambda rows, _: batches.append(rows)
    )
    check(scores)
    assert sorted(tuple(np.unique(keys[rows])) for rows in batches) == [(0,), (1,), (2,)]


def test_batches_shrink_to_the_slot(environment):
    env = environment({"embedding_dim": 200}, slot_bytes=4096)
    embeddings = env.embed("query", np.arange(30), batch_size=64).embeddings
    np.testing.assert_array_equal(
        embeddings[:, 199], trivial_scorer.hashed(np.arange(30), np.full(30, 199))
    )
    assert env.stats["requests"] == 6  # five rows of 800 bytes fill a slot of 4096
    check(env.score(QUERIES, POINTERS))


def test_single_faults_change_nothing(environment, tmp_path):
    """Each strikes once: the batch is sent again, and nobody can tell from the results."""
    names = ("crash_before", "crash_during", "crash_after", "nan", "wrong_shape", "not_a_batch")
    faults = [
        {"fault": name, "query": 100 + 4 * number, "once": str(tmp_path / name)}
        for number, name in enumerate(names)
    ]
    env = environment({"faults": faults, "delay_s": 0.001}, workers=2)
    check(env.score(QUERIES, POINTERS, batch_size=16))
    # A worker may be replaced for one fault just as the next one strikes it.
    assert 1 <= env.stats["restarts"] <= len(names)
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert env.stats["prompts_given_up"] == 0


def test_nonsense_for_one_prompt(environment, monkeypatch):
    monkeypatch.setattr(jobs, "KILLS", 1)
    env = environment({"faults": [{"fault": "wrong_rows", "query": 500}]})
    scores = env.score([1, 500], [[3, 4]] * 2, batch_size=1)
    assert list(scores.reasons) == [1]
    assert "answered nonsense" in scores.reasons[1]
    assert env.stats["restarts"] == 1
    np.testing.assert_array_equal(scores.gt_prob[:1], trivial_scorer.hashed([1], [3], [4]))


def test_sigkill_at_random_moments(environment):
    env = environment({"delay_s": 0.01}, workers=2)
    rng = np.random.default_rng(7)
    once = []

    def on_batch(rows, batch):
        once.extend(rows.tolist())
        worker = env._scheduler.seats[rng.integers(2)].worker
        if worker and rng.random() < 0.2:
            time.sleep(rng.random() * 0.01)
            os.kill(worker.pid, signal.SIGKILL)

    check(env.score(QUERIES, POINTERS, on_batch=on_batch, batch_size=8))
    assert sorted(once) == list(range(len(QUERIES)))
    assert env.stats["restarts"] > 0


def test_a_prompt_that_always_kills(environment):
    faults = [{"fault": "crash_during", "query": 107}]
    env = environment({"faults": faults}, workers=2)
    queries, pointers = QUERIES.copy(), POINTERS.copy()
    queries[(queries == 107).nonzero()[0][1:]] = 999  # leave one prompt of that query
    scores = env.score(queries, pointers, batch_size=4)
    row = int(np.flatnonzero(queries == 107)[0])
    assert list(scores.reasons) == [row]
    assert "exit code 3" in scores.reasons[row]
    fine = np.arange(len(queries)) != row
    np.testing.assert_array_equal(
        scores.gt_prob[fine], trivial_scorer.hashed(queries, *pointers.T)[fine]
    )
    assert env.stats["prompts_given_up"] == 1


def test_a_killer_does_not_hide_among_the_embedded(environment, monkeypatch):
    monkeypatch.setattr(jobs, "KILLS", 1)
    env = environment({"faults": [{"fault": "crash_before", "query": 5}]})
    with pytest.raises(WorkerError, match="bank id 5 could not be embedded"):
        env.embed("bank", np.arange(8), batch_size=1)
    assert env.embed("bank", [1, 2]).embeddings.shape == (2, 6)


def test_hang(environment, tmp_path, capfd):
    faults = [{"fault": "hang", "request": 1, "once": str(tmp_path / "struck")}]
    env = environment({"faults": faults}, deadline_s=1.0)  # A busy machine takes some of it.
    check(env.score(QUERIES, POINTERS, batch_size=32))
    assert env.stats["restarts"] == 1
    assert "injection.py" in capfd.readouterr().err  # the stack of the hung worker


def test_a_slow_driver_is_not_a_hung_worker(environment):
    env = environment(deadline_s=1.0)
    pauses = iter([1.1, 0.3, 0.3, 0.3])  # One that is too long, and several that are so together.
    check(
        env.score(
            QUERIES, POINTERS, on_batch=lambda *_: time.sleep(next(pauses, 0.0)), batch_size=16
        )
    )
    assert next(pauses, None) is None
    assert env.stats["restarts"] == 0


def test_ctrl_c_reaches_the_driver_only(environment):
    env = environment({"delay_s": 0.2})
    press(at_work(env))
    with pytest.raises(KeyboardInterrupt):
        env.score(QUERIES, POINTERS, batch_size=8)
    os.kill(env._scheduler.seats[0].worker.pid, signal.SIGINT)
    assert len(env.score([1], [[2]])) == 1
    assert env.stats["restarts"] == 0


def test_interrupts_at_random_moments_lose_no_slot(environment):
    env = environment(workers=2, slots=3)
    rng = np.random.default_rng(3)
    interrupted = 0
    for _ in range(12):
        timer = threading.Timer(rng.random() * 0.1, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            env.score(QUERIES, POINTERS, batch_size=4)
            timer.join()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted
    check(env.score(QUERIES, POINTERS, batch_size=4))
    assert [seat.worker.slots.num_free for seat in env._scheduler.seats] == [3, 3]
    assert env.stats["restarts"] == 0


def test_workers_that_never_answer_end_the_call(environment):
    env = environment({"faults": [{"fault": "crash_before"}]}, max_restarts=1)
    with pytest.raises(WorkerError, match=r"2 workers in a row .* died \(exit code 3\)"):
        env.score(QUERIES, POINTERS)


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        ({"build": "input_error"}, {}, InputError, "^--model=nowhere has no config.json; give a"),
        ({"build": "raise"}, {}, WorkerError, "could not start: KeyError"),
        ({"build": "exit"}, {}, WorkerError, r"worker 0 died \(exit code 7\)"),
        ({"build": "hang"}, {"startup_s": 1.0}, WorkerError, "did not start within 1 s"),
        ({}, {"factory": "os:system"}, InputError, "--factory=os:system is neither in"),
        ({}, {"factory": "trivial_scorer:build_unlike", "workers": 2}, WorkerError, "model was"),
        ({"embedding_dim": 2000}, {"slot_bytes": 4096}, InputError, "4096 cannot hold one embed"),
        ({"x": object()}, {}, InputError, "settings"),
        ({}, {"workers": 0}, InputError, "workers=0"),
        ({}, {"slots": 65}, InputError, "slots=65"),
        ({}, {"deadline_s": 0}, InputError, "deadline_s=0"),
    ],
)
def test_what_cannot_start_says_why(environment, settings, options, error, message):
    with pytest.raises(error, match=message):
        environment(settings, **options)


def test_scorer_with_its_own_hello(environment):
    env = environment(factory="trivial_scorer:build_with_own_hello")
    assert (env.hello["model"], env.hello["embedding_dim"]) == ("own", 6)


def test_close_while_busy_is_quick_and_final(environment, monkeypatch):
    monkeypatch.setattr(supervision, "EXIT_GRACE_S", 60.0)
    env = environment({"faults": [{"fault": "hang"}]}, workers=2)
    press(at_work(env))
    with pytest.raises(KeyboardInterrupt):
        env.score(QUERIES, POINTERS)
    started = time.monotonic()
    env.close()
    assert time.monotonic() - started < 20.0  # They are not waited for.
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.score([1], [[2]])


def test_killed_between_calls_and_nothing_left(allow_trivial):
    before = children(), descriptors()
    with Environment({}, workers=2, factory="trivial_scorer:build") as env:
        check(env.score(QUERIES, POINTERS))
        during = children(), descriptors()
        os.kill(env._scheduler.seats[0].worker.pid, signal.SIGKILL)
        check(env.score(QUERIES, POINTERS))
        assert env.stats["restarts"] == 1
        assert len(children()) <= len(during[0])
        assert len(descriptors()) <= len(during[1])
    assert (children(), descriptors()) == before


DRIVER = """
    import os, signal, sys
    from qwen_bridge.client import Environment
    env = Environment({settings!r}, workers=2, factory="trivial_scorer:build")
    print(*[seat.worker.pid for seat in env._scheduler.seats], flush=True)
    {end}
"""


@pytest.mark.parametrize(
    ("settings", "end", "code"),
    [
        (
            {"faults": [{"fault": "hang"}]},
            "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL));"
            "signal.setitimer(signal.ITIMER_REAL, 0.2);"
            "env.score(range(9), [[1]] * 9, batch_size=1)",
            -signal.SIGKILL,
        ),
        ({}, "sys.exit(4)", 4),
    ],
    ids=["killed_while_scoring", "exit_without_close"],
)
def test_workers_leave_with_their_driver(allow_trivial, settings, end, code):
    script = textwrap.dedent(DRIVER).format(settings=settings, end=end)
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    assert done.returncode == code
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a worker outlived its driver"
        time.sleep(0.01)


def test_what_every_worker_says_again_and_again_is_said_once(environment, caplog):
    env = environment({"note": "out of memory: going on"}, workers=2)
    check(env.score(QUERIES, POINTERS, batch_size=16))
    check(env.score(QUERIES, POINTERS, batch_size=16))
    assert env.stats["requests"] > 4
    assert [record.message for record in caplog.records] == ["out of memory: going on"]
