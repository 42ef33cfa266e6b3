"""Two-stage mining, groups, and on-policy rounds over the fake VLM."""

import dataclasses
import itertools
import sqlite3

import jax
import numpy as np
import pytest
from fake import FakeEnvironment, key, worth
from progress import no_bar

from lever_jax.batches import Batches
from lever_jax.errors import InputError
from lever_jax.mining import (
    MiningConfig,
    RewardConfig,
    choose,
    group_batch,
    mine,
    mined_candidates,
    mined_groups,
    uniform_sample,
)
from lever_jax.on_policy import draw, judge
from lever_jax.policy import sequence_log_probs
from lever_jax.scoring import ScoringService
from lever_jax.store import Store
from lever_jax.store_copies import filter_store
from lever_jax.store_salvage import salvage
from lever_jax.training import LossConfig, init_state, make_optimizer, make_step

CONFIG = MiningConfig(
    proposals=20,
    quotas={"beam": 4, "sample": 6, "retrieval": 2, "random": 4},
    verify_best=3,
    verify_low=2,
    verify_uniform=2,
    batch=5,
)


def run_mine(world):
    mine("mine", world.queries, world.proposer, world.params, jax.random.key(1), world.service,
         CONFIG, shots=2)  # fmt: skip


def test_choose_takes_the_ends():
    group = np.array([0, 0, 0, 0, 0, 1, 1])
    gt_prob = np.array([0.1, 0.9, np.nan, 0.5, 0.3, 0.2, 0.1])
    chosen = choose(group, gt_prob, best=1, low=2)
    assert chosen.tolist() == [True, True, False, False, True, True, True]
    assert choose(group, gt_prob, best=9, low=9).tolist() == [True] * 2 + [False] + [True] * 4


def test_the_uniform_sample_is_uniform_and_depends_on_its_own_query_only():
    rng = np.random.default_rng(5)
    queries = rng.permutation(np.repeat(np.arange(300), 20))
    pointers = rng.permutation(100_000)[: len(queries) * 2].reshape(-1, 2)
    sample = uniform_sample(queries, pointers, 3)
    assert (np.bincount(queries[sample]) == 3).all()
    own = queries == 7
    np.testing.assert_array_equal(uniform_sample(queries[own], pointers[own], 3), sample[own])
    # 900 of 6,000 rows, whatever a column of the rows says: a hypergeometric count.
    low = pointers[:, 0] < np.median(pointers[:, 0])
    assert abs(sample[low].sum() - 450) < 4 * 15
    assert uniform_sample(queries[:0], pointers[:0], 3).shape == (0,)
    assert uniform_sample(queries[own], pointers[own], 99).all()


def test_rates_come_from_the_sample_and_later_answers_change_no_figure(make_world):
    world = make_world()
    run_mine(world)
    args = ("mine", world.queries, world.store, RewardConfig(), CONFIG)
    before = mined_candidates(*args)
    assert np.isfinite(before.accuracy[before.sampled]).all()
    assert before.sampled.sum() == 12 * 2
    mined = world.store.get_proposals("mine", world.queries.query_ids)
    world.service.verify(mined.query_ids, mined.pointers, label="later")
    after = mined_candidates(*args)
    for one, two in zip(before, after):
        if one is not None:
            np.testing.assert_array_equal(one, two)


def test_every_query_gets_a_full_group_of_distinct_pointers(make_world):
    world = make_world()
    run_mine(world)
    mined = world.store.get_proposals("mine", world.queries.query_ids)
    assert len(mined.query_ids) == 12 * CONFIG.proposals
    prompts = {(q, *p) for q, p in zip(mined.query_ids.tolist(), mined.pointers.tolist())}
    assert len(prompts) == len(mined.query_ids)
    assert {s.partition("(")[0] for s in mined.sources} == {"beam", "sample", "retrieval", "random"}
    for query_id in world.queries.query_ids:
        own = mined.query_ids == query_id
        values = np.array([worth(query_id, p) for p in mined.pointers[own]])
        kept = mined.kept[own] == 1
        # The best three, the lowest two, and whatever a certificate answered for free.
        assert kept.sum() >= 5
        np.testing.assert_allclose(np.sort(values[kept])[-3:], np.sort(values)[-3:])
        np.testing.assert_allclose(np.sort(values[kept])[:2], np.sort(values)[:2])
        assert (values[~kept] < 0.8).all()
        assert values[kept].max() > values[kept].min()


