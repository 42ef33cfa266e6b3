"""The ledger: nothing is scored twice, deaths are counted, and a prompt that kills is found."""

import contextlib
import gzip
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from arithmetic import FINGERPRINT, PLACES, Arithmetic, Death, content, prompts, run
from chance import fresh_rng
from progress import no_bar

from lever_jax import ledger, store_schema
from lever_jax.errors import InputError
from lever_jax.ledger import ALONE, KILLS, count_states
from lever_jax.scoring import ScoringService
from lever_jax.store import ScoreRecord, Store, StoreError
from lever_jax.store_schema import pack_pointer


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


@pytest.fixture
def dying(monkeypatch):
    """Makes `Death` end a lease as SIGKILL does: nothing is given back."""
    give_back = ledger.Lease.__exit__

    def leave(self, kind, error, traceback):
        if kind is not Death:
            give_back(self, kind, error, traceback)

    monkeypatch.setattr(ledger.Lease, "__exit__", leave)


def test_jobs_end_with_their_records(path):
    environment = Arithmetic()
    seen = []
    with Store.open(path, FINGERPRINT) as store:
        service = ScoringService(store, environment, no_bar)
        with Store.open(path, read_only=True) as reader:

            def look(query, pointer):
                del query, pointer
                seen.append((reader.counts()["scores"], *count_states(reader).values()))

            environment.on_prompt = look
            service.verify(*prompts(600), label="x")
    # scores, todo, leased, done, failed: after 256 and 512 prompts a job of three is done.
    assert {row[1:] for row in seen if row[0] < 256} == {(0, 3, 0, 0)}
    assert {row[1:] for row in seen if 256 <= row[0] < 512} == {(0, 2, 1, 0)}
    assert {row[1:] for row in seen if 512 <= row[0] < 600} == {(0, 1, 2, 0)}
    assert seen[-1] == (600, 0, 1, 5, 0)
    records, states = content(path)
    assert (len(records), states["done"]) == (600, 6)
    assert all(record.accuracy is not None for record in records)


def test_an_asked_for_end_counts_nothing(path):
    for error in (KeyboardInterrupt, InputError):
        life = iter(range(10**6))

        def stop(query, pointer, life=life, error=error):
            if next(life) >= 40:
                raise error("x")

        for _ in range(4):
            with pytest.raises(error):
                run(path, Arithmetic(on_prompt=stop))
    with Store.open(path, read_only=True) as store:
        assert count_states(store) == {"todo": 3, "leased": 0, "done": 0, "failed": 0}
        assert {row[3] for row in store.read_rows("jobs")} == {0}
    environment = Arithmetic()
    run(path, environment)
    assert content(path)[1] == {"todo": 0, "leased": 0, "done": 3, "failed": 0}
    assert len(environment.calls) == 1


@pytest.mark.parametrize("step", ["records", "end"])
def test_what_was_not_committed_was_not_done(path, monkeypatch, step):
    """Ctrl-C, or a full disk, in the very moment of a commit: the records and the end go together.

    After the last batch of the first job has been put, or after the job has been marked as done.
    """
    put_scores, write, batches = Store.put_scores, ledger.Ledger.write, iter(range(10**6))

    def stopped(self, records):
        put_scores(self, records)
        if next(batches) == 15 and step == "records":
            raise KeyboardInterrupt

    def stopped_at_the_end(self, jobs, state):
        write(self, jobs, state)
        if state == "done" and jobs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_scores", stopped)
        if step == "end":
            patch.setattr(ledger.Ledger, "write", stopped_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            run(path, Arithmetic())
    with Store.open(path, read_only=True) as store:
        assert count_states(store) == {"todo": 3, "leased": 0, "done": 0, "failed": 0}
        sizes = sorted(row[4] for row in store.read_rows("jobs"))
        assert (sizes, store.counts()["scores"]) == ([16, 188, 256], 240)
    run(path, Arithmetic())
    assert content(path)[1] == {"todo": 0, "leased": 0, "done": 3, "failed": 0}


def test_other_errors_are_counted_with_their_words(path):
    def fail(query, pointer):
        raise RuntimeError(f"no kernel for {query}")

    with pytest.raises(RuntimeError):
        run(path, Arithmetic(on_prompt=fail), count=10)
    with Store.open(path, read_only=True) as store:
        (row,) = store.read_rows("jobs")
    assert (row[2], row[3], row[4]) == ("todo", 1, 10)
    assert "RuntimeError: no kernel for" in row[7]


def test_a_lease_that_cannot_be_given_back_hides_no_error_and_counts_later(path, monkeypatch):
    def fail(query, pointer):
        raise RuntimeError("no kernel")

    def full(*_):
        raise StoreError("make space")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "give_back", full)
        with pytest.raises(RuntimeError, match="no kernel"):
            run(path, Arithmetic(on_prompt=fail), count=10)
    with Store.open(path, FINGERPRINT) as store:
        ledger.Ledger(store)
        (row,) = store.read_rows("jobs")
    assert (row[2], row[3], row[4]) == ("todo", 1, 10)


