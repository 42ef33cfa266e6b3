"""The plan's prompt counts, against what the loop asks of a fake VLM and of the embedded one."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments.workload import RunConfig, mining_phases, search_levels, training_phases
from lever_jax.decoding import DECODINGS
from lever_jax.evaluation import EvaluationConfig, answer_picks, evaluate
from lever_jax.mining import MiningConfig, RewardConfig, mine
from lever_jax.on_policy import draw, judge
from lever_jax.search import search_pools
from lever_jax.types import Rollouts

MINING = MiningConfig(
    proposals=10, quotas={"beam": 3, "sample": 3}, verify_best=3, verify_low=2, batch=5
)


def run_config(shots, **changes):
    defaults = RunConfig(
        train=12,
        evaluated=12,
        pool=8,
        shots=shots,
        warmup_queries=5,
        warmup_beam=3,
        mining=MINING,
        grpo_epochs=2,
        group_size=4,
        verify="all",
        evaluation=EvaluationConfig(shots=(1, shots), random_seeds=2, oracle_beam=3),
    )
    return dataclasses.replace(defaults, **changes)


class RandomProposer:
    """Draws pointers evenly, as the counts do not depend on who draws; nothing is compiled."""

    stops = False

    def __init__(self, pool):
        self._pool, self._rng = pool, np.random.default_rng(0)

    def mixture(self, params, key, rows, *, num, shots, **unused):
        del params, key, unused
        every = np.array(list(itertools.permutations(range(self._pool), shots)))
        pointers = [self._rng.permutation(every)[:num] for _ in rows]
        return self._rollouts(np.array(pointers, np.int32))

    def on_policy(self, params, key, rows, *, num, shots):
        del params, key
        every = np.array(list(itertools.permutations(range(self._pool), shots)))
        return self._rollouts(self._rng.choice(every, (len(rows), num)).astype(np.int32))

    def beam(self, params, rows, *, width, shots):
        return self.mixture(params, None, rows, num=width, shots=shots)

    def greedy(self, params, rows, *, shots):
        return self.on_policy(params, None, rows, num=1, shots=shots).pointers[:, 0]

    def _rollouts(self, pointers):
        shape = pointers.shape[:2]
        return Rollouts(pointers, np.zeros(shape), np.zeros(shape, int), np.ones(shape, bool))


class Meter:
    """What a service was asked for and computed since the last look."""

    def __init__(self, service):
        self.service, self.last = service, {}

    def read(self):
        now = dataclasses.asdict(self.service.counts)
        since = {name: value - self.last.get(name, 0) for name, value in now.items()}
        self.last = now
        return since


def run_phases(world, run):
    """Runs the loop's phases in their order; yields (name, counts)."""
    meter, key = Meter(world.service), None
    queries, service, proposer = world.queries, world.service, RandomProposer(run.pool)

    def picks(name):
        pointers = proposer.greedy(None, np.arange(run.train), shots=run.shots)
        answer_picks(queries, pointers, service, label=name)
        return f"picks of {name}", meter.read()

    if run.warmup_queries:
        rows = np.arange(run.warmup_queries)
        search = {"beam": run.warmup_beam, "construction": run.construction}
        search["score"] = "gain" if run.gain else "gt_prob"
        search_pools(queries, rows, service, shots=run.shots, label="warm-up", **search)
        yield "warm-up search", meter.read()
    mine("mine", queries, proposer, None, key, service, run.mining, shots=run.shots)
    yield "mining", meter.read()
    yield picks("warm-up" if run.warms_up else "the start")
    yield picks("RCE")
    for _ in range(run.grpo_epochs):
        sizes = {"shots": run.shots, "group_size": run.group_size}
        drawn = draw(proposer, None, key, np.arange(run.train), **sizes)
        options = {"verify": run.verify, "config": run.mining, "label": "GRPO"}
        judge(queries, drawn, service, RewardConfig(), **options)
    if run.grpo_epochs:
        yield "GRPO rounds", meter.read()
        yield picks("GRPO")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"construction": "left", "gain": True},
        {"warmup_queries": 0, "warms_up": False},
        {"grpo_epochs": 0},
        {"verify": "top_m", "mining": dataclasses.replace(MINING, verify_best=2, verify_low=1)},
    ],
    ids=["all", "left, gain", "no warm-up", "no GRPO", "top_m"],
)
@pytest.mark.parametrize("shots", [2, 3])
def test_counts_of_a_run(make_world, changes, shots):
    run = run_config(shots, **changes)
    phases = mining_phases(run) + training_phases(run)
    planned = {phase.name: phase for phase in phases if phase.name != "evaluation"}
    stages = [planned.pop(name) for name in ("mining, stage A", "mining, stage B")]
    seen = set()
    for name, counts in run_phases(make_world(), run):
        phases = stages if name == "mining" else [planned[name]]
        seen.add(name)
        low, high = (sum(phase.asked[i] for phase in phases) for i in (0, 1))
        assert low <= counts["asked"] <= high, name
        if shots == 2 and name != "mining":
            assert low == high, name
        low, high = (sum(phase.scored[i] for phase in phases) for i in (0, 1))
        assert low <= counts["scored"] <= high, name
        assert counts["generated"] <= sum(phase.answered for phase in phases), name
    assert seen == {*planned, "mining"}


@pytest.mark.parametrize("decodings", [("greedy",), DECODINGS])
def test_counts_of_an_evaluation(make_world, decodings):
    evaluation = dataclasses.replace(run_config(3).evaluation, decodings=decodings)
    run = run_config(3, warms_up=False, warmup_queries=0, evaluation=evaluation)
    planned = training_phases(run)[-1]
    world = make_world()
    parts = {"image": (0, 6), "question": (6, 10), "answer": (10, 14)}
    selectors = {"selector_rce": None, "selector_grpo": None}
    proposer = RandomProposer(run.pool)
    evaluate(world.queries, parts, selectors, proposer, world.service, run.evaluation)
    counts = world.service.counts
    assert planned.asked[0] <= counts.asked <= planned.asked[1]
    assert planned.scored[0] <= counts.scored <= planned.scored[1]
    assert counts.generated <= planned.answered


def test_the_main_job_on_the_embedded_world():
    # `make train` asked for 134,700 prompts, scored 82,967 and generated 9,033 before similarities
    # were reversed, which asks 20 more a query.
    run = RunConfig(
        600, 400, 32, 2, 150, 6, MiningConfig(), 5, 8, "all", EvaluationConfig(shots=(1, 2))
    )
    phases = mining_phases(run) + training_phases(run)
    assert [sum(p.asked[i] for p in phases) for i in (0, 1)] == [142_700, 145_100]
    low, high = (sum(p.scored[i] for p in phases) for i in (0, 1))
    assert low <= 82_967 <= high
    # The middle of the bounds is 3% off, each bound about a quarter at most.
    assert (low + high) / 2 == pytest.approx(82_967, rel=0.05)
    assert (low, high) == (pytest.approx(82_967, rel=0.3),) * 2
    assert sum(p.answered for p in phases) >= 9_033


def test_search_levels_by_hand():
    # Beam 3 of a pool of 8: 8 singles; 3 x 2 ordered pairs; then 3 pairs, each with the one
    # single that it lacks, first or last: 6 triples, of which two may be the same.
    assert search_levels(8, 3, 3) == [(8, 8), (6, 6), (3, 6)]
    assert search_levels(2, 2, 6) == [(2, 2), (2, 2)]
