"""The rules of the ledger one by one: order, blame, hopelessness, and what a dead lease leaves."""

import numpy as np
import pytest

from lever_jax.ledger import ALONE, KILLS, Job, Ledger
from lever_jax.scoring import ScoringService
from lever_jax.store import ScoreRecord, Store
from lever_jax.store_schema import unpack_array

QUERIES = np.arange(1, 6)
POINTERS = np.stack([QUERIES + 10, QUERIES + 20], axis=1)
PROMPTS = np.column_stack([QUERIES, POINTERS])


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", {"model": "tiny"}) as store:
        yield store


def test_the_least_suspected_come_first(store):
    ledger, order = Ledger(store), []
    for row, attempts in enumerate([KILLS + 2, KILLS, 0, KILLS + 1, 1]):
        ledger.write([Job("score", PROMPTS[[row]], attempts)], "todo")
    for lease in ledger.leases("score", QUERIES, POINTERS):
        order.append(sorted(lease.rows.tolist()))
        with lease, lease.landing(np.arange(len(lease.rows))):
            pass
    assert order == [[2, 4], [1], [3], [0]]


@pytest.mark.parametrize("survived", [0, 1, 3])
def test_what_another_prompt_survived_is_no_ground_to_give_one_up(store, survived):
    ledger = Ledger(store)
    ledger.write([Job("score", PROMPTS[:1], KILLS + survived)], "done")
    ledger.write([Job("score", PROMPTS[1:3], KILLS + 9)], "done")  # Two in company: it says little.
    ledger.write([Job("score", PROMPTS[3:4], KILLS + 9)], "todo")  # Not scored.
    enough = KILLS + ALONE * (1 + survived)
    assert not ledger.is_hopeless(Job("score", PROMPTS[4:], enough - 1))
    assert ledger.is_hopeless(Job("score", PROMPTS[4:], enough))
    assert not ledger.is_hopeless(Job("score", PROMPTS[3:], enough))


class Broken(Exception):
    """What an environment raises that is broken altogether."""


class BrokenEnvironment:
    def score(self, queries, pointers, on_batch=None):
        raise Broken


@pytest.mark.parametrize(("blameless", "attempts"), [((), 1), ([Broken], 0), ([ValueError], 1)])
def test_whom_the_caller_blames(store, blameless, attempts):
    service = ScoringService(store, BrokenEnvironment(), None, blameless)
    with pytest.raises(Broken):
        service.score(QUERIES, POINTERS, label="x", advance=lambda count: None)
    (row,) = store.read_rows("jobs")
    assert (row[2], row[3]) == ("todo", attempts)


@pytest.mark.parametrize(
    ("verb", "unfinished"),
    [("score", [1]), ("retry_score", [1, 2]), ("answer", [1, 3]), ("retry_answer", [1, 3, 5])],
)
def test_what_a_dead_lease_had_still_to_do(store, verb, unfinished):
    """Of a prompt without a record, a failed score, a score, an answer and a failed answer."""
    score = {"gt_prob": 0.5}
    states = [{"eval_failed": "x"}, score, {**score, "accuracy": 1.0, "how": "generated"}]
    states.append({**score, "eval_failed": "x"})
    keys = zip(QUERIES[1:].tolist(), map(tuple, POINTERS[1:].tolist()))
    store.put_scores([ScoreRecord(*key, **state) for key, state in zip(keys, states)])
    Ledger(store).write([Job(verb, PROMPTS)], "leased")
    Ledger(store)  # The next process.
    (row,) = store.read_rows("jobs")
    assert (row[1], row[2], row[3]) == (verb, "todo", 1)
    assert unpack_array(row[6])[:, 0].tolist() == unfinished
