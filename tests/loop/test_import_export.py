"""Import and export by their entry points, on files: lossless, and refused where in doubt."""

import json
import subprocess
import sys

import numpy as np
import pytest
from entries import ROOT, run_commands

from lever_jax.store import ScoreRecord, Store
from qwen_bridge.vqa.sources import open_dataset

WORLD = ("--dataset=digits", "--num_queries=30", "--num_eval=10", "--bank_size=100", "--shots=1,2")


@pytest.fixture(scope="module")
def dataset():
    return open_dataset({"kind": "digits", "seed": 0, "bank": 100, "train": 30, "eval": 10})


def theirs(dataset, *, seed=0, beams=False):
    """A file as another group would write it: local pointers, few fields, some of their own."""
    rng = np.random.default_rng(seed)
    content = {}
    for example in dataset.train[5:25]:
        others = [d.id for d in dataset.bank if d.image != example.image]
        pool = [int(i) for i in rng.permutation(others)[:6]]
        candidates = []
        for pointer in {tuple(map(int, rng.permutation(6)[:2])) for _ in range(5)}:
            accuracy = round(float(rng.choice([0.0, rng.random()])), 3)
            one = {"pointer": list(pointer), "rank": len(candidates)}
            if beams:
                one["beam_score"] = -accuracy
            elif rng.random() < 0.1:
                one |= {"eval_failed": True, "vqa_pred_answer": "", "vqa_acc_score": 0.0}
            else:
                one |= {"vqa_correct": int(accuracy > 0), "vqa_acc_score": accuracy}
                if rng.random() < 0.5:
                    one["vqa_gt_prob"] = accuracy / 3
            candidates.append(one)
        content[str(example.id)] = {
            "query": {"question": example.question, "difficulty": "hard"},
            "candidate_pool_ids": pool,
            "pointer_candidates": candidates,
            "annotator": [1, 2.5, None],
        }
    return content


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def mined_run(folder, dataset):
    """A workdir as mining leaves it, with every kind of score; no VLM is needed to write one."""
    folder.mkdir()
    (folder / "flags.txt").write_text("\n".join(WORLD) + "\n")
    rng = np.random.default_rng(1)
    with Store.open(folder / "store.sqlite", {"dataset": dataset.fingerprint, "model": "x"}) as s:
        for example in dataset.train:
            others = [d.id for d in dataset.bank if d.image != example.image]
            pool = rng.permutation(others)[:8]
            s.put_pools([example.id], pool[None], rng.random((1, 8), np.float32))
            pointers = np.array(sorted({tuple(rng.permutation(pool)[:2]) for _ in range(6)}))
            records = []
            for i, pointer in enumerate(pointers[:-1].tolist()):
                record = ScoreRecord(example.id, tuple(pointer))
                if i == 0:
                    record.eval_failed = "out of memory"
                else:
                    record.gt_prob = float(rng.random())
                    record.answer_log_probs = -rng.random(3, np.float32)
                    record.margin = float(rng.normal())
                if i > 1:
                    record.accuracy, record.prediction = float(rng.random()), "drei \u00e9"
                    record.accuracy_official = record.confidence = record.similarity = 0.5
                    record.how = ("verified", "generated")[i % 2]
                records.append(record)
            s.put_scores(records)
            sources, ids = ["beam"] * len(pointers), [example.id] * len(pointers)
            log_probs = -rng.random(len(pointers), np.float32)
            kept = [record.accuracy is not None for record in records] + [False]
            s.put_proposals("mine_2_shots", ids, pointers, sources, log_probs, kept=kept)
    return folder


def content_of(folder):
    """Everything of a store that its export should carry."""
    with Store.open(folder / "store.sqlite", read_only=True) as store:
        proposals = store.get_proposals("mine_2_shots")
        # What nobody scored is not data, and is left out of the file.
        records = store.get_scores(proposals.query_ids, proposals.pointers)
        scored = [i for i, record in enumerate(records) if record is not None]
        assert 0 < len(scored) < len(records) or folder.name != "run"
        ids = np.unique(proposals.query_ids)
        assert all(problem.endswith("has no score") for problem in store.verify())
        return {
            "scores": list(store.iter_scores()),
            "proposals": [
                (
                    int(proposals.query_ids[i]),
                    proposals.pointers[i].tolist(),
                    proposals.sources[i],
                    float(proposals.log_probs[i]),
                    int(proposals.kept[i]),
                )
                for i in scored
            ],
            "pools": [store.get_pools([i])[0].tolist() for i in ids],
            "similarity": [store.get_pools([i])[1].tolist() for i in ids],
        }


