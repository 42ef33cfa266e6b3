"""What is read back of a run without a VLM: rows, picks, ceilings; and RL JSON as rows."""

import json
import types

import numpy as np
import pytest
from absl.testing import flagsaver
from fake import FakeEnvironment
from small_world import World
from test_mining import CONFIG, run_mine

from experiments import ceiling, settings, stored, watch
from lever_jax.diagnostics import analyze
from lever_jax.errors import InputError
from lever_jax.mining import RewardConfig, mined_candidates, positions_in_pool
from lever_jax.rl_candidates import candidates_of
from lever_jax.rl_json import export_rl_json, read_rl_json
from lever_jax.search import search_pools


@pytest.fixture(autouse=True)
def parsed():
    settings.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(train_shots=2, warmup_beam=3, verify_uniform=CONFIG.verify_uniform):
        yield


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """A mined world; tests add scores to its store and change none."""
    world = World(tmp_path_factory.mktemp("world"), FakeEnvironment(failing={1004}))
    run_mine(world)
    yield world
    world.store.close()


def rows_of(world):
    return mined_candidates("mine", world.queries, world.store, RewardConfig(), CONFIG)


def test_positions_are_places_in_the_pool(mined):
    candidates = rows_of(mined)
    row = np.searchsorted(mined.queries.query_ids, candidates.query_id)
    again = mined.queries.demo_ids(row, candidates.position)
    np.testing.assert_array_equal(again, candidates.pointer)
    strange = positions_in_pool(mined.queries, np.array([1000]), np.array([[999, -1]]))
    assert strange.tolist() == [[-1, -1]]
    assert set(candidates.reason[candidates.failed]) == {"broken"}
    assert (candidates.reason[~candidates.failed] == "").all()


def test_an_export_gives_the_figures_of_the_run(mined, tmp_path):
    candidates = rows_of(mined)
    path = tmp_path / "rl.json"
    export_rl_json(mined.store, path, stage="mine", describe=lambda query_id: {"question": "?"})
    _, entries = read_rl_json(path)
    read = candidates_of(entries, RewardConfig(), CONFIG.verify_uniform)
    ours, theirs = (analyze(c._replace(log_prob=None), resamples=50) for c in (candidates, read))
    assert theirs == ours
    np.testing.assert_array_equal(read.sampled, candidates.sampled)


def test_a_file_without_a_uniform_sample_counts_all_that_was_answered(mined, tmp_path):
    path = tmp_path / "rl.json"
    export_rl_json(mined.store, path, stage="mine", describe=lambda query_id: {})
    _, entries = read_rl_json(path)
    read = candidates_of(entries, RewardConfig(), CONFIG.proposals)  # more than were drawn
    assert read.sampled is None
    similar = RewardConfig(similarity_weight=0.5)
    _, entries = read_rl_json(path)
    assert np.isfinite(candidates_of(entries, similar, 2).reward).any()
    assert len(candidates_of([], RewardConfig(), 2).query_id) == 0


def session_of(world, workdir):
    return types.SimpleNamespace(
        train=world.queries,
        service=world.service,
        store=world.store,
        environment=world.environment,
        workdir=workdir,
        policy=types.SimpleNamespace(stops=False),
    )


def test_the_ceiling_is_what_a_wider_search_finds(mined, tmp_path):
    content = ceiling.search_ceiling(session_of(mined, tmp_path), "mine", 6)
    assert json.loads((tmp_path / stored.CEILING).read_text()) == content
    found = dict(zip(content["found"]["query_id"], content["found"]["accuracy"]))
    assert len(found) == 6
    oracle = rows_of(mined)
    for query_id, accuracy in found.items():
        own = oracle.accuracy[oracle.query_id == query_id]
        if query_id == 1004:
            assert accuracy is None
            continue
        row = int(np.searchsorted(mined.queries.query_ids, query_id))
        (best, values), *_ = search_pools(
            mined.queries, np.array([row]), mined.service, shots=2, beam=6, label="again"
        )
        assert accuracy == float(values[0] >= 0.6)  # what the fake VLM answers
        assert len(best)
        assert own[np.isfinite(own)].max() <= 1
    # The fake VLM says the same each time.
    assert content["rescored"]["hard_differs"]["value"] == 0
    assert content["rescored"]["gt_prob_difference"]["value"] == pytest.approx(0, abs=1e-6)


def test_known_picks_ask_the_vlm_nothing(mined, tmp_path):
    session, rows = session_of(mined, tmp_path), np.arange(12)
    pointers = np.tile(np.array([[1, 0]], np.int32), (12, 1))
    scored = len(mined.environment.scored)
    before = watch.known_picks(session, pointers, rows)
    assert before["similarity_overlap"] == 1
    assert len(mined.environment.scored) == scored
    ids = mined.queries.demo_ids(rows, pointers)
    records = mined.service.verify(mined.queries.query_ids, ids, label="x")
    known = [record for record in records if record.eval_failed is None]
    after = watch.known_picks(session, pointers, rows)
    assert after["greedy_known"] == len(known) / 12
    assert after["greedy_accuracy"] == pytest.approx(np.mean([r.accuracy for r in known]))
    expected = np.mean([2 * (r.accuracy > 0) + r.gt_prob for r in known])
    assert after["greedy_reward"] == pytest.approx(expected, abs=1e-6)
    far = watch.known_picks(session, pointers + np.array([[0, 4]], np.int32), rows)
    assert far["similarity_overlap"] == 0.5
    assert watch.known_picks(session, np.full((12, 2), -1), rows) == {}


def test_a_warning_is_said_once_and_survives_a_resume(tmp_path, capsys):
    rows = [{"step": i, "flat_share": 1.0} for i in range(1, 21)]
    first = watch.Watch(tmp_path, "r", 0)
    first(rows[:10])
    first(rows[10:])
    assert capsys.readouterr().out.count("all groups flat") == 1
    lines = [json.dumps({"phase": "grpo", "recipe": "r", **row}) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    resumed = watch.Watch(tmp_path, "r", 15)
    resumed(rows[15:])
    assert "all groups flat" not in capsys.readouterr().out


def test_a_workdir_without_a_store_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="has no store yet"):
        stored.read_run(tmp_path, None)
