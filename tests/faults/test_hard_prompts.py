"""Corrupt images and prompts that crash the worker: exactly those fail, with reasons."""

import json
import re
import shutil
import subprocess
import sys

import mining_job
import numpy as np
import pytest
import small_mine
from faults.injection import chosen
from progress import no_bar
from worker_settings import SETTINGS

from lever_jax.scoring import ScoringService
from lever_jax.store import Store
from qwen_bridge.client import Environment
from qwen_bridge.errors import InputError
from qwen_bridge.vqa.sources import open_dataset

SEED, KILLING, CORRUPT = 5, 0.01, 0.1
TOLERANCE = 1e-4  # Nats: batches of other sizes round otherwise.


def scored(path, queries, pointers, factory, settings, **options):
    """The records of all prompts after both stages, and what the environment counted."""
    with (
        Environment(settings, factory=factory, workers=2, threads=1, **options) as environment,
        Store.open(path, {"model": "any"}) as store,
    ):
        service = ScoringService(store, mining_job.Batched(environment), no_bar)
        return service.verify(queries, pointers, label="prompts"), environment.stats


def compare(records, clean, failing):
    """Exactly the failing rows have a reason, which is returned; the others are as in `clean`."""
    failed = [row for row, record in enumerate(records) if record.eval_failed is not None]
    assert failed == np.flatnonzero(failing).tolist()
    for record, expected in zip(records, clean):
        assert expected.eval_failed is None
        if record.eval_failed is None:
            assert record.gt_prob == pytest.approx(expected.gt_prob, abs=TOLERANCE)
            np.testing.assert_allclose(
                record.answer_log_probs, expected.answer_log_probs, atol=TOLERANCE
            )
            assert record.prediction == expected.prediction
            assert record.accuracy == expected.accuracy
        else:
            assert (record.gt_prob, record.accuracy, record.prediction) == (None, None, None)
    return [records[row].eval_failed for row in failed]


def test_prompts_that_kill_the_worker(tmp_path, story):
    rng = np.random.default_rng(SEED)
    queries = np.repeat(np.arange(40), 5)
    pointers = rng.integers(0, 1000, (len(queries), 2))
    kills = chosen(queries, pointers, KILLING, SEED)
    assert 2 <= kills.sum() <= 4
    plain = {"delay_s": 0.001}
    deadly = {"fault": "crash_during", "prompts": KILLING, "seed": SEED}
    run = (queries, pointers, "trivial_scorer:build")
    clean, _ = scored(tmp_path / "clean.sqlite", *run, plain)
    records, stats = scored(
        tmp_path / "deadly.sqlite", *run, {**plain, "faults": [deadly]}, backoff_s=0.01
    )
    reasons = compare(records, clean, kills)
    assert all("exit code 3" in reason for reason in reasons)
    assert stats["prompts_given_up"] == kills.sum()
    story.append(
        f"{kills.sum()} of {len(queries)} prompts kill the worker: those eval_failed, "
        f"{stats['restarts']} restarts"
    )