def empty_run(folder, dataset):
    folder.mkdir()
    (folder / "flags.txt").write_text("\n".join(WORLD) + "\n")
    Store.open(folder / "store.sqlite", {"dataset": dataset.fingerprint, "model": "x"}).close()
    return folder


def test_import_export_import_is_lossless(tmp_path, dataset):
    source = write(tmp_path / "theirs.json", theirs(dataset))
    beams = write(tmp_path / "beams.json", theirs(dataset, beams=True))
    run = mined_run(tmp_path / "run", dataset)
    merged = empty_run(tmp_path / "merged", dataset)
    local = "--pointers=local"
    commands = [
        # A file of others, in and out and in again.
        ("import_rl", f"--workdir={tmp_path / 'a'}", f"--rl_json={source}", local, *WORLD),
        ("export", f"--workdir={tmp_path / 'a'}", "--data=imported", f"--out={tmp_path / '1'}"),
        ("import_rl", f"--workdir={tmp_path / 'b'}", f"--rl_json={tmp_path / '1'}", *WORLD),
        ("export", f"--workdir={tmp_path / 'b'}", "--data=imported", f"--out={tmp_path / '2'}"),
        # Beams.
        ("import_rl", f"--workdir={tmp_path / 'c'}", f"--rl_json={beams}", local, *WORLD)
        + ("--import_kind=beams",),
        # A mined run, out, into another run's store and out again.
        ("export", f"--workdir={run}", f"--out={tmp_path / '3'}"),
        ("import_rl", f"--workdir={merged}", f"--rl_json={tmp_path / '3'}", "--import_as=mined"),
        ("export", f"--workdir={merged}", f"--out={tmp_path / '4'}"),
        # The same as data of others.
        ("import_rl", f"--workdir={tmp_path / 'd'}", f"--rl_json={tmp_path / '3'}", *WORLD),
        ("export", f"--workdir={tmp_path / 'd'}", "--data=imported", f"--out={tmp_path / '5'}"),
        ("import_rl", f"--workdir={tmp_path / 'e'}", f"--rl_json={tmp_path / '5'}", *WORLD),
    ]
    assert run_commands(*commands) == [""] * len(commands)

    first, second = ((tmp_path / name / "imported.json").read_bytes() for name in "ab")
    assert first == second == (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    ours = json.loads(first)
    assert ours.pop("_meta")["source"]["file"] == "theirs.json"
    expected = theirs(dataset)
    assert list(ours) == list(expected)
    for key, entry in expected.items():
        own, pool = ours[key], entry["candidate_pool_ids"]
        assert entry["query"].items() <= own["query"].items()
        assert (own["annotator"], own["candidate_pool_ids"]) == (entry["annotator"], pool)
        for one, mine in zip(entry["pointer_candidates"], own["pointer_candidates"], strict=True):
            assert mine["pointer_pos"] == one["pointer"]
            assert mine["pointer"] == [pool[action] for action in one.pop("pointer")]
            assert one.items() <= mine.items()
    kept = json.loads((tmp_path / "c" / "imported.json").read_text())
    assert kept["_meta"]["unlabelled"] is True

    assert content_of(merged) == content_of(run)
    assert (tmp_path / "3").read_bytes() == (tmp_path / "4").read_bytes()
    mined = json.loads((tmp_path / "3").read_text())
    assert len(mined) == 1 + len(dataset.train)
    example = dataset.train[0]
    assert mined[str(example.id)]["query"]["gt_answers_raw"] == list(example.answers)
    again = json.loads((tmp_path / "5").read_text())
    assert {k: v for k, v in again.items() if k != "_meta"} == {
        k: v for k, v in mined.items() if k != "_meta"
    }
    assert again["_meta"]["fingerprint"] == mined["_meta"]["fingerprint"]
    assert (tmp_path / "e" / "imported.json").read_bytes() == (tmp_path / "5").read_bytes()


def test_bad_input_is_refused_and_leaves_nothing(tmp_path, dataset):
    good, other = theirs(dataset), theirs(dataset, seed=1)
    key = next(iter(good))

    def changed(name, change):
        content = json.loads(json.dumps(good))
        change(content)
        return write(tmp_path / f"{name}.json", content)

    def import_(workdir, path, *flags):
        flags = ("--pointers=local", *flags, *WORLD)
        return ("import_rl", f"--workdir={tmp_path / workdir}", f"--rl_json={path}", *flags)

    def train_on_evaluation(content):
        content[str(dataset.eval[0].id)] = content.pop(key)

    def ask_another_question(content):
        content[key]["query"]["question"] = "What colour is the cat?"

    def contradict(content):
        content[key]["pointer_candidates"][0] |= {"vqa_correct": 1, "vqa_acc_score": 0.0}

    asked = changed("asked", ask_another_question)
    run = empty_run(tmp_path / "run", dataset)
    (tmp_path / "y").mkdir()
    write(tmp_path / "y" / "imported.json", good)
    theirs_path = write(tmp_path / "good.json", good)
    cases = [
        (import_("x", tmp_path / "none.json"), ["--rl_json=", "none.json is not a file"]),
        (import_("x", changed("held", train_on_evaluation)), ["evaluation query"]),
        (import_("x", asked), [f"query {key}", "the ids mean other examples"]),
        (import_("x", asked, "--import_partial"), ["the ids mean other examples"]),
        (import_("x", changed("both", contradict)), [f"query {key}", "vqa_correct is 1"]),
        (import_("x", theirs_path, "--train_shots=1"), ["has 2 demonstrations", "--train_shots"]),
        (import_("x", theirs_path, "--train_shots=1", "--import_partial"), ["no pointer that"]),
        (("import_rl", f"--workdir={tmp_path / 'x'}"), ["--rl_json is missing"]),
        (import_("x", theirs_path, "--import_as=mined"), ["has no store yet"]),
        (import_("run", theirs_path, "--import_as=mined"), ["does not say which model"]),
        (import_("y", theirs_path), ["was not written by experiments.import_rl"]),
        (("export", f"--workdir={run}"), ["--out is missing"]),
        (("export", f"--workdir={run}", f"--out={tmp_path / 'o'}"), ["has mined nothing"]),
        (("export", f"--workdir={run}", f"--out={tmp_path}"), ["is not the name of a file"]),
        (
            ("export", f"--workdir={run}", f"--out={tmp_path / 'o'}", "--data=imported"),
            ["has imported nothing"],
        ),
        (("export", f"--workdir={tmp_path / 'x'}", f"--out={tmp_path / 'o'}"), ["no flags.txt"]),
        (import_("x", changed("held", train_on_evaluation), "--import_partial"), [""]),
        (import_("x", changed("held", train_on_evaluation), "--import_partial"), [""]),
        (import_("x", write(tmp_path / "other.json", other)), ["has imported held.json already"]),
    ]
    for (command, words), said in zip(cases, run_commands(*(c for c, _ in cases)), strict=True):
        assert words == [""] if said == "" else said.startswith("error: "), (command, said)
        for word in words:
            assert word in said, (command, said)
    assert not (tmp_path / "o").exists()
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["imported.json"]


@pytest.mark.slow
def test_a_run_trains_on_imported_data_beside_its_own(tmp_path, dataset):
    source = write(tmp_path / "theirs.json", theirs(dataset))
    workdir = tmp_path / "run"
    small = (
        *WORLD, "--shots=2", f"--workdir={workdir}", "--pool_size=12", "--proposals=8",
        "--quotas=beam:4", "--verify_best=3", "--verify_low=1", "--warmup_epochs=2",
        "--rce_epochs=2", "--oracle_beam=0", "--random_seeds=1", "--grpo_epochs=0",
        "--reward_mode=hard_plus_soft",
    )  # fmt: skip

    def run(entry, *flags):
        command = [sys.executable, "-m", f"experiments.{entry}", *small, *flags]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
        )

    theirs_only = ("--warmup=import", "--rce_data=import")
    early = run("train", *theirs_only)
    assert early.returncode == 2
    assert "import them first: python -m experiments.import_rl" in early.stderr
    done = run("import_rl", f"--rl_json={source}", "--pointers=local")
    assert done.returncode == 0, done.stderr
    first = run("train", *theirs_only)
    assert first.returncode == 0, first.stderr
    assert "nothing is mined and no health is checked: --rce_data=import" in first.stdout
    with Store.open(workdir / "store.sqlite", read_only=True) as store:
        assert store.proposal_stages() == []  # Nothing of theirs is in the store.
    both = run("train", "--warmup=import", "--rce_data=both")
    assert both.returncode == 0, both.stderr
    assert "warmup was finished earlier" in both.stdout
    assert "rce was trained with other settings or data" in both.stdout
    with Store.open(workdir / "store.sqlite", read_only=True) as store:
        (stage,) = store.proposal_stages()
        assert stage.startswith("mine_2_shots_")
        assert len(store.proposed_queries(stage)) == 30
