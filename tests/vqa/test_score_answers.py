"""`python -m experiments.score_answers`, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# 8 questions "how many" and 4 "[is] this", answered right every second time.
QUESTIONS = [{"question_id": id, "image_id": id} for id in range(12)]
ANNOTATIONS = [
    {
        "question_id": id,
        "question_type": "how many" if id < 8 else "[is] this",
        "answer_type": "number" if id < 8 else "yes/no",
        "answers": [{"answer": "2" if id < 8 else "yes"}] * 10,
    }
    for id in range(12)
]
RESULTS = [
    {"question_id": id, "answer": ("2" if id < 8 else "yes") if id % 2 and id != 9 else "no idea"}
    for id in range(12)
]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.score_answers", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def flags(tmp_path):
    documents = {
        "questions": {"questions": QUESTIONS},
        "annotations": {"annotations": ANNOTATIONS},
        "results": RESULTS,
    }
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return [f"--{name}={tmp_path / name}.json" for name in documents]


def test_prints_percent_and_writes_shares(flags, tmp_path):
    out = tmp_path / "scores.json"
    result = run(*flags, f"--out={out}")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines() if line]
    assert result.stdout.startswith("overall 41.67\n")  # 5 of 12
    assert lines[1][:3] == ["n", "=", "12,"]
    assert lines[1][-1] == "official_2021"
    assert lines[2] == ["answer", "type", "accuracy", "95%", "interval", "n"]
    assert (lines[3][:2], lines[3][-1]) == (["number", "50.00"], "8")
    assert (lines[4][:2], lines[4][-1]) == (["yes/no", "25.00"], "4")
    assert lines[5][:2] == ["question", "type"]
    assert lines[6][:3] == ["how", "many", "50.00"]
    assert lines[7][:3] == ["[is]", "this", "25.00"]
    assert len(lines) == 8

    scores = json.loads(out.read_text())
    assert scores["metric"] == "official_2021"
    assert (scores["accuracy"], scores["n"]) == (5 / 12, 12)
    low, high = scores["ci95"]
    assert 0 < low < 5 / 12 < high < 1
    assert scores["by_answer_type"]["number"]["accuracy"] == 4 / 8
    assert scores["by_question_type"]["[is] this"]["accuracy"] == 1 / 4
    assert scores["by_question_type"]["[is] this"]["n"] == 4
    assert scores["by_question"]["1"] == 1.0
    assert scores["by_question"]["9"] == 0.0
    assert sum(scores["by_question"].values()) == 5
    assert list(tmp_path.glob(".*")) == []


def test_bad_input_is_one_line_and_exit_code_2(flags, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS[:-2]))
    result = run(*flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --results=")
    assert "leaves 2 of 12 questions without an answer" in result.stderr
    assert result.stderr.count("\n") == 1
