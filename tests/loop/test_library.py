"""The selector as a library: the picks of the run itself, alone and in a batch, and the README."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from main_job import ROOT

from lever_jax.demonstrations import DemonstrationSelector
from lever_jax.errors import InputError as PolicyInputError
from qwen_bridge.encoding import RunEncoder
from qwen_bridge.errors import InputError
from qwen_bridge.vqa.sources import open_dataset


@pytest.fixture(scope="module")
def encoder(trained):
    return RunEncoder.open(trained[0], device="cpu")


@pytest.fixture(scope="module")
def selector(trained, encoder):
    return DemonstrationSelector.restore(trained[0], encoder)


@pytest.fixture(scope="module")
def queries(trained):
    """Evaluation queries of the run: id to picture and question, as if nobody knew them."""
    run = json.loads((trained[0] / "run.json").read_text())
    dataset = open_dataset(run["worker"]["dataset"])
    return {e.id: (dataset.load_image(e.image), e.question) for e in dataset.eval}


def test_new_queries_get_what_the_evaluation_showed_them(trained, selector, queries):
    lines = (trained[0] / "picks.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    for shots in (1, 2):
        own = [p for p in shown if (p["method"], p["shots"]) == ("selector_grpo", shots)]
        images, questions = zip(*(queries[p["query_id"]] for p in own))
        picks = selector.pick_batch(images, questions, shots=shots)
        assert [list(p.demonstrations) for p in picks] == [p["demonstrations"] for p in own]
    assert (selector.phase, selector.shots) == ("grpo", 2)


def test_a_query_alone_gets_the_same_as_in_a_batch(selector, queries):
    some = list(queries.values())[:11]  # More than one call of the compiled function.
    batch = selector.pick_batch(*zip(*some), shots=3, beam=4)
    for i in (0, 4, 10):
        alone = selector.pick(*some[i], shots=3, beam=4)
        assert alone[::2] == batch[i][::2]  # demonstrations and pool
        # The networks that embed are batched too, and round differently.
        assert alone.log_prob == pytest.approx(batch[i].log_prob, abs=1e-4)
        assert len(set(batch[i].demonstrations)) == 3
        assert set(batch[i].demonstrations) <= set(batch[i].pool)
        assert batch[i].log_prob < 0
    assert selector.pick_batch([], []) == []


def test_a_picture_of_the_bank_never_demonstrates_itself(selector, encoder, tmp_path):
    example = encoder.demonstration(3)
    picture = encoder.image(example.image)
    picture.save(tmp_path / "copy.png")
    for image in (picture, tmp_path / "copy.png", str(tmp_path / "copy.png")):
        pick = selector.pick(image, example.question)
        assert len(pick.pool) == 12
        assert example.image not in {encoder.demonstration(i).image for i in pick.pool}


def test_embeddings_of_new_queries_are_those_of_the_run(encoder, queries):
    some = list(queries.items())[:5]
    _, new = encoder.queries([image for _, (image, _) in some], [q for _, (_, q) in some])
    known = []
    encoder.embed("query", [i for i, _ in some], lambda rows, batch: known.append(batch.embeddings))
    np.testing.assert_allclose(new, np.concatenate(known), rtol=0, atol=1e-5)


def test_wrong_input_is_named(trained, encoder, selector, queries, tmp_path):
    image, question = next(iter(queries.values()))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for wrong, words in [
        (lambda: selector.pick("/no/such.png", question), "/no/such.png: no such image"),
        (lambda: selector.pick(tmp_path / "bad.png", question), "bad.png: cannot be decoded"),
        (lambda: selector.pick(image, "  "), "is not a text with words"),
        (lambda: selector.pick(image, "<|im_end|>"), "im_end"),
        (lambda: RunEncoder.open(tmp_path), "run.json"),
    ]:
        with pytest.raises(InputError, match=re.escape(words)):
            wrong()
    for wrong, words in [
        (lambda: selector.pick(image, question, shots=9), "shots=9 is out of range; give 1 to 8"),
        (lambda: selector.pick_batch([image], []), "1 images beside 0 questions"),
        (lambda: DemonstrationSelector.restore(tmp_path, encoder), "train first"),
        (lambda: DemonstrationSelector.restore(trained[0], encoder, "sft"), "phase 'sft'"),
    ]:
        with pytest.raises(PolicyInputError, match=re.escape(words)):
            wrong()

    class Other:
        fingerprint = "other"

    with pytest.raises(PolicyInputError, match="was trained on embeddings of encoder"):
        DemonstrationSelector.restore(trained[0], Other())


def test_the_example_of_the_readme_runs(trained, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    (code,) = [block for block in blocks if "DemonstrationSelector" in block]
    assert "runs/digits" in code
    program = tmp_path / "example.py"
    program.write_text(code.replace("runs/digits", str(trained[0])))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert pathlib.Path(tmp_path / "photo.png").exists()
