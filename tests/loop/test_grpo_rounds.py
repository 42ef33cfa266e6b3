"""On-policy rounds over the fake VLM: overlapped or in turn, killed and resumed: the same."""

import json
import threading
import time
import types

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from fake import FakeEnvironment

from experiments import grpo, grpo_programs, settings
from experiments.metrics import MetricsLog
from lever_jax import checkpoint, training
from lever_jax.batches import Batches
from lever_jax.mining import MiningConfig, RewardConfig
from lever_jax.on_policy import draw, judge
from lever_jax.parallel import replicated
from lever_jax.proposing import phase_key

FLAGS = {
    "grpo_epochs": 2, "grpo_queries": 6, "batch_queries": 4, "grpo_updates": 1, "group_size": 4,
    "grpo_learning_rate": 0.01, "seed": 5, "ema": 0.5,
}  # fmt: skip
ROUNDS, STEPS = 4, 8
SHOTS = 2


@pytest.fixture(autouse=True)
def flags():
    settings.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**FLAGS):
        yield


_SHARED = {}
"""Compiled functions and what they are made of: every world here has the same."""


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    for name in ("make_step", "make_log_probs"):

        def made(*given, name=name, **options):
            if name not in _SHARED:
                _SHARED[name] = getattr(training, name)(*given, **options)
            return _SHARED[name]

        monkeypatch.setattr(grpo_programs, name, made)


@pytest.fixture
def run(make_world, tmp_path):
    """Runs the rounds in a folder: returns what they gave and their metrics."""

    def start(name, environment=None, **options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        world = make_world(environment=environment or FakeEnvironment(), name=name)
        world.environment.stats = {"busy_s": [0.0]}
        for shared in ("policy", "proposer", "params"):  # equal in every world
            setattr(world, shared, _SHARED.setdefault(shared, getattr(world, shared)))
        session = types.SimpleNamespace(
            workdir=folder, train=world.queries, policy=world.policy, mesh=None, store=world.store,
            service=world.service, environment=world.environment, train_proposer=world.proposer,
        )  # fmt: skip
        log = MetricsLog(folder)
        try:
            with flagsaver.flagsaver(**options):
                programs = grpo_programs.GrpoPrograms(session, SHOTS)
                params = grpo.train_rounds(programs, world.params, {"recipe": "recipe"}, log)
        except KeyboardInterrupt:
            world.store.close()
            raise
        finally:
            log.close()
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return params, [json.loads(line) for line in lines], world

    return start


def lagging_reference(world, overlap):
    """The same rounds written out: who draws, who is trained; also who drew the best round."""
    shared, state = _SHARED, None
    optimizer = training.make_optimizer(0.01, steps=STEPS)
    table, start = replicated(None, (world.queries.table, world.params))
    state = replicated(None, training.init_state(start, optimizer, averaged=True))
    drawers = [start]  # parameters before round 0, 1, ...
    best, most, first = None, -np.inf, {}
    for number in range(ROUNDS):
        drawer = drawers[max(number - 1, 0)] if overlap else drawers[number]
        order = np.random.default_rng([5, number // 2]).permutation(12)
        rows = np.sort(order[6 * (number % 2) :][:6])
        key = jax.random.fold_in(phase_key(5, "grpo"), number)
        drawn = draw(shared["proposer"], drawer, key, rows, shots=SHOTS, group_size=4)
        groups, _ = judge(
            world.queries, drawn, world.service, RewardConfig(), verify="all",
            config=MiningConfig(), label="",
        )  # fmt: skip
        gains = []
        for row, own, counts in zip(groups.query_rows, groups.rewards, groups.mask):
            gains.append(own[counts].mean() - first.setdefault(row, own[counts].mean()))
        if np.mean(gains) > most:
            best, most = drawer, np.mean(gains)
        for batch in Batches(groups, 4, one_size=True).epoch((5, number, 0)):
            state, _ = shared["make_step"](state, start, table, batch)
        drawers.append(training.copied(state.params))
    return state.average, best


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("overlap", [True, False])
def test_the_result_is_that_of_the_rounds_written_out(run, overlap, tmp_path):
    params, rows, world = run("one", overlap=overlap)
    expected, best = lagging_reference(world, overlap)
    assert equal(params, expected)
    kept, _ = checkpoint.restore(tmp_path / "one" / "checkpoints" / grpo.BEST, {"params": best})
    assert equal(kept["params"], best)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # The policy that drew is the one that the loss computes, however far it is behind.
    assert all(row["behaviour_error"] <= 1e-5 for row in rows)
    assert rows[0]["behaviour_drift"] <= 1e-5
    first_of_round = [row["behaviour_drift"] for row in rows[2::2]]
    assert all((drift > 1e-5) == overlap for drift in first_of_round)
    assert all(row["compilations"] == 0 for row in rows)
    # What was compiled ahead is what was run.
    assert _SHARED["make_step"].programs() == 1
    assert _SHARED["make_log_probs"]._cache_size() == 1


def test_the_policy_that_sampled_is_checked(run, monkeypatch):
    def other(params, *_):
        return jax.tree.map(lambda x: 1.3 * x, params)

    real = grpo_programs.draw
    monkeypatch.setattr(
        grpo_programs,
        "draw",
        lambda proposer, params, *a, **k: real(proposer, other(params), *a, **k),
    )
    _, rows, _ = run("one")
    assert all(row["behaviour_error"] > 1e-3 for row in rows)


class Slow(FakeEnvironment):
    """Takes its time, and notes in which thread it works and whether JAX works beside it."""

    def __init__(self):
        super().__init__()
        self.threads, self.beside = set(), 0

    def score(self, queries, pointers, on_batch=None):
        self.threads.add(threading.current_thread())
        self.beside += any(t.name.startswith("training") for t in threading.enumerate())
        start = time.monotonic()
        super().score(queries, pointers, on_batch)
        time.sleep(0.3)
        self.stats["busy_s"][0] += time.monotonic() - start


def test_timing_changes_nothing_and_jax_works_while_the_vlm_does(run):
    fast, _, _ = run("fast")
    slow, rows, world = run("slow", environment=Slow())
    assert equal(fast, slow)
    assert world.environment.threads == {threading.main_thread()}
    assert world.environment.beside == ROUNDS - 1  # Before the first there is nothing to learn.
    for share in ("bridge_idle", "jax_idle"):
        assert 0 <= rows[-1][share] < 1


@pytest.mark.parametrize("stop", [2, 8])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_run_that_is_killed_and_resumed_gives_the_same(run, overlap, stop, tmp_path):
    if ("whole", overlap) not in _SHARED:
        _SHARED["whole", overlap] = run("whole", overlap=overlap)[0]
    stopping = FakeEnvironment(stop_after=stop, stop_in_all=True)
    with pytest.raises(KeyboardInterrupt):
        run("killed", environment=stopping, overlap=overlap)
    partial = tmp_path / "killed" / "checkpoints" / grpo.PARTIAL
    done = checkpoint.read_metadata(partial)["round"] if checkpoint.exists(partial) else 0
    assert done < ROUNDS
    params, rows, _ = run("killed", overlap=overlap)
    assert equal(params, _SHARED["whole", overlap])
    assert rows[-1]["step"] == STEPS


def test_groups_that_cannot_be_scored_are_left_out(run, capsys):
    params, rows, _ = run("broken", environment=FakeEnvironment(failing=set(range(2000))))
    assert params is None
    assert rows == []
    assert capsys.readouterr().out.count("no prompt could be scored") == ROUNDS
