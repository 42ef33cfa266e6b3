"""Scoring of files in the official results format."""

import gzip
import json
from pathlib import Path

import pytest
from test_accuracy import transcribed_accuracy

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.accuracy import MODES
from qwen_bridge.vqa.results import ScoredAnswer, read_results, score_results

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "vqav2_annotations"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"the real annotations are not at {REAL}")

# Three questions with ten answers each: 11 is not unanimous, 12 is, 13 has no types.
ANSWERS = {
    11: ["red"] * 2 + ["Red."] + ["blue"] * 7,
    12: ["black"] * 10,
    13: ["two"] * 1 + ["2"] * 1 + ["three"] * 8,
}
RESULTS = [
    {"question_id": 13, "answer": "2", "note": "other fields are passed over"},
    {"question_id": 11, "answer": "a red"},
    {"question_id": 12, "answer": "Black."},
]


class Files:
    """The three files in a folder, to be changed before they are scored."""

    def __init__(self, folder):
        self.folder = folder
        self.questions = {"questions": [{"question_id": id, "image_id": 1} for id in ANSWERS]}
        self.annotations = {
            "annotations": [
                {
                    "question_id": id,
                    "question_type": "what",
                    "answer_type": "other",
                    "answers": [{"answer": text, "answer_id": 1} for text in texts],
                }
                for id, texts in ANSWERS.items()
            ]
        }
        del self.annotations["annotations"][2]["question_type"]
        self.annotations["annotations"][2]["answer_type"] = "number"
        self.results = [dict(row) for row in RESULTS]

    def write(self):
        paths = []
        for name in ("questions", "annotations", "results"):
            paths.append(self.folder / f"{name}.json")
            paths[-1].write_text(json.dumps(getattr(self, name)))
        return paths

    def fails(self, match):
        with pytest.raises(InputError, match=match) as failure:
            score_results(*self.write())
        assert "\n" not in str(failure.value)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_scores_by_hand(files):
    # 11: three of ten match after normalisation: 3 annotators see 2 others, 7 see 3.
    three = (3 * 2 / 3 + 7 * 1) / 10
    # 13: two of ten, "two" being "2".
    two = (2 * 1 / 3 + 8 * 2 / 3) / 10
    official = score_results(*files.write())
    assert official == [
        ScoredAnswer(11, "a red", pytest.approx(three), "what", "other"),
        ScoredAnswer(12, "Black.", 0.0, "what", "other"),  # all agree, so nothing is normalised
        ScoredAnswer(13, "2", pytest.approx(two), "", "number"),
    ]
    normalized = score_results(*files.write(), metric="normalized")
    assert [one.accuracy for one in normalized] == pytest.approx([three, 1.0, two])


def test_results_may_be_gzip_and_answers_empty(files):
    files.results[0]["answer"] = ""
    questions, annotations, results = files.write()
    zipped = files.folder / "zipped"
    zipped.write_bytes(gzip.compress(results.read_bytes()))
    assert read_results(zipped) == {13: "", 11: "a red", 12: "Black."}
    assert score_results(questions, annotations, zipped)[2].accuracy == 0.0


def test_a_file_that_is_missing_or_of_another_kind(files):
    paths = files.write()
    for place, flag in enumerate(("questions", "annotations", "results")):
        wrong = [*paths]
        wrong[place] = files.folder / "none.json"
        with pytest.raises(InputError, match=rf"--{flag}=.*none\.json cannot be read"):
            score_results(*wrong)
    with pytest.raises(InputError, match=r"--results=.*questions\.json is not a list; the format"):
        score_results(*paths[:2], paths[0])
    with pytest.raises(InputError, match=r"--questions=.* has no list 'questions'"):
        score_results(paths[1], *paths[1:])
    with pytest.raises(InputError, match=r"--questions=.* is not a JSON object"):
        score_results(paths[2], *paths[1:])
    paths[2].write_text("[")
    with pytest.raises(InputError, match=r"--results=.* is not JSON"):
        score_results(*paths)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, r"results.json: \[3\] has no whole number as 'question_id'"),
        ({"answer": "red"}, r"results.json: \[3\] has no whole number as 'question_id'"),
        ({"question_id": "11", "answer": "red"}, r"\[3\] has no whole number"),
        ({"question_id": True, "answer": "red"}, r"\[3\] has no whole number"),
        ({"question_id": 14}, r"results.json: question_id 14 has no text as 'answer'"),
        ({"question_id": 14, "answer": 2}, r"question_id 14 has no text as 'answer'"),
        ({"question_id": 11, "answer": "red"}, r"question_id 11 is answered twice; keep one"),
        ({"question_id": 14, "answer": "x"}, r"results.json: question_id 14 has no question in"),
    ],
)
def test_a_wrong_row(files, row, message):
    files.results.append(row)
    files.fails(message)


def test_several_unknown_questions_are_counted(files):
    files.results += [{"question_id": id, "answer": ""} for id in (20, 21, 22)]
    files.fails(r"question_id 20 \(and 2 more\) has no question in .*questions.json")


def test_questions_without_an_answer_are_counted_and_the_first_is_named(files):
    files.results = files.results[:1]
    files.fails(r"leaves 2 of 3 questions without an answer, the first of them question_id 11")
    files.results = []
    files.fails(r"leaves 3 of 3 questions without an answer")


def test_no_questions_at_all(files):
    files.questions["questions"] = files.annotations["annotations"] = files.results = []
    files.fails(r"--questions=.*questions\.json asks nothing")


def test_questions_and_annotations_are_of_one_split(files):
    extra = {"question_id": 30, "image_id": 1}
    files.questions["questions"].append(extra)
    files.fails(r"questions\.json: question_id 30 has no annotation in .*annotations\.json")
    files.questions["questions"].pop()
    files.annotations["annotations"].append(extra)
    files.fails(r"annotations\.json: question_id 30 has no question in .*questions\.json")


@needs_real
def test_real_questions_equal_the_transcription(tmp_path):
    with gzip.open(REAL / "annotations.json.gz", "rt") as file:
        annotations = json.load(file)["annotations"]
    given = {one["question_id"]: one["multiple_choice_answer"].title() + "." for one in annotations}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"question_id": i, "answer": a} for i, a in given.items()]))
    raw = {one["question_id"]: [a["answer"] for a in one["answers"]] for one in annotations}
    for mode in MODES:
        scored = score_results(
            REAL / "questions.json.gz", REAL / "annotations.json.gz", path, metric=mode
        )
        assert len(scored) == 8_977
        for one in scored[::10]:
            expected = transcribed_accuracy(
                given[one.question_id],
                raw[one.question_id],
                only_if_different=mode == "official_2021",
            )
            assert one.accuracy == pytest.approx(expected, abs=1e-12)