@pytest.mark.parametrize("certified", [0, 3, -2])
def test_an_answer_that_stage_a_has_proven_is_not_generated(path, certified):
    """Right, in whichever column, or wrong (-2): the VLM need not be asked again."""
    environment = Arithmetic()
    environment.certified = certified
    records = run(path, environment, "answer", count=40)
    assert {(record.how, record.prediction) for record in records} == {("verified", "sept")}
    assert [verb for verb, _ in environment.calls] == ["score"]
    assert content(path)[0] == sorted(records, key=lambda r: (r.query_id, pack_pointer(r.pointer)))


@pytest.mark.parametrize("verb", ["score", "answer"])
def test_prompts_that_kill_the_driver_are_found_and_given_up(path, tmp_path, dying, verb):
    queries, pointers = prompts(700)
    bad = {(int(queries[i]), tuple(pointers[i].tolist())) for i in (3, 300, 650)}
    armed = [verb == "score"]
    deaths = 0

    def kill(query, pointer):
        if armed[0] and (query, pointer) in bad:
            raise Death

    environment = Arithmetic(on_prompt=kill)
    if verb == "answer":
        run(path, environment)
        armed[0] = True
    while True:
        try:
            records = run(path, environment, verb)
            break
        except Death:
            deaths += 1
            assert deaths < 60
    given_up = [record for record in records if record.eval_failed]
    assert {(record.query_id, record.pointer) for record in given_up} == bad
    for record in given_up:
        why = f"given up after {KILLS + ALONE} attempts; the last one ended with process"
        assert why in record.eval_failed
        assert (record.gt_prob is None) == (verb == "score")
    # Three with all, one with each job alone, five with each prompt alone.
    assert deaths == KILLS + 3 + 3 * ALONE
    asked = [prompt for prompt in environment.asked if prompt[0] == verb]
    assert len(asked) == len(set(asked)) == 697
    run(tmp_path / "clean", Arithmetic(), verb)
    clean = {(r.query_id, r.pointer): r for r in content(tmp_path / "clean")[0]}
    stored, states = content(path)
    for record in stored:
        if (record.query_id, record.pointer) not in bad:
            assert record == clean[record.query_id, record.pointer]
    assert len(stored) == 700
    assert (states["failed"], states["todo"], states["leased"]) == (3, 0, 0)