def local_config(**changes):
    quotas = {"local_search": 5, **CONFIG.quotas}
    return dataclasses.replace(CONFIG, quotas=quotas, proposals=25, **changes)


def test_a_local_search_starts_from_the_scores_of_the_first_step(make_world):
    world = make_world()
    config = local_config()
    mine("near", world.queries, world.proposer, world.params, jax.random.key(1), world.service,
         config, shots=2)  # fmt: skip
    run_mine(world)  # without it, the same first step
    mined, first = (world.store.get_proposals(n, world.queries.query_ids) for n in ("near", "mine"))
    assert len(mined.query_ids) == 12 * 25
    for row, query_id in enumerate(world.queries.query_ids):
        own = mined.query_ids == query_id
        prompts = [tuple(p) for p in mined.pointers[own].tolist()]
        assert len(set(prompts)) == 25
        sources = np.array(mined.sources)[own]
        assert (sources == "local_search").sum() == 5
        start = [tuple(p) for p in first.pointers[first.query_ids == query_id].tolist()]
        assert set(start) < set(prompts)
        best = sorted(start, key=lambda p: -worth(query_id, p))[:8]
        # The fake VLM gives ties; all that score as the eighth best may be parents.
        parents = [p for p in start if worth(query_id, p) >= worth(query_id, best[-1])]
        for pointer in itertools.compress(prompts, sources == "local_search"):
            near = [sum(a == b for a, b in zip(pointer, p)) == 1 for p in parents]
            assert any(near) or pointer[::-1] in parents
        # The policy's own log-probability.
        query, pool = jax.tree.map(lambda x: x[0], world.queries.table.read(np.array([row])))
        ids = world.queries.pool_ids[row]
        actions = np.array([[ids.tolist().index(i) for i in p] for p in prompts])
        log_probs, _ = sequence_log_probs(world.policy, world.params, query, pool, actions)
        local = sources == "local_search"
        np.testing.assert_allclose(
            mined.log_probs[own][local], np.asarray(log_probs)[local], atol=1e-5
        )
    assert len(world.environment.scored) == len(set(world.environment.scored))


def test_a_local_search_that_was_stopped_goes_on_as_it_would_have(make_world):
    environment = FakeEnvironment(stop_after=13, stop_in_all=True)
    stopped, whole = make_world(environment=environment), make_world(name="whole")
    for world, stops in ((stopped, True), (whole, False)):
        arguments = ("near", world.queries, world.proposer, world.params, jax.random.key(1),
                     world.service, local_config())  # fmt: skip
        if stops:
            with pytest.raises(KeyboardInterrupt):
                mine(*arguments, shots=2)
            environment.stop_after = None
        mine(*arguments, shots=2)
    one, two = (w.store.get_proposals("near", w.queries.query_ids) for w in (stopped, whole))
    np.testing.assert_array_equal(one.pointers, two.pointers)
    assert one.sources == two.sources
    assert len(environment.scored) == len(set(environment.scored))


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"local_search": 20}, "local_search:20 is all of --proposals=20; it needs others"),
        ({"local_search": 18, "beam": 4}, "ask for 22 pointers, more than the 20 of a query"),
    ],
)
def test_quotas_of_mining_that_cannot_be_met(quotas, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, quotas=quotas)


def test_mining_resumes_without_scoring_twice(make_world):
    world = make_world(environment=FakeEnvironment(stop_after=None))
    world.environment.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        run_mine(world)
    world.environment.stop_after = None
    run_mine(world)
    run_mine(world)
    assert len(world.environment.scored) == len(set(world.environment.scored))
    assert len(world.environment.answered) == len(set(world.environment.answered))
    assert len(world.store.proposed_queries("mine")) == 12


def test_groups_hold_actions_and_rewards_of_the_kept_pointers(make_world):
    world = make_world()
    run_mine(world)
    groups = mined_groups("mine", world.queries, world.store, RewardConfig())
    assert len(groups.query_rows) == 12
    for row, pointers, rewards, mask in zip(
        groups.query_rows, groups.pointers, groups.rewards, groups.mask
    ):
        query = world.queries.query_ids[row]
        for pointer, reward in zip(pointers[mask], rewards[mask]):
            value = worth(query, world.queries.pool_ids[row][pointer])
            assert reward == pytest.approx(2.0 * (value >= 0.6) + value, abs=1e-6)


