"""The check of a whole data set: that it finds everything, and does not cry wolf."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qwen_bridge.vqa import checks
from qwen_bridge.vqa.checks import Findings, check_examples, check_images
from qwen_bridge.vqa.examples import Example
from qwen_bridge.vqa.images import image_folders
from qwen_bridge.vqa.jsonl import read_jsonl
from qwen_bridge.vqa.official import read_split

ROOT = Path(__file__).parents[2]
MINI = ROOT.parent / "shared" / "data" / "vqav2_mini"
needs_mini = pytest.mark.skipif(not MINI.exists(), reason=f"the real questions are not at {MINI}")


def example(id, answers=("red",) * 10, question="What?", image="bank/1.png"):
    return Example(id=id, image=image, question=question, answers=tuple(answers))


def found_in(*examples, min_answers=10):
    """The figures, and by kind the ids of the examples that were reported."""
    findings = Findings()
    figures = check_examples(examples, lambda one: f"place {one.id}", min_answers, findings)
    return figures, {
        kind: [int(message.split()[1].rstrip(":")) for message in messages]
        for kind, messages in findings.by_kind.items()
    }


def test_good_examples():
    figures, found = found_in(example(0), example(2**63 - 1))
    assert found == {}
    assert figures == {
        "questions": 2,
        "answers_per_question": [10, 10],
        "fewer_than_ten_answers": 0,
        "cannot_reach_full_marks": 0,
        "share_cannot_reach_full_marks": 0.0,
        "best_possible_accuracy": 1.0,
        "question_types": 0,
        "answer_types": 0,
    }


def test_every_fault_of_an_example_is_found():
    _, found = found_in(
        example(1, question=" \n"),
        example(2, ["red"] * 9),
        example(3, [""] * 9 + [" "]),
        example(4, ["red"] * 8 + ["", "\t"]),
        example(5, ["red"] * 9 + ["?"]),
        example(6, ["the"] * 3, question=""),
        example(10, []),  # a reader reports it
    )
    assert found == {
        "empty_question": [1, 6],
        "few_answers": [2, 6],
        "only_blank_answers": [3],
        "blank_answer": [4],
        "vanishing_answer": [5, 6],
    }


def test_figures_of_answers():
    figures, found = found_in(
        example(1, ["a", "b", "c", "d", "d", "e", "f", "g", "h", "i"]),  # two of ten: 0.6
        example(2, ["red", "Red.", "a red", "red!"] + list("bcdefg")),  # four once normalised: 1
        example(3, ["red"]),  # one annotator, who can be matched: 1
        example(4, ["red", "red", "red"]),  # three of three: 2 / 3
        min_answers=2,
    )
    assert found == {"few_answers": [3], "vanishing_answer": [1]}  # "a" is an article
    assert figures["answers_per_question"] == [1, 10]
    assert figures["fewer_than_ten_answers"] == 2
    assert figures["cannot_reach_full_marks"] == 2
    assert figures["share_cannot_reach_full_marks"] == 2 / 4
    assert figures["best_possible_accuracy"] == pytest.approx((0.6 + 1 + 1 + 2 / 3) / 4)


def test_nothing_to_check():
    figures, found = found_in()
    assert found == {}
    assert figures["answers_per_question"] is figures["best_possible_accuracy"] is None


def test_kinds_are_named_once_and_others_are_a_bug():
    assert not checks.PROBLEMS.keys() & checks.NOTES.keys()
    with pytest.raises(KeyError):
        Findings()("misspelt", "")


# Readers that go on.


def test_the_official_reader_goes_on(tmp_path):
    questions = [
        {"question_id": 1, "image_id": 1, "question": "Fine?"},
        {"question_id": 1, "image_id": 1, "question": "Again?"},
        {"question_id": "2", "image_id": 1, "question": "?"},
        "not a record",
        {"question_id": 3, "image_id": 1.5, "question": 7},
        {"question_id": 4, "image_id": "../4", "question": "Outside?"},
        {"question_id": 5, "image_id": 5, "question": "No annotation?"},
        {"question_id": 6, "image_id": 6, "question": "Wrong answers?"},
        {"question_id": 7, "image_id": 7, "question": "No answers, another image?"},
        {"question_id": -8, "image_id": 8, "question": "An id below zero?"},
        {"question_id": 9, "image_id": 9, "question": "Half a \ud800 pair?"},
    ]
    answers = [{"answer": "red"}] * 10
    annotations = [
        {"question_id": 1, "image_id": 1, "answers": answers},
        {"question_id": 3, "answers": answers},
        {"question_id": 4, "answers": answers, "answer_type": 3},
        {"question_id": 6, "answers": [{"answer": 2}, {"answer": "two"}, None]},
        {"question_id": 7, "image_id": 8, "answers": []},
        {"question_id": -8, "answers": answers},
        {"question_id": 9, "answers": [*answers[1:], {"answer": "\udc00"}]},
        {"question_id": 99, "answers": answers},
    ]
    for name, records in (("questions", questions), ("annotations", annotations)):
        (tmp_path / f"{name}.json").write_text(json.dumps({name: records}))
    findings = Findings()
    examples = read_split(
        "bank",
        tmp_path / "questions.json",
        tmp_path / "annotations.json",
        "{image_id}.jpg",
        image_folders(tmp_path, tmp_path),
        findings,
    )
    assert {kind: len(messages) for kind, messages in findings.by_kind.items()} == {
        "duplicate_id": 1,
        "bad_record": 2,
        "no_annotation": 1,
        "no_question": 1,
        "bad_field": 5,  # image and question of 3, the label of 4, two answers of 6
        "bad_image_name": 1,
        "bad_id": 1,
        "bad_text": 2,
        "two_images": 1,
        "no_answers": 1,
    }
    assert [one.id for one in examples] == [1, 5, 6, 7]
    assert [len(one.answers) for one in examples] == [10, 0, 1, 0]
    assert examples[0].question == "Fine?"
    assert "question_id 5 has no annotation in" in findings.by_kind["no_annotation"][0]


def test_every_orphan_is_named_alone(tmp_path):
    questions = [{"question_id": id, "image_id": id, "question": "?"} for id in (1, 2, 3)]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": []}))
    findings = Findings()
    paths = tmp_path / "questions.json", tmp_path / "annotations.json"
    read_split("bank", *paths, "{image_id}", image_folders(tmp_path, None), findings)
    messages = findings.by_kind["no_annotation"]
    assert len(messages) == 3
    assert not any("more" in message for message in messages)


def test_the_jsonl_reader_goes_on(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"image": "1.png", "question": "Fine?", "answers": "yes", "id": 1},
        {"image": "1.png", "question": "Again?", "answers": "yes", "id": 1},
        {"image": "../1.png", "question": 3, "answers": [], "id": -1},
        ["not an object"],
        {"image": "2.png", "question": "No answers?", "id": 2},
    ]
    path.write_text("\n".join(["no JSON", *map(json.dumps, lines)]))
    findings = Findings()
    examples = read_jsonl("query", path, image_folders(None, tmp_path), findings)
    assert {kind: len(messages) for kind, messages in findings.by_kind.items()} == {
        "bad_record": 2,
        "duplicate_id": 1,
        "bad_image_name": 1,
        "bad_field": 1,
        "no_answers": 2,
        "bad_id": 1,
    }
    assert {line: one.id for line, one in examples.items()} == {2: 1, 6: 2}
    assert examples[2].image == "query/1.png"


# Images.


@pytest.fixture
def photos(tmp_path):
    """Two folders; 1 is in both, 2 is missing, 3 is no picture, 4 is cut, 5 is a strip."""
    for folder in ("bank", "query"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (30, 20), "red").save(tmp_path / folder / "1.png")
    Image.effect_noise((40, 40), 50).save(tmp_path / "bank" / "4.png")
    whole = (tmp_path / "bank" / "4.png").read_bytes()
    (tmp_path / "bank" / "4.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bank" / "3.png").write_text("no picture")
    Image.new("RGB", (1, 201)).save(tmp_path / "bank" / "5.png")
    Image.new("RGB", (1, 200)).save(tmp_path / "bank" / "6.png")
    return image_folders(tmp_path / "bank", tmp_path / "query")


def splits(folders):
    bank = [example(number, image=f"bank/{number}.png") for number in range(1, 7)]
    bank.append(example(7, image="bank/2.png"))
    return {"bank": bank, "query": [example(1, image="query/1.png")]}


@pytest.mark.parametrize("threads", [1, 4])
def test_every_image_is_looked_at_once(photos, threads):
    findings, done = Findings(), []
    figures = check_images(splits(photos), photos, findings, threads=threads, on_done=done.append)
    assert sum(done) == 7
    assert {kind: len(messages) for kind, messages in findings.by_kind.items()} == {
        "missing_image": 1,
        "broken_image": 2,
        "long_image": 1,
        "same_picture": 1,
    }
    assert findings.by_kind["missing_image"][0].endswith("--image_pattern (questions: 2)")
    assert "3.png" in findings.by_kind["broken_image"][0]
    assert "4.png" in findings.by_kind["broken_image"][1]
    assert "1 x 201" in findings.by_kind["long_image"][0]
    assert figures["bank"] == {
        "images": 6,
        "width": [1, 1, 30],
        "height": [20, 200, 201],
        "megapixels": [0.0002, 0.000201, 0.0006],
    }
    assert figures["query"]["images_in_bank"] == 0  # not by key


def test_headers_only(photos):
    findings = Findings()
    figures = check_images(splits(photos), photos, findings, how="header")
    assert {kind: len(messages) for kind, messages in findings.by_kind.items()} == {
        "missing_image": 1,
        "broken_image": 1,  # half a picture has a header
        "long_image": 1,
    }
    assert figures["bank"]["height"] == [20, 120.0, 201]


def test_no_images_at_all(photos):
    findings = Findings()
    figures = check_images(splits(photos), photos, findings, how="none")
    assert findings.by_kind == {}
    assert figures["bank"] == {"images": 6, "width": None, "height": None, "megapixels": None}


def test_pictures_shared_by_key_are_counted_and_no_finding(photos):
    shared = [example(1)]
    findings = Findings()
    figures = check_images({"bank": shared, "query": shared}, photos, findings)
    assert findings.by_kind == {}
    assert figures["query"]["images_in_bank"] == 1


# As a user runs it.


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.check_data", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_mini
def test_the_real_questions_and_photographs_are_clean(tmp_path):
    out = tmp_path / "check.json"
    files = [
        f"--{role}_{what}={MINI / role}_{what}.json"
        for role in ("bank", "query")
        for what in ("questions", "annotations")
    ]
    folders = [f"--{role}_images={MINI / 'train2014'}" for role in ("bank", "query")]
    flags = tmp_path / "train.flags"
    lines = [*files, *folders, "--dataset=official", "--model=/a/checkpoint", "--num_queries=50"]
    flags.write_text("\n".join(lines))
    result = run(f"--flagfile={flags}", f"--out={out}")
    assert (result.returncode, result.stderr) == (0, "")
    assert "verdict: no problems, 1 note" in result.stdout
    check = json.loads(out.read_text())
    assert (check["problems"], check["notes"]) == (0, 1)
    assert list(check["findings"]) == ["vanishing_answer"]  # the answer "?"
    bank, query = check["splits"]["bank"], check["splits"]["query"]
    assert (bank["questions"], query["questions"]) == (340, 158)
    assert (bank["images"], query["images"], query["images_in_bank"]) == (228, 100, 0)
    assert bank["answers_per_question"] == [10, 10]
    assert bank["share_cannot_reach_full_marks"] == pytest.approx(1 / 9, abs=0.01)
    assert max(bank["width"][2], bank["height"][2]) == 336


@needs_mini
def test_questions_without_their_images():
    files = [f"--query_{what}={MINI}/query_{what}.json" for what in ("questions", "annotations")]
    result = run(*files)
    assert result.returncode == 2
    assert (
        "--query_images is missing; the query split needs it too, or --image_check" in result.stderr
    )
    result = run(*files, "--image_check=none")
    assert (result.returncode, result.stderr) == (0, "")
    assert "verdict: no problems, no notes" in result.stdout


def test_problems_are_exit_code_1_and_all_of_them_are_in_the_file(tmp_path):
    lines = [{"image": f"{n}.png", "question": "[bold]?", "answers": "x"} for n in range(9)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "check.json"
    result = run(f"--query_jsonl={path}", "--show=2", f"--out={out}")
    assert (result.returncode, result.stderr) == (1, "")
    assert "problem: missing images: 9" in result.stdout
    assert result.stdout.count("no such image; check --query_images and the field 'image'") == 2
    assert "and 7 more; all are in --out" in result.stdout
    assert "verdict: 9 problems, no notes" in result.stdout
    found = json.loads(out.read_text())["findings"]
    assert list(found) == ["missing_image"]
    assert (found["missing_image"]["count"], len(found["missing_image"]["messages"])) == (9, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no official data to check; give --bank_questions or --query_questions"),
        (["--bank_questions=q.json"], "--bank_annotations is missing; the bank split needs it too"),
        (["--bank_jsonl=none.jsonl"], "--bank_jsonl=none.jsonl is not a file"),
        (["--dataset=digits"], "--dataset=digits reads no files, so there is nothing to check"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
