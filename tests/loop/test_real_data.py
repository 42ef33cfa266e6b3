"""The whole job on real questions and photographs, with a Qwen2.5-VL that knows nothing.

The checkpoint has the real vocabulary, tokenizer and image processor, and random weights. So its
accuracy is zero whatever is shown to it, and what is proven is everything else: that real data
go through every phase, that the health check says what such a run is worth, that a run which is
killed goes on where it stopped and ends in the same place, and that it grows.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from worker_settings import SETTINGS

from lever_jax import checkpoint
from lever_jax.store import Store
from qwen_bridge import workers

ROOT = pathlib.Path(__file__).parents[2]
PHASES = ("warmup",)  # The rewards of every group are equal: RCE and GRPO learn nothing.
NUM_QUERIES, NUM_EVAL, BANK = 10, 6, 40
SMALL = (
    f"--num_queries={NUM_QUERIES} --num_eval={NUM_EVAL} --max_bank={BANK} --pool_size=8 "
    "--max_pixels=12544 --max_new_tokens=3 --threads=1 --width=16 --heads=2 --warmup_queries=4 "
    "--warmup_beam=2 --warmup_epochs=2 --proposals=8 --quotas=beam:2,sample:2,retrieval:2 "
    "--verify_best=2 --verify_low=2 --rce_epochs=2 --grpo_epochs=1 --grpo_queries=5 "
    "--group_size=2 --batch_queries=5 --oracle_beam=2 --random_seeds=1"
).split()


@pytest.fixture(scope="module")
def mini(shared):
    """The flags of the data, by name."""
    folder = shared / "vqav2_mini"
    flags = {"dataset": "official", "instruction": "Answer with a single word or a short phrase."}
    for role in ("bank", "query"):
        flags[f"{role}_questions"] = folder / f"{role}_questions.json"
        flags[f"{role}_annotations"] = folder / f"{role}_annotations.json"
        flags[f"{role}_images"] = folder / "train2014"
    return flags


def as_flags(named):
    return [f"--{name}={value}" for name, value in named.items()]


@pytest.fixture(scope="module")
def scorers(mini, random_qwen):
    """The fast and the plain scorer over the real data, in this process."""
    files = {name: str(value) for name, value in mini.items() if name.startswith(("bank", "query"))}
    settings = {
        **SETTINGS,
        "dataset": {
            "kind": "official", **files, "num_train": 4, "num_eval": 4, "seed": 0, "max_bank": BANK
        },
        "model": str(random_qwen),
        "max_pixels": 12_544,
        "instruction": mini["instruction"],
        "max_new_tokens": 3,
    }  # fmt: skip
    return [workers.build({**settings, "scorer": name})[0] for name in ("trie", "reference")]


def test_both_scorers_agree_on_real_photographs(scorers):
    dataset = scorers[0].dataset
    rng = np.random.default_rng(0)
    queries = np.repeat([example.id for example in dataset.train[:2]], 2)
    bank = [example.id for example in dataset.bank]
    pointers = np.array([rng.permutation(bank)[:2] for _ in queries])
    pointers[::2, 1] = -1  # one shot
    fast, plain = (scorer.score(queries, pointers) for scorer in scorers)
    assert fast.reasons == plain.reasons == {}
    np.testing.assert_allclose(fast.answer_log_probs, plain.answer_log_probs, atol=1e-4)
    # Two tokens of 151,936, and as many forms as there are, cannot be likely by chance.
    assert (plain.gt_prob > 0).all()
    assert (plain.gt_prob < 1e-6).all()
    fast, plain = (scorer.answer(queries, pointers) for scorer in scorers)
    assert fast.texts == plain.texts
    assert (plain.accuracy == 0).all()


# The job.


@pytest.fixture(scope="module")
def train(mini, random_qwen, tmp_path_factory):
    """Starts the job; compiled steps are shared between runs, which changes no number."""
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(workdir, *flags, **changes):
        named = {**mini, "model": random_qwen, "workdir": workdir, **changes}
        command = [sys.executable, "-m", "experiments.train", *as_flags(named), *SMALL, *flags]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def finish(process):
    """What a job that ends well prints."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    return out


def kill_at(process, words, seconds=0.0):
    """Kills the job, its driver at once and so its worker, some seconds after it prints `words`."""
    for line in process.stdout:
        if words in line:
            break
    else:
        pytest.fail(f"the job ended without {words!r}: {process.communicate()[1]}")
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it had ended before it was killed"


def read(workdir, name):
    return json.loads((workdir / name).read_text())


def stored(workdir):
    """Scores and answers by query and pointer, and how many were computed twice."""
    with Store.open(workdir / "store.sqlite", None, read_only=True) as store:
        assert store.verify() == []
        records = {(one.query_id, tuple(one.pointer)): one for one in store.iter_scores()}
        counts = store.counts()
    return records, counts["duplicate_scores"] + counts["duplicate_answers"]


def check_kept(before, after):
    """What was stored is stored still, to the bit; a score may have got its answer since."""
    for key, record in before.items():
        assert after[key].gt_prob == record.gt_prob
        if record.prediction is not None:
            assert after[key] == record


@pytest.fixture(scope="module")
def careful(train, tmp_path_factory):
    """A finished run that asked the health check, and what it printed."""
    workdir = tmp_path_factory.mktemp("careful")
    return workdir, finish(train(workdir))


@pytest.fixture(scope="module")
def forced(careful, train):
    """The same run, GRPO forced in the same workdir, and what that printed."""
    workdir = careful[0]
    before = stored(workdir)[0]
    return workdir, finish(train(workdir, "--force_grpo")), before