def test_failed_prompts_reach_no_group(make_world):
    world = make_world(environment=FakeEnvironment(failing={1004}))
    run_mine(world)
    groups = mined_groups("mine", world.queries, world.store, RewardConfig())
    assert 4 not in groups.query_rows
    assert len(groups.query_rows) == 11
    candidates = mined_candidates("mine", world.queries, world.store, RewardConfig(), CONFIG)
    assert candidates.failed.sum() == CONFIG.proposals
    assert np.isnan(candidates.reward[candidates.failed]).all()


def test_a_pointer_outside_its_pool_is_refused(make_world):
    world = make_world()
    stranger = np.setdiff1d(np.arange(40), world.queries.pool_ids[0])[0]
    with pytest.raises(InputError, match=r"query 1000.*outside its candidate pool"):
        group_batch(world.queries, np.array([1000]), np.array([[stranger, 1]]),
                    np.array([1.0]), np.array([0.0]))  # fmt: skip


@pytest.mark.parametrize("verify", ["all", "top_m"])
def test_on_policy_rounds_carry_the_policys_own_log_probs(make_world, verify):
    world = make_world()
    rows = np.array([2, 5, 11])
    groups, scores = on_policy_round(world, rows, verify)
    assert groups.query_rows.tolist() == rows.tolist()
    assert groups.pointers.shape == (3, 16, 2)
    if verify == "all":
        assert groups.mask.all()
    else:
        assert (groups.mask.sum(1) == 5).all()
    assert np.isfinite(scores["reward"]).all()
    for i, row in enumerate(rows):
        query, pool = jax.tree.map(lambda x: x[0], world.queries.table.read(np.array([row])))
        log_probs, _ = sequence_log_probs(
            world.policy, world.params, query, pool, groups.pointers[i]
        )
        mask = groups.mask[i]
        np.testing.assert_allclose(
            groups.behaviour_log_probs[i][mask], np.asarray(log_probs)[mask], atol=1e-5
        )


def on_policy_round(world, rows, verify, **options):
    key = jax.random.key(3)
    drawn = draw(world.proposer, world.params, key, rows, shots=2, group_size=16, **options)
    return judge(
        world.queries, drawn, world.service, RewardConfig(), verify=verify, config=CONFIG, label="x"
    )


def sbs_round(world, verify):
    return on_policy_round(world, np.array([2, 5, 11]), verify, draws="sbs")


def test_groups_without_replacement_train_with_their_inclusion_probabilities(make_world):
    world = make_world()
    groups, _ = sbs_round(world, "all")
    assert groups.mask.all()
    for pointers in groups.pointers.tolist():  # every pointer of a group is another one
        assert len(set(map(tuple, pointers))) == 16
    # 16 of 56 pointers: all are likelier to be in the sample than to be the first draw.
    assert (groups.inclusion_log_probs <= 0).all()
    assert (groups.inclusion_log_probs > groups.behaviour_log_probs).all()
    optimizer = make_optimizer(1e-3, steps=4)
    step = make_step("grpo", world.policy, optimizer, LossConfig(draws="sbs"))
    state = init_state(world.params, optimizer)
    for batch in Batches(groups, 2).epoch((0,)):  # the second is padded
        state, metrics = step(state, world.params, world.queries.table, batch)
        assert np.isfinite([float(value) for value in metrics.values()]).all()
        assert float(metrics["grad_norm"]) > 0
    assert step.programs() == 1


def test_groups_without_replacement_are_answered_whole(make_world):
    with pytest.raises(InputError, match="--draws=sbs weighs every pointer"):
        sbs_round(make_world(), "top_m")


def test_unknown_verify_names_the_flag(make_world):
    world = make_world()
    with pytest.raises(InputError, match="--verify=some is not one of all, top_m"):
        on_policy_round(world, np.array([0]), "some")


def test_retried_prompts_join_their_groups(make_world):
    """Mining, failures of three queries and a retry leave what mining without failures leaves."""
    clean = make_world(name="clean")
    world = make_world(environment=FakeEnvironment(failing={1002, 1005, 1007}))
    for each in (clean, world):
        run_mine(each)
    failed = world.store.get_proposals("mine", [1002, 1005, 1007])
    assert (failed.kept == 0).all()
    assert len(failed.kept) > 20
    world.environment.failing = frozenset()
    queries, bank = world.queries.query_ids, world.bank.ids
    assert world.service.retry_failed(queries, bank, label="x") == (len(failed.kept), 0)
    run_mine(world)
    kept = world.store.get_proposals("mine").kept
    np.testing.assert_array_equal(kept, clean.store.get_proposals("mine").kept)
    assert list(world.store.iter_scores()) == list(clean.store.iter_scores())
    asked = len(world.environment.answered)
    run_mine(world)
    assert len(world.environment.answered) == asked


