"""The main job, small: trains, resumes, evaluates again, refuses bad input."""

import collections
import json

import pytest
from warm import run

from lever_jax import checkpoint
from lever_jax.store import Store


def metrics(workdir):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_everything_is_in_the_workdir(trained):
    workdir, _, printed = trained
    for name in ("flags.txt", "metrics.jsonl", "health.json", "health.csv", "eval.json"):
        assert (workdir / name).stat().st_size > 0, name
    assert list((workdir / "tensorboard").iterdir())
    for phase in ("warmup", "rce", "grpo"):
        assert checkpoint.read_metadata(workdir / "checkpoints" / phase)["phase"] == phase
    result = json.loads((workdir / "eval.json").read_text())
    assert (result["n"], sorted(result["shots"])) == (30, ["1", "2"])
    methods = {
        "zero_shot", "random", "similarity_image", "similarity_question", "similarity_joint",
        "similarity_image_reversed", "similarity_question_reversed", "similarity_joint_reversed",
        "mmr", "selector_warmup", "selector_rce", "selector_grpo", "oracle_in_pool",
    }  # fmt: skip
    for rows in result["shots"].values():
        assert set(rows) == methods
        for row in rows.values():
            assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
            assert row["n"] == 30
    assert "0 scored twice" in printed
    assert {row["phase"] for row in metrics(workdir)} == {"warmup", "rce", "grpo"}


def test_the_report_and_its_figures_are_in_the_workdir(trained):
    workdir, _, printed = trained
    result = json.loads((workdir / "analysis.json").read_text())
    health = json.loads((workdir / "health.json").read_text())
    assert result["stage"] == health["stage"]
    assert result["trained"] == "GRPO"
    for name in ("queries", "positive_rate", "spearman_gt_prob_accuracy", "model_pick", "headroom"):
        assert result["health"][name] == health[name]
    assert result["health"]["training_use"] is not None
    assert (workdir / "analysis.csv").read_text().startswith("section,series,figure,x,n,value")
    text = (workdir / "report.html").read_text()
    assert len(text) < 5 * 2**20
    for part in ("Verdict", "selector_grpo", "Calibration", "grpo: KL", "Gallery", "data:image/"):
        assert part in text
    assert "report.html" in printed
    assert "VLM: embedded, 1 worker on cpu, float32\n" in printed
    rows = [row for row in metrics(workdir) if row["phase"] == "grpo"]
    assert all(0 <= row["similarity_overlap"] <= 1 for row in rows)


