"""Every prompt is scored once, whoever asks; failures stay failures."""

import numpy as np
import pytest
from fake import FakeEnvironment, key, worth

from lever_jax.final_records import FinalRecords
from lever_jax.ledger import Ledger
from lever_jax.scoring import columns
from lever_jax.store import ScoreRecord


def prompts(world, count, seed, shots=2):
    rng = np.random.default_rng(seed)
    queries = rng.choice(world.queries.query_ids, count)
    pointers = rng.integers(0, 40, (count, shots))
    pointers[rng.random(count) < 0.2] = -1
    return queries, pointers


def test_scores_are_right_ordered_and_never_computed_twice(make_world):
    world = make_world()
    for seed in range(3):
        queries, pointers = prompts(world, 60, seed % 2)
        scores = columns(world.service.score(queries, pointers, label="x"))
        expected = [worth(q, p) for q, p in zip(queries, pointers)]
        np.testing.assert_allclose(scores["gt_prob"], expected, atol=1e-6)
    assert len(set(world.environment.scored)) == len(world.environment.scored)
    assert world.service.counts.scored == len(world.environment.scored)
    assert world.store.counts()["duplicate_scores"] == 0


def test_only_what_no_certificate_answers_is_generated(make_world):
    world = make_world()
    queries, pointers = prompts(world, 80, 5)
    scores = columns(world.service.verify(queries, pointers, label="x"))
    expected = np.array([worth(q, p) for q, p in zip(queries, pointers)])
    np.testing.assert_array_equal(scores["accuracy"], (expected >= 0.6).astype(np.float32))
    asked = {key(q, p) for q, p, e in zip(queries, pointers, expected) if e < 0.8}
    assert set(world.environment.answered) == asked
    assert len(world.environment.answered) == len(asked)
    before = list(world.environment.answered)
    world.service.verify(queries, pointers, label="x")
    assert world.environment.answered == before


def test_how_an_answer_was_found_is_kept(make_world):
    world = make_world()
    queries, pointers = prompts(world, 40, 6)
    for record in world.service.verify(queries, pointers, label="x"):
        value = worth(record.query_id, record.pointer)
        assert record.how == ("verified" if value >= 0.8 else "generated")
        assert record.prediction == ("right" if value >= 0.6 else "wrong")


@pytest.mark.parametrize("stage", ["score", "verify"])
def test_what_is_returned_is_what_is_in_the_store(make_world, stage):
    """Some prompts are known, some answered, some twice in the call, some fail."""
    world = make_world(environment=FakeEnvironment(failing={1003}))
    queries, pointers = prompts(world, 90, 8)
    assert len({key(q, p) for q, p in zip(queries, pointers)}) < 90
    world.service.score(queries[:40], pointers[:40], label="x")
    world.service.verify(queries[20:30], pointers[20:30], label="x")
    records = getattr(world.service, stage)(queries, pointers, label="x")
    assert any(record.eval_failed for record in records)
    assert records == world.store.get_scores(queries, pointers)


def test_a_failure_is_never_a_zero(make_world):
    world = make_world(environment=FakeEnvironment(failing={1003}))
    queries = np.array([1002, 1003, 1004])
    pointers = np.array([[1, 2], [1, 2], [1, 2]])
    records = world.service.verify(queries, pointers, label="x")
    assert [record.eval_failed for record in records] == [None, "broken", None]
    scores = columns(records)
    assert np.isnan(scores["gt_prob"][1])
    assert np.isnan(scores["accuracy"][1])
    assert np.isfinite(scores["accuracy"][[0, 2]]).all()
    world.service.verify(queries, pointers, label="x")
    assert world.environment.scored.count((1003, (1, 2))) == 1


def test_what_landed_before_an_interruption_is_kept(make_world):
    world = make_world(environment=FakeEnvironment(stop_after=2))
    queries = np.repeat(world.queries.query_ids, 4)
    pointers = np.stack([np.arange(48) % 40, np.arange(48) // 2 % 40], 1)
    with pytest.raises(KeyboardInterrupt):
        world.service.score(queries, pointers, label="x")
    landed = set(world.environment.scored)
    assert len(landed) == world.store.counts()["scores"] > 0
    world.environment.stop_after = None
    world.service.score(queries, pointers, label="x")
    assert len(world.environment.scored) == len(set(world.environment.scored))


def test_what_is_final_is_not_read_again(make_world, monkeypatch):
    world = make_world(environment=FakeEnvironment(failing={1003}))
    queries, pointers = prompts(world, 90, 9)
    first = world.service.verify(queries, pointers, label="x")
    read, store = [], world.store.get_scores
    monkeypatch.setattr(
        world.store, "get_scores", lambda q, p: read.extend(map(key, q, p)) or store(q, p)
    )
    assert world.service.verify(queries, pointers, label="x") == first == store(queries, pointers)
    # Failures are read again: somebody may have asked for them once more.
    assert set(read) == {key(q, p) for q, p in zip(queries, pointers) if q == 1003}
    world.environment.failing = frozenset()
    world.service.retry_failed(queries, np.unique(pointers), label="x")
    again = world.service.verify(queries, pointers, label="x")
    assert again == store(queries, pointers)
    assert all(record.eval_failed is None for record in again)


def test_what_could_not_be_stored_is_not_kept_in_memory(make_world, monkeypatch):
    world = make_world()
    queries, pointers = prompts(world, 40, 10)

    def full(ledger, jobs, state):
        if state == "done" and jobs:
            raise OSError("no space left")
        write(ledger, jobs, state)

    write = Ledger.write
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "write", full)
        with pytest.raises(OSError, match="no space"):
            world.service.verify(queries, pointers, label="x")
    records = world.service.verify(queries, pointers, label="x")
    assert records == world.store.get_scores(queries, pointers)


def test_the_oldest_final_records_go_first():
    final = FinalRecords(limit=3)
    records = [ScoreRecord(i, (1, i), gt_prob=0.5, accuracy=1.0) for i in range(5)]
    failed = ScoreRecord(9, (1, 2), gt_prob=0.5, eval_failed="broken")
    final.add([*records, failed, ScoreRecord(8, (), gt_prob=0.5)])
    assert [final.get((i, (1, i))) for i in range(5)] == [None, None, *records[2:]]
    assert final.get((9, (1, 2))) is final.get((8, ())) is None