# --- what a copy of the store left out ----------------------------------------------------------


class FailingAnswers(FakeEnvironment):
    """Answers nothing of query 1005."""

    def _answer_batch(self, queries, pointers):
        result = super()._answer_batch(queries, pointers)
        result.reasons.update({i: "it hung" for i, q in enumerate(queries) if int(q) == 1005})
        return result


def mined_rows(store):
    """What was mined, whatever the order of the queries."""
    mined = store.get_proposals("mine", np.sort(store.proposed_queries("mine")))
    rows = zip(mined.query_ids, mined.pointers.tolist(), mined.sources, mined.log_probs, mined.kept)
    return [(int(q), p, source, str(log_prob), int(kept)) for q, p, source, log_prob, kept in rows]


def mine_again(world, path):
    """Mines with the store at `path`; the prompts that were scored, and those answered."""
    world.store.close()
    world.store, world.environment = Store.open(path), FakeEnvironment()
    assert world.store.done("mine") is None
    world.service = ScoringService(world.store, world.environment, no_bar)
    run_mine(world)
    assert world.store.verify() == []
    return sorted(world.environment.scored), sorted(world.environment.answered)


def mine_and_close(world):
    run_mine(world)
    world.store.mark_done("mine", {"queries": 12})
    rows, records = mined_rows(world.store), list(world.store.iter_scores())
    world.store.close()
    return rows, records


# A table and the row of it that is damaged: of a prompt whose answer was generated.
@pytest.mark.parametrize("table", ["scores", "answers", "proposals", "counters"])
def test_what_salvage_lost_is_asked_for_again(make_world, table):
    world = make_world()
    rows, records = mine_and_close(world)
    lost = next(r for r in records if r.query_id == 1003 and r.how == "generated")
    pointer = np.array(lost.pointer, "<i8").tobytes()
    change = {
        "scores": "UPDATE scores SET gt_prob = 0.99",
        "answers": "UPDATE answers SET accuracy = 0.99",
        "proposals": "UPDATE proposals SET log_prob = 0.99",
        "counters": "UPDATE counters SET checksum = x'00' WHERE name = 'proposals'",
    }[table]
    db = sqlite3.connect(world.store.path)
    db.execute("PRAGMA secure_delete = ON")
    where, key_ = "", ()
    if table != "counters":
        where, key_ = " WHERE query_id = 1003 AND pointer = ?", (pointer,)
    assert db.execute(change + where, key_).rowcount == 1
    db.commit()
    db.close()
    out = world.store.path.with_name("saved")
    saved = salvage(world.store.path, out)
    assert saved.left_out["proposals"] == (
        20 if table == "scores" else 240 - (table == "proposals")
    )
    prompt = key(lost.query_id, lost.pointer)
    scored, answered = mine_again(world, out)
    assert scored == ([prompt] if table == "scores" else [])
    assert answered == ([prompt] if table in ("scores", "answers") else [])
    assert mined_rows(world.store) == rows
    assert list(world.store.iter_scores()) == records


@pytest.mark.parametrize("verb", ["score", "answer"])
def test_failures_that_a_filter_dropped_are_asked_for_again(make_world, verb):
    clean = make_world(name="clean")
    rows, records = mine_and_close(clean)
    environment = FakeEnvironment(failing={1005}) if verb == "score" else FailingAnswers()
    world = make_world(environment=environment)
    _, failed = mine_and_close(world)
    out = world.store.path.with_name("rest")
    left_out = filter_store(world.store.path, out, drop_failed=True)
    assert left_out["proposals"] == 20
    scored, answered = mine_again(world, out)
    lost = sorted(key(r.query_id, r.pointer) for r in failed if r.eval_failed is not None)
    assert len(lost) > 2
    own = sorted(key(r.query_id, r.pointer) for r in records
                 if r.query_id == 1005 and r.how == "generated")  # fmt: skip
    assert scored == (lost if verb == "score" else [])
    assert answered == own
    assert verb == "score" or own == lost
    assert mined_rows(world.store) == rows
    assert list(world.store.iter_scores()) == records
