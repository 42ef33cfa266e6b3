"""The plan's prompt counts, against what the loop asks of a fake VLM and of the embedded one."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.workload import RunConfig, mining_phases, search_levels, training_phases
from lever_jax.evaluation import EvaluationConfig, answer_picks, evaluate
from lever_jax.mining import MiningConfig, RewardConfig, mine, on_policy_round
from lever_jax.search import search_pools

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
    meter, key = Meter(world.service), jax.random.key(1)
    queries, service = world.queries, world.service

    def picks(name):
        pointers = world.proposer.greedy(world.params, np.arange(run.train), shots=run.shots)
        answer_picks(queries, pointers, service, label=name)
        return f"picks of {name}", meter.read()

    selectors = {"selector_rce": world.params}
    if run.warmup_queries:
        rows = np.arange(run.warmup_queries)
        search_pools(queries, rows, service, shots=run.shots, beam=run.warmup_beam, label="warm-up")
        selectors["selector_warmup"] = world.params
        yield "warm-up search", meter.read()
    mine(
        "mine", queries, world.proposer, world.params, key, service, run.mining, shots=run.shots
    )  # fmt: skip
    yield "mining", meter.read()
    yield picks("warm-up" if run.warmup_queries else "the start")
    yield picks("RCE")
    for epoch in range(run.grpo_epochs):
        on_policy_round(
            queries,
            np.arange(run.train),
            world.proposer,
            world.params,
            jax.random.fold_in(key, epoch),
            service,
            RewardConfig(),
            shots=run.shots,
            group_size=run.group_size,
            verify=run.verify,
            config=run.mining,
            label="GRPO",
        )
    if run.grpo_epochs:
        selectors["selector_grpo"] = world.params
        yield "GRPO rounds", meter.read()
        yield picks("GRPO")
    parts = {"image": (0, 6), "question": (6, 10), "answer": (10, 14)}
    evaluate(queries, parts, selectors, world.proposer, service, run.evaluation)
    yield "evaluation", meter.read()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_queries": 0},
        {"grpo_epochs": 0},
        {"verify": "top_m", "mining": dataclasses.replace(MINING, verify_best=2, verify_low=1)},
    ],
    ids=["all", "no warm-up", "no GRPO", "top_m"],
)
@pytest.mark.parametrize("shots", [2, 3])
def test_counts_of_a_run(make_world, changes, shots):
    run = run_config(shots, **changes)
    planned = {phase.name: phase for phase in mining_phases(run) + training_phases(run)}
    stages = [planned.pop(name) for name in ("mining, stage A", "mining, stage B")]
    seen = set()
    for name, counts in run_phases(make_world(), run):
        phases = stages if name == "mining" else [planned[name]]
        seen.add(name)
        low, high = (sum(phase.asked[i] for phase in phases) for i in (0, 1))
        assert low <= counts["asked"] <= high, name
        if shots == 2:
            assert low == high, name
        # Training and evaluation share their queries here, so less may be new than planned.
        assert counts["scored"] <= sum(phase.scored[1] for phase in phases), name
        if name != "evaluation":
            assert counts["scored"] >= sum(phase.scored[0] for phase in phases), name
        assert counts["generated"] <= sum(phase.answered for phase in phases), name
    assert seen == {*planned, "mining"}


def test_counts_of_an_evaluation_alone(make_world):
    run = run_config(3, warmup_queries=0, grpo_epochs=0)
    planned = training_phases(run)[-1]
    world = make_world()
    parts = {"image": (0, 6), "question": (6, 10), "answer": (10, 14)}
    selectors = {"selector_rce": world.params}
    evaluate(world.queries, parts, selectors, world.proposer, world.service, run.evaluation)
    assert planned.asked[0] <= world.service.counts.asked <= planned.asked[1]
    assert planned.scored[0] <= world.service.counts.scored <= planned.scored[1]
    assert world.service.counts.generated <= planned.answered


def test_the_main_job_on_the_embedded_world():
    # README: `make train` asked for 134,700 prompts, scored 82,967 and generated 9,033.
    run = RunConfig(
        600, 400, 32, 2, 150, 6, MiningConfig(), 5, 8, "all", EvaluationConfig(shots=(1, 2))
    )
    phases = mining_phases(run) + training_phases(run)
    assert [sum(p.asked[i] for p in phases) for i in (0, 1)] == [134_700, 134_700]
    low, high = (sum(p.scored[i] for p in phases) for i in (0, 1))
    assert low <= 82_967 <= high
    # The middle of the bounds is 3% off, each bound about a fifth.
    assert (low + high) / 2 == pytest.approx(82_967, rel=0.05)
    assert (low, high) == (pytest.approx(82_967, rel=0.25),) * 2
    assert 9_033 <= sum(p.answered for p in phases)


def test_search_levels_by_hand():
    # Beam 3 of a pool of 8: 8 singles; 3 x 2 ordered pairs; then 3 pairs, each with the one
    # single that it lacks, first or last: 6 triples, of which two may be the same.
    assert search_levels(8, 3, 3) == [(8, 8), (6, 6), (3, 6)]
    assert search_levels(2, 2, 6) == [(2, 2), (2, 2)]