# Short lives over many small calls: the last prompts of each see one death after another.
@pytest.mark.parametrize(("most", "size", "total"), [(60, 900, 900), (8, 60, 420)])
def test_random_deaths_blame_nobody(path, tmp_path, dying, most, size, total):
    rng = fresh_rng()
    environment = Arithmetic(batch=8)
    deaths = 0
    for _ in range(4 * total // most):
        left = iter(range(int(rng.integers(0, most))))

        def count(query, pointer, left=left):
            if next(left, None) is None:
                raise Death

        environment.on_prompt = count
        with contextlib.suppress(Death):
            run(path, environment, count=total, size=size)
            break
        deaths += 1
    assert deaths >= 20
    environment.on_prompt = lambda query, pointer: None
    run(path, environment, count=total, size=size)
    run(tmp_path / "clean", Arithmetic(), count=total)
    assert content(path)[0] == content(tmp_path / "clean")[0]
    assert len(environment.asked) == len(set(environment.asked)) == total


def test_a_call_may_ask_for_a_part_of_what_is_open(path, dying):
    def kill(query, pointer):
        raise Death

    for _ in range(KILLS):
        with pytest.raises(Death):
            run(path, Arithmetic(on_prompt=kill), count=300)
    environment = Arithmetic()
    with Store.open(path, FINGERPRINT) as store:
        service = ScoringService(store, environment, no_bar)
        queries, pointers = prompts(300)
        fresh = np.array([99]), np.array([[1, 2, 3]])  # Of another length, and first.
        service.score(*fresh, label="x")
        service.score(queries[::2], pointers[::2], label="x")
        states = count_states(store)
        assert states == {"todo": 2, "leased": 0, "done": 3, "failed": 0}
        assert {row[3] for row in store.read_rows("jobs", "WHERE state = 'todo'")} == {KILLS}
        service.score(queries, pointers, label="x")
        assert count_states(store)["todo"] == 0
    assert [size for _, size in environment.calls] == [1, 128, 22, 128, 22]


KILLER = """
import contextlib, os, signal, sys
sys.path[:0] = {places!r}
from arithmetic import Arithmetic, run
def kill(query, pointer):
    if (query, pointer) == {bad!r}:
        os.kill(os.getpid(), signal.SIGKILL)
run({path!r}, Arithmetic(on_prompt=kill), count=300)
"""


def test_sigkill_of_the_driver_is_counted_by_the_next(path):
    queries, pointers = prompts(300)
    bad = (int(queries[77]), tuple(pointers[77].tolist()))
    script = KILLER.format(places=PLACES, path=str(path), bad=bad)
    ends = []
    while not ends or ends[-1]:
        assert len(ends) < 12
        ends.append(subprocess.run([sys.executable, "-c", script], check=False).returncode)
    assert ends == [-9] * (KILLS + 1 + ALONE) + [0]
    records, states = content(path)
    failed = [record for record in records if record.eval_failed]
    assert [(record.query_id, record.pointer) for record in failed] == [bad]
    assert (len(records), states["failed"]) == (300, 1)


# --- failures that are asked for again ----------------------------------------------------------


def test_retried_failures_are_superseded_and_counted(path, dying):
    queries, pointers = prompts(300)
    failing = [(int(queries[i]), tuple(pointers[i].tolist())) for i in range(10)]
    records = run(path, Arithmetic(failing=failing), "answer", count=300)
    assert sum(record.eval_failed is not None for record in records) == 10
    with Store.open(path, FINGERPRINT) as store:
        environment = Arithmetic(failing=failing[:4])
        service = ScoringService(store, environment, no_bar)
        assert service.retry_failed(queries, np.arange(5000), label="x") == (10, 4)
        assert service.retry_failed([10**6], np.arange(5000), label="x") == (0, 0)
        assert service.retry_failed(queries, [10**6], label="x") == (0, 0)
        assert service.retry_failed(queries, np.arange(5000), label="x") == (4, 4)
        assert store.reasons("score") == {"broken": 4}
        assert store.superseded() == set(failing)
        counts = store.counts()
        assert (counts["superseded"], counts["scores"], counts["duplicate_scores"]) == (14, 300, 0)
        numbers = [row[3] for row in store.read_rows("superseded")]
        assert sorted(numbers) == [1] * 10 + [2] * 4
        assert store.verify() == []
        with pytest.raises(InputError, match="is no failure"):
            store.supersede("score", [ScoreRecord(*failing[9], gt_prob=0.5)])
        # A prompt that kills when it is retried is found as any other.
        environment.on_prompt = kill_if(failing[0])
        for _ in range(KILLS + 1 + ALONE):
            service = ScoringService(store, environment, no_bar)
            with pytest.raises(Death):
                service.retry_failed(queries, np.arange(5000), label="x")
        service = ScoringService(store, environment, no_bar)
        assert service.retry_failed(queries, np.arange(5000), label="x")[1] == 4
        reasons = store.reasons("score")
        assert list(reasons.values()) == [3, 1]
        assert list(reasons)[1].startswith(f"given up after {KILLS + ALONE} attempts")
        assert store.verify() == []


def kill_if(bad):
    def kill(query, pointer):
        if (query, pointer) == bad:
            raise Death

    return kill


@pytest.mark.parametrize("verb", ["score", "answer"])
def test_a_retry_that_failed_again_is_not_blamed_for_what_comes_after_it(path, verb):
    queries, pointers = prompts(40)
    failing = [(int(queries[i]), tuple(pointers[i].tolist())) for i in range(40)]
    environment = Arithmetic(batch=8)
    if verb == "answer":
        run(path, environment, count=40)
    environment.failing = set(failing)
    run(path, environment, verb, count=40)
    lives = iter(range(10**6))

    def stop(query, pointer):
        if next(lives) >= 20:
            raise RuntimeError("no memory")

    with Store.open(path, FINGERPRINT) as store:
        service = ScoringService(store, environment, no_bar)
        environment.on_prompt = stop
        with pytest.raises(RuntimeError):
            service.retry_failed(queries, np.arange(5000), label="x")
        assert store.counts()["superseded"] == 16  # Two batches have landed.
        (row,) = store.read_rows("jobs", "WHERE state = 'todo'")
        assert (row[3], row[4]) == (1, 24)


def test_retried_answers_are_superseded(path):
    queries, pointers = prompts(50)
    failing = [(int(queries[3]), tuple(pointers[3].tolist()))]
    environment = Arithmetic()
    run(path, environment, count=50)
    environment.failing = set(failing)
    run(path, environment, "answer", count=50)
    environment.failing = set()
    with Store.open(path, FINGERPRINT) as store:
        assert store.reasons("answer") == {"broken": 1}
        service = ScoringService(store, environment, no_bar)
        assert service.retry_failed(queries, np.arange(5000), label="x") == (1, 0)
        (record,) = store.get_scores(queries[3:4], pointers[3:4])
        assert record.accuracy is not None
        assert store.counts()["answers"] == 50
        assert store.verify() == []


# --- files of version 1 -------------------------------------------------------------------------


def test_a_file_of_version_1_is_brought_forward(path):
    """version_1.sqlite.gz was written by the code of commit 9f8a416, the last with version 1."""
    old = gzip.decompress(pathlib.Path(__file__).with_name("version_1.sqlite.gz").read_bytes())
    path.write_bytes(old)
    with Store.open(path, read_only=True) as reader:  # A reader leaves it as it is.
        before = list(reader.iter_scores())
        assert reader.verify() == []
        assert reader.superseded() == set()
        assert count_states(reader)["todo"] == 0
    assert path.read_bytes() == old
    for _ in range(2):
        with Store.open(path) as store:
            assert store_schema.version(store._db) == 2
            assert store.verify() == []
            assert list(store.iter_scores()) == before
            assert store.counts()["scores"] == len(before) == 11
            assert store.reasons("score") == {"image 9 cannot be decoded": 1}
            assert store.reasons("answer") == {"the worker hung": 1}
            assert store.get_proposals("mine").kept.tolist() == [1, 0]
            assert store.get_pools([2])[0].tolist() == [[4, 5]]
            assert store.done("mine") == {"queries": 2}
    run_again = Arithmetic()
    with Store.open(path) as store:
        service = ScoringService(store, run_again, no_bar)
        records = service.verify([1, 2, 5], [[0, 1], [4, 5], [7, 8]], label="x")
        assert [record.gt_prob for record in records[:2]] == [0.0, 0.5]
        assert store.verify() == []
        assert count_states(store)["done"] == 2