def test_a_run_is_analyzed_again_and_another_file_without_a_run(trained, tmp_path):
    workdir, _, _ = trained
    before = json.loads((workdir / "analysis.json").read_text())
    again = run("analyze", f"--workdir={workdir}", f"--analysis={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "analysis.json").read_text()) == before
    for flags, words in (
        ([f"--workdir={tmp_path}"], "holds no run"),
        (["--rl_json=/no/such.json"], "--rl_json=/no/such.json is not a file"),
        (["--rl_json=x.json", "--ceiling_queries=5"], "--ceiling_queries asks a VLM"),
    ):
        bad = run("analyze", *flags)
        assert bad.returncode == 2, bad.stderr
        assert words in bad.stderr.strip().splitlines()[-1]


def test_picks_add_up_to_the_table(trained):
    workdir, _, _ = trained
    table = json.loads((workdir / "eval.json").read_text())["shots"]
    picks = [json.loads(line) for line in (workdir / "picks.jsonl").read_text().splitlines()]
    own = collections.defaultdict(list)
    for pick in picks:
        own[str(pick["shots"]), pick["method"]].append(pick["accuracy"])
        assert len(pick["demonstrations"]) == len(pick["pointer_pos"]) == pick["shots"]
        assert pick["how"] in ("verified", "generated")
    assert set(own) - {("0", "zero_shot")} == {
        (shots, method) for shots in table for method in table[shots] if method != "zero_shot"
    }
    for (shots, method), accuracies in own.items():
        row = table["1" if shots == "0" else shots][method]
        assert sum(accuracies) / len(accuracies) == pytest.approx(row["accuracy"], abs=1e-6)
        by_type = row["by_answer_type"].values()
        assert sum(one["n"] for one in by_type) == row["n"]
        mean = sum(one["n"] * one["accuracy"] for one in by_type) / row["n"]
        assert mean == pytest.approx(row["accuracy"], abs=1e-6)


def test_the_policy_that_sampled_is_the_one_that_is_trained(trained):
    rows = [row for row in metrics(trained[0]) if row["phase"] == "grpo"]
    # The first step of a round is on-policy; later ones have moved.
    assert rows[0]["behaviour_drift"] <= 1e-5
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_nothing_was_scored_twice_and_the_store_is_sound(trained):
    with Store.open(trained[0] / "store.sqlite", None, read_only=True) as store:
        assert store.counts()["duplicate_scores"] == 0
        assert store.counts()["duplicate_answers"] == 0
        assert store.verify() == []


def test_a_second_run_resumes_and_scores_nothing(trained):
    workdir, _, _ = trained
    before = json.loads((workdir / "eval.json").read_text())
    # As the README says, the file repeats the run.
    again = run("train", f"--flagfile={workdir / 'flags.txt'}")
    assert again.returncode == 0, again.stderr
    for phase in ("warmup", "rce", "grpo"):
        assert f"{phase} was finished earlier" in again.stdout
    assert " 0 scored," in again.stdout
    assert json.loads((workdir / "eval.json").read_text()) == before


def test_evaluation_in_a_new_process_prints_the_same_numbers(trained, tmp_path):
    workdir, _, _ = trained
    before = json.loads((workdir / "eval.json").read_text())
    out = tmp_path / "eval.json"
    again = run("evaluate", f"--workdir={workdir}", f"--out={out}")
    assert again.returncode == 0, again.stderr
    assert json.loads(out.read_text()) == before
    only = run("evaluate", f"--workdir={workdir}", "--phase=rce", "--shots=3", f"--out={out}")
    assert only.returncode == 0, only.stderr
    rows = json.loads(out.read_text())["shots"]
    assert list(rows) == ["3"]
    assert [name for name in rows["3"] if name.startswith("selector")] == ["selector_rce"]
    assert json.loads((workdir / "eval.json").read_text()) == before
    assert (workdir / "picks_rce_shots-3.jsonl").exists()


def test_two_runs_are_compared_without_a_vlm(trained, tmp_path):
    workdir, _, _ = trained
    flags = (f"--workdir={workdir}", f"--compare={workdir}", "--model=/no/such/folder")
    out = tmp_path / "comparison.json"
    done = run("evaluate", *flags, f"--out={out}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["method"] for row in rows} >= {"zero_shot", "selector_grpo", "oracle_in_pool"}
    assert all((row["diff"], row["n"], row["same_prompt"]) == (0, 30, 1) for row in rows)
    bad = run("evaluate", *flags[:1], f"--compare={tmp_path}")
    assert bad.returncode == 2
    assert "picks.jsonl" in bad.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("entry", "flags", "words"),
    [
        ("train", ["--reward_mode=guess"], ["reward_mode", "guess", "hard01_plus_gtprob"]),
        ("train", ["--no_such_flag=1"], ["no_such_flag"]),
        ("train", ["--bank_size=20", "--pool_size=32"], ["--pool_size=32", "20", "lower it"]),
        ("train", ["--shots=5", "--pool_size=4"], ["--shots=5", "--pool_size=4"]),
        ("train", ["--model=/no/such/folder"], ["--model=/no/such/folder", "not a folder"]),
        ("train", ["--quotas=beam"], ["--quotas", "source:count"]),
        ("train", ["--quotas=magic:3"], ["magic", "beam"]),
        ("train", ["--pool_shares=sound:3"], ["--pool_shares", "sound", "question"]),
        ("train", ["--pool_shares=image:8,random:25"], ["add up to 33", "--pool_size=32"]),
        ("train", ["--dataset=official"], ["--dataset=official needs --bank_questions"]),
        ("train", ["--batch_queries=0"], ["--batch_queries=0", "positive"]),
        ("train", ["--group_size=1"], ["group_size", "2"]),
        ("train", ["--seed=-1"], ["seed", "non-negative"]),
        ("train", ["--tau=0"], ["tau"]),
        ("train", ["--shots="], ["--shots is empty"]),
        ("train", ["--device=cpu:x"], ["--device=cpu:x"]),
        ("train", ["--device=gpu", "--plan"], ["--device=gpu", "cuda:N"]),
        ("train", ["--device=cuda:1", "--workers=2"], ["--workers=2 on one GPU", "--device=cuda"]),
        ("train", ["--bank_jsonl=b.jsonl"], ["--bank_jsonl is given", "add --dataset=jsonl"]),
        ("mine", ["--query_questions=q.json"], ["--query_questions", "add --dataset=official"]),
        (
            "train",
            ["--dataset=jsonl", "--bank_jsonl=b.jsonl", "--query_jsonl=q.jsonl", "--plan"],
            ["--dataset=jsonl needs --model", "--model=embedded"],
        ),
        ("train", ["--heads=3"], ["--width=64 is not a multiple of --heads=3", "--width=66"]),
        ("train", ["--quotas=beam:100"], ["ask for 100 pointers", "--proposals"]),
        ("import_rl", ["--rl_json=/no/such.json"], ["--rl_json=/no/such.json is not a file"]),
        ("evaluate", [], ["holds no run"]),
        ("evaluate", ["--out=/no/such/folder/x.json"], ["--out=", "does not exist"]),
        ("train", ["--decodings=gredy"], ["--decodings", "gredy", "greedy, beam"]),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, entry, flags, words):
    bad = run(entry, f"--workdir={tmp_path}", *flags)
    assert bad.returncode == 2, bad.stdout + bad.stderr
    assert "Traceback" not in bad.stderr
    last = bad.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last


def test_a_checkpoint_of_another_architecture_is_refused(trained):
    workdir, _, _ = trained
    bad = run("evaluate", f"--workdir={workdir}", "--width=32")
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    assert "holds a selector with width=64, not width=32" in bad.stderr.strip().splitlines()[-1]


def test_another_pool_in_the_same_workdir_is_refused_and_nothing_is_lost(trained):
    workdir, flags, _ = trained
    bad = run("train", *flags, "--pool_size=10")
    assert bad.returncode == 2
    assert "another candidate pool" in bad.stderr
    with Store.open(workdir / "store.sqlite", None, read_only=True) as store:
        assert store.verify() == []
