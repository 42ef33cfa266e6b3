"""Two real workers: one worker's results in the caller's order, and each query stays with one."""

import json
import logging
import pathlib

import numpy as np
import pytest

from qwen_bridge.client import Environment


@pytest.mark.slow
def test_two_workers_give_what_one_gives_and_find_their_prefixes(
    make_scorer, worker_settings, monkeypatch, caplog
):
    monkeypatch.setenv("QWEN_BRIDGE_FACTORIES", "counting_factory")
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
    one = make_scorer()
    rng = np.random.default_rng(61)
    queries = [example.id for example in one.dataset.eval[:16]]
    bank = np.array([example.id for example in one.dataset.bank])
    pools = {query: rng.choice(bank, 8, replace=False) for query in queries}

    def draw(count):
        """`count` prompts a query, all queries mixed."""
        ids = rng.permutation(np.repeat(queries, count))
        return ids, np.stack([rng.choice(pools[query], 2, replace=False) for query in ids])

    rounds = [draw(20) for _ in range(3)]
    options = {"workers": 2, "threads": 1, "factory": "counting_factory:build"}
    with (
        caplog.at_level(logging.WARNING),
        Environment(worker_settings, **options) as environment,
    ):
        results = [environment.score(*prompts, batch_size=20) for prompts in rounds]
        answers = environment.answer(*rounds[0])
        assert min(environment.stats["busy_s"]) > 0
    for prompts, result in zip(rounds, results):
        expected = one.score(*prompts)
        np.testing.assert_allclose(result.gt_prob, expected.gt_prob, atol=1e-5)
        for row in np.flatnonzero((result.certified >= 0) & (expected.certified >= 0)):
            assert result.texts[row] == expected.texts[row]
    assert answers.texts == one.answer(*rounds[0]).texts

    said = [json.loads(r.message) for r in caplog.records if r.message.startswith('{"worker"')]
    assert len(said) == 3 * len(queries)  # One query a request, none split.
    assert all(len(note["queries"]) == 1 for note in said)
    assert {note["worker"] for note in said} == {0, 1}
    hits, misses = (sum(note[name] for note in said) for name in ("hits", "misses"))
    homes = {}
    for note in said:
        homes.setdefault(note["queries"][0], []).append(note["worker"])
    stayed = np.mean([len(set(workers)) == 1 for workers in homes.values()])
    every = [np.concatenate(column) for column in zip(*rounds)]
    distinct = {(q, tuple(p[:d])) for q, p in zip(*every) for d in (1, 2)}
    print(
        f"prefixes: {misses} computed and {hits} found, {len(distinct)} distinct ones; "
        f"{stayed:.0%} of queries stayed with their worker"
    )
    # A query moves only where a worker has nothing left to do and takes from the other.
    assert stayed >= 0.6
    assert misses <= 1.3 * len(distinct)