def files_of(world, role, examples, folder):
    """A JSONL data set of some examples with their pictures as files."""
    folder.mkdir()
    lines = []
    for example in examples:
        name = f"{role}{example.id}.png"
        world.load_image(example.image).save(folder / name)
        line = {"image": name, "question": example.question, "answers": list(example.answers)}
        lines.append(json.dumps(line))
    path = folder / f"{role}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def corrupt(path, rng):
    """Damages a picture so that it cannot be decoded."""
    whole = path.read_bytes()
    how = rng.integers(4)
    if how == 0:
        path.write_bytes(whole[: len(whole) // 2])
    elif how == 1:
        path.write_bytes(rng.bytes(len(whole)))
    elif how == 2:
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.faults
def test_corrupt_images_and_prompts_that_kill_the_embedded_model(tmp_path, story, monkeypatch):
    rng = np.random.default_rng(SEED)
    world = open_dataset({"kind": "digits", "seed": 0, "bank": 60, "train": 40, "eval": 1})
    parts = {
        "bank_jsonl": str(files_of(world, "bank", world.bank, tmp_path / "bank")),
        "query_jsonl": str(files_of(world, "query", world.train, tmp_path / "query")),
    }
    data = {"kind": "jsonl", "num_train": 39, "num_eval": 1, "seed": 0, **parts}
    data |= {"bank_images": "", "query_images": ""}
    dataset = open_dataset(data)
    bank = {one.id: one.image for one in dataset.bank}
    asked = {one.id: one.image for one in dataset.train}
    queries = np.repeat(list(asked), 15)
    pointers = rng.permuted(np.tile(list(bank), (len(queries), 1)), axis=1)[:, :2]
    settings = {**SETTINGS, "dataset": data}
    run = (queries, pointers, "faults.injection:build", settings)
    clean, _ = scored(tmp_path / "clean.sqlite", *run)

    images = sorted({*bank.values(), *asked.values()})
    bad = set(rng.choice(images, round(CORRUPT * len(images)), replace=False).tolist())
    for image in bad:
        corrupt(dataset.load_image.path(image), rng)
    monkeypatch.setenv("LEVER_FAULTS", f"crash@prompts={KILLING},seed={SEED}")
    kills = chosen(queries, pointers, KILLING, SEED)
    broken = np.array(
        [asked[q] in bad or any(bank[i] in bad for i in p) for q, p in zip(queries, pointers)]
    )
    assert kills.sum() >= 2
    assert broken.sum() > 50
    records, stats = scored(tmp_path / "bad.sqlite", *run)
    reasons = compare(records, clean, broken | kills)
    assert all("image" in r or "exit code 3" in r for r in reasons)
    assert sum("exit code 3" in r for r in reasons) == kills.sum() == stats["prompts_given_up"]
    story.append(
        f"{len(bad)} of {len(images)} images corrupt, {kills.sum()} of {len(queries)} prompts kill "
        f"the worker: those {len(reasons)} eval_failed, {stats['restarts']} restarts"
    )


@pytest.mark.faults
def test_a_run_over_corrupt_images(tmp_path, story):
    """The real entry point: broken demonstrations are in no pool, broken queries fail by name.

    All else is, record for record, what a run over sound files without these demonstrations gives.
    """
    rng = np.random.default_rng(SEED)
    world = open_dataset({"kind": "digits", "seed": 0, "bank": 120, "train": 32, "eval": 1})
    given, whole = tmp_path / "given", tmp_path / "whole"
    given.mkdir()
    for role, examples in (("bank", world.bank), ("query", world.train)):
        files_of(world, role, examples, given / role)
    shutil.copytree(given, whole)
    for role in ("bank", "query"):
        files = sorted((given / role).glob("*.png"))
        for place in rng.choice(len(files), round(CORRUPT * len(files)), replace=False):
            corrupt(files[place], rng)
    data = {"kind": "jsonl", "num_train": 24, "num_eval": 8, "seed": 0}
    data |= {"bank_images": "", "query_images": "", **jsonl(given)}
    dataset = open_dataset(data)
    images = {one.image for one in dataset.bank + dataset.train + dataset.eval}
    broken = {image for image in images if not readable(dataset, image)}
    assert len(broken) == 12 + 3

    def mine(workdir, folder, *flags):
        command = [sys.executable, "-m", "experiments.mine", *small_mine.FLAGS]
        command += ["--dataset=jsonl", "--model=embedded"]
        command += [f"--{name}={path}" for name, path in jsonl(folder).items()]
        command += [f"--workdir={tmp_path / workdir}", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    def stored(workdir):
        with Store.open(tmp_path / workdir / "store.sqlite", None, read_only=True) as store:
            assert store.verify() == []
            queries = np.array([example.id for example in dataset.train + dataset.eval])
            pools, _ = store.get_pools(queries)
            records = {(record.query_id, record.pointer): record for record in store.iter_scores()}
            return dict(zip(queries.tolist(), pools.tolist())), records

    refused = mine("refused", given)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    begins = (
        r"error: at least \d+ of 152 images \(.*%\) cannot be read, more than --max_bad_images="
    )
    assert re.match(begins + r"0\.01 allows: image (bank|query)/.*\.png: ", line)
    assert line.endswith("or raise the flag")

    for _ in range(2):  # The second asks for the same pools, and finds everything in the store.
        done = mine("run", given, "--max_bad_images=0.2")
        assert done.returncode == 0, done.stderr
        (said,) = [line for line in done.stdout.splitlines() if "images cannot be read" in line]
        assert "  15 images cannot be read, so 12 demonstrations are in no pool and every " in said
        assert said.count(" | ") == 3
    pools, records = stored("run")
    bank = {example.id: example.image for example in dataset.bank}
    assert not broken & {bank[i] for pool in pools.values() for i in pool}
    asked = {example.id: example.image for example in dataset.train}
    lost = {query for query, image in asked.items() if image in broken}
    assert lost
    assert {query for query, _ in records} == asked.keys()
    failed = [record for (query, _), record in records.items() if query in lost]
    for record in failed:
        assert asked[record.query_id].removeprefix("query/") in record.eval_failed

    lines = (whole / "bank" / "bank.jsonl").read_text().splitlines(keepends=True)
    sound = [line for line in lines if f"bank/{json.loads(line)['image']}" not in broken]
    (whole / "bank" / "bank.jsonl").write_text("".join(sound))
    assert mine("clean", whole).returncode == 0
    clean_pools, clean = stored("clean")
    unread = {example.id for example in dataset.train + dataset.eval if example.image in broken}
    for query in pools.keys() - unread:
        assert pools[query] == clean_pools[query]
    rest = [key for key in records if key[0] not in lost]
    assert set(rest) == {key for key in clean if key[0] not in lost}
    compare([records[k] for k in rest], [clean[k] for k in rest], np.zeros(len(rest), bool))
    story.append(
        f"experiments.mine: {len(broken)} of {len(images)} images corrupt: {len(failed)} of "
        f"{len(records)} prompts eval_failed, those of {len(lost)} queries; the rest as clean"
    )


def jsonl(folder):
    """The data of a folder with `bank` and `query` in it, as flags name them."""
    return {f"{role}_jsonl": str(folder / role / f"{role}.jsonl") for role in ("bank", "query")}


def readable(dataset, image):
    """Whether a picture can be decoded."""
    try:
        dataset.load_image(image)
    except InputError:
        return False
    return True