@pytest.mark.slow
def test_the_health_check_says_that_the_vlm_knows_nothing(careful):
    workdir, printed = careful
    health = read(workdir, "health.json")
    assert health["queries"] == NUM_QUERIES
    assert health["positive_rate"] == health["oracle_in_data"] == 0.0
    assert health["pct_zero_positive_query"] == health["pct_flat_reward_query"] == 1.0
    assert health["eval_failed"] == 0
    assert health["ready"] is False
    assert health["outcome"] == "vlm_knows_nothing"
    assert "pct_zero_positive_query=1 " in health["verdict"]
    assert "knows nothing of these questions, and more proposals will not help" in health["verdict"]
    assert "GRPO is not started: hardly one answer was right" in printed
    assert "RCE: the rewards of every group are equal" in printed
    assert not checkpoint.exists(workdir / "checkpoints" / "rce")
    assert not checkpoint.exists(workdir / "checkpoints" / "grpo")


@pytest.mark.slow
def test_every_phase_runs_and_eval_json_is_whole(forced):
    workdir, printed, before = forced
    for phase in PHASES:
        assert f"{phase} was finished earlier" in printed
    for phase in PHASES:
        assert checkpoint.read_metadata(workdir / "checkpoints" / phase)["phase"] == phase
    # GRPO ran, on groups that are flat one and all: there is no selector to show for it.
    assert "GRPO round 1" in printed
    assert "every group of every round was flat, nothing was learnt" in printed
    assert not checkpoint.exists(workdir / "checkpoints" / "grpo")
    result = read(workdir, "eval.json")
    assert result["n"] == NUM_EVAL
    for shots in ("1", "2"):
        rows = result["shots"][shots]
        assert {f"selector_{phase}" for phase in PHASES} < set(rows)
        assert {row["n"] for row in rows.values()} == {NUM_EVAL}
        assert {row["accuracy"] for row in rows.values()} == {0.0}
    records, twice = stored(workdir)
    assert twice == 0
    check_kept(before, records)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_in_the_same_place(forced, train, tmp_path):
    workdir, _, _ = forced
    kill_at(train(tmp_path, "--force_grpo"), "== mine", seconds=1.0)
    first, _ = stored(tmp_path)
    kill_at(train(tmp_path, "--force_grpo"), "GRPO round 1")
    second, _ = stored(tmp_path)
    check_kept(first, second)
    printed = finish(train(tmp_path, "--force_grpo"))
    assert "warmup was finished earlier" in printed
    assert read(tmp_path, "eval.json") == read(workdir, "eval.json")
    assert read(tmp_path, "health.json") == read(workdir, "health.json")
    expected, (actual, twice) = stored(workdir)[0], stored(tmp_path)
    assert twice == 0
    check_kept(second, actual)
    assert actual.keys() == expected.keys()
    for key, record in expected.items():
        assert actual[key].gt_prob == pytest.approx(record.gt_prob, rel=1e-3)
        assert actual[key].prediction == record.prediction
    for phase in PHASES:
        ours, theirs = (
            checkpoint.read_metadata(folder / "checkpoints" / phase)
            for folder in (tmp_path, workdir)
        )
        assert ours["recipe"] == theirs["recipe"]


@pytest.mark.slow
def test_a_run_grows_in_its_workdir_but_for_its_bank(forced, train):
    workdir, _, _ = forced
    before, _ = stored(workdir)
    more = train(workdir, f"--num_queries={NUM_QUERIES + 4}", f"--num_eval={NUM_EVAL + 3}")
    printed = finish(more)
    assert f"mining 4/4 queries: {4 * 8} in" in printed
    assert read(workdir, "health.json")["queries"] == NUM_QUERIES + 4
    assert read(workdir, "eval.json")["n"] == NUM_EVAL + 3
    records, twice = stored(workdir)
    assert twice == 0
    check_kept(before, records)
    assert len(before) < len(records)
    bad = train(workdir, f"--max_bank={BANK + 60}")
    _, said = bad.communicate(timeout=900)
    assert bad.returncode == 2
    assert "another candidate pool" in said.strip().splitlines()[-1]
    assert "--max_bank" in said.strip().splitlines()[-1]


# Wrong input.


WRONG = {
    "no image folder": (
        lambda mini: {"bank_images": "/nowhere"},
        "--bank_images=/nowhere is not a folder",
    ),
    "annotations of the other split": (
        lambda mini: {"bank_annotations": mini["query_annotations"]},
        "bank_questions.json: question_id 3602003 (and 339 more) has no annotation in",
    ),
    "annotations as questions": (
        lambda mini: {"query_questions": mini["query_annotations"]},
        "has no list 'questions'; give the questions file of the split",
    ),
    "a pattern without image_id": (
        lambda mini: {"image_pattern": "{id}.jpg"},
        "--image_pattern={id}.jpg must contain {image_id}",
    ),
    "a pattern that names no file": (
        lambda mini: {"image_pattern": "{image_id}.jpg"},
        "no such image; check --bank_images and --image_pattern",
    ),
    "more queries than images allow": (
        lambda mini: {"num_queries": 150, "num_eval": 8},
        "at most --num_queries=",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_with_the_mend(mini, train, tmp_path, case):
    change, words = WRONG[case]
    changes = change(mini)
    sizes = [f"--{name}={changes.pop(name)}" for name in list(changes) if name.startswith("num_")]
    bad = train(tmp_path, *sizes, **changes)
    _, said = bad.communicate(timeout=300)
    assert bad.returncode == 2, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
