"""The VQA metric: every quirk by hand, then against a straight transcription of the rules."""

import gzip
import itertools
import json
import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from qwen_bridge.errors import InputError
from qwen_bridge.vqa import accuracy as metric
from qwen_bridge.vqa.accuracy import (
    accuracy,
    accuracy_normalized,
    accuracy_official_2021,
    leave_one_out,
    normalize,
)

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ANNOTATIONS = SHARED / "vqav2_annotations" / "annotations.json.gz"
PRODUCT_CONTRACTIONS = Path(metric.__file__).with_name("contractions.json")

needs_annotations = pytest.mark.skipif(
    not ANNOTATIONS.exists(), reason=f"the real annotations are not at {ANNOTATIONS}"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # New lines and tabs become spaces, and the ends are stripped.
        (" red\nball\t", "red ball"),
        ("red\n-ish x-y", "red ish xy"),  # and make the hyphen touch a space
        # A mark becomes a space where it touches none ...
        ("t-shirt", "t shirt"),
        ("and/or", "and or"),
        ("red,blue", "red blue"),
        ("(red)", "red"),
        ("-", ""),
        ('re[d];{b}"l"u=e+\\_>s<@`?!', "re d b l u e s"),
        # ... and goes where it touches one anywhere in the text, at all its places.
        ("yes, it is", "yes it is"),
        ("well-known - yes", "wellknown yes"),
        ("- 5", "5"),
        ("a- b-c", "bc"),
        ("red -blue", "red blue"),
        # The end of the text is no space, and neither is a no-break space.
        ("red-", "red"),
        ("t-\u00a0shirt x-y", "t shirt x y"),
        # Digit, comma, digit anywhere: all marks go.
        ("1,000", "1000"),
        ("red-ish 1,2", "redish 12"),
        ("(red)/blue 1,2", "redblue 12"),
        ("1, 2", "1 2"),
        ("1,two", "1 2"),
        ("٣,٤", "٣٤"),  # digits of any script
        # These are no marks at all.
        ("o'clock", "o'clock"),
        ("4:30", "4:30"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("r&b", "r&b"),
        ("#1", "#1"),
        ("*", "*"),
        # A period goes where no digit follows, looked at after the marks are gone.
        ("2.", "2"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("$3.50.", "$3.50"),
        ("3.,5", "3 5"),
        ("1,2.-3", "12.3"),
        ("..5", ".5"),
        ("x" + 32 * ".", "x"),
        ("x" + 33 * ".", "x."),
        ("o.n.e", "1"),
        # Lower case, and any white space is one.
        ("Red   BALL\u00a0\u2003x", "red ball x"),
        # Digit words, whole words only.
        (
            "none zero one two three four five six seven eight nine ten",
            "0 0 1 2 3 4 5 6 7 8 9 10",
        ),
        ("None.", "0"),
        ("twenty one", "twenty 1"),
        ("eleven someone", "eleven someone"),
        # Articles, whole words only.
        ("The cat and a dog on an ant", "cat and dog on ant"),
        ("a", ""),
        ("a-frame", "frame"),
        # Contractions, after lower case: those with an upper-case letter are out of reach.
        ("Dont", "don't"),
        ("cant", "can't"),
        ("Im", "im"),
        ("Ive", "ive"),
        ("somebody'd", "somebodyd"),  # the published table has it so
        ("let's", "let's"),
        ("ow's'at", "'ow's'at"),
        ("don.t", "don't"),
        # All of it.
        ("The two, red-ish t-shirts.", "2 red ish t shirts"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


def test_there_are_21_marks_and_these_are_none_of_them():
    assert len(metric._MARKS) == 21
    assert not metric._MARKS & set(".':$%&#*")


def ten(**counts):
    """Ten answers: ten(red=3) is red three times and seven other answers, all different."""
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    return answers + [f"other{number}x" for number in range(10 - len(answers))]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, 0.0),
        (1, (1 * min(1, 0 / 3) + 9 * min(1, 1 / 3)) / 10),  # 0.3
        (2, (2 * min(1, 1 / 3) + 8 * min(1, 2 / 3)) / 10),  # 0.6
        (3, (3 * min(1, 2 / 3) + 7 * min(1, 3 / 3)) / 10),  # 0.9
        (4, (4 * min(1, 3 / 3) + 6 * min(1, 4 / 3)) / 10),  # 1.0
        (10, 1.0),
    ],
)
def test_ten_annotators(count, expected):
    answers = ten(red=count)
    assert accuracy_normalized("red", answers) == pytest.approx(expected, abs=1e-15)
    assert accuracy_official_2021("red", answers) == pytest.approx(expected, abs=1e-15)
    assert leave_one_out(count, 10) == pytest.approx(expected, abs=1e-15)


def test_values_are_exact():
    assert [leave_one_out(count, 10) for count in range(6)] == [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]


def test_both_sides_are_normalised():
    answers = ten(**{"The Ball.": 2, "ball": 1, "BALL!": 1})
    assert accuracy_normalized("a ball", answers) == 1.0
    assert accuracy_official_2021("a ball", answers) == 1.0


def test_official_normalises_nothing_where_all_agree():
    black = 10 * ["black"]
    assert accuracy_official_2021("black", black) == 1.0
    assert accuracy_official_2021("Black", black) == 0.0
    assert accuracy_official_2021("Black.", black) == 0.0
    assert accuracy_normalized("Black.", black) == 1.0
    # It also works the other way round: the raw answers agree, their article included.
    assert accuracy_official_2021("the cat", 10 * ["the cat"]) == 1.0
    assert accuracy_official_2021("cat", 10 * ["the cat"]) == 0.0


def test_official_cleans_white_space_before_it_looks_whether_all_agree():
    black = 5 * ["black"] + 3 * ["black\n"] + 2 * ["\tblack "]
    assert accuracy_official_2021("black\n", black) == 1.0
    assert accuracy_official_2021("Black", black) == 0.0
    # One of ten that differs in its case is enough to normalise.
    assert accuracy_official_2021("Black.", 9 * ["black"] + ["Black"]) == 1.0


def test_none_counts_as_zero():
    assert accuracy_normalized("0", ten(none=4)) == 1.0
    assert accuracy_official_2021("zero", ten(none=4)) == 1.0
    assert accuracy_official_2021("0", 10 * ["none"]) == 0.0


@pytest.mark.parametrize("mode", metric.MODES)
@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["red"], 1.0),  # nobody else to compare with: a match counts
        (["blue"], 0.0),
        (["red", "red"], (2 * min(1, 1 / 3)) / 2),
        (["red", "blue"], (1 * 0 + 1 * min(1, 1 / 3)) / 2),
        (["red", "red", "red"], (3 * min(1, 2 / 3)) / 3),
        (["red", "red", "red", "red"], 1.0),
        (["red", "red", "red", "blue", "blue"], (3 * min(1, 2 / 3) + 2 * min(1, 3 / 3)) / 5),
    ],
)
def test_fewer_annotators(mode, answers, expected):
    assert accuracy("red", answers, mode) == pytest.approx(expected, abs=1e-15)


def test_no_annotator_is_an_error():
    with pytest.raises(ValueError, match="at least one annotator"):
        accuracy("red", [])


def test_modes():
    assert accuracy("Black.", 10 * ["black"]) == 1.0
    assert accuracy("Black.", 10 * ["black"], mode="normalized") == 1.0
    assert accuracy("Black.", 10 * ["black"], mode="official_2021") == 0.0
    with pytest.raises(InputError, match=r"--metric=official .* normalized or official_2021"):
        accuracy("red", ["red"], mode="official")


@pytest.mark.skipif(not SHARED.exists(), reason=f"the published contractions are not at {SHARED}")
def test_contractions_are_the_published_ones():
    published = json.loads((SHARED / "vqa_metric" / "contractions.json").read_text())
    assert json.loads(PRODUCT_CONTRACTIONS.read_text()) == published
    assert len(published) == 120


# A straight transcription of the rules, letter by letter and without regular expressions. It
# shares the table of contractions with the product and nothing else.

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+"]
MARKS += ["\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CONTRACTIONS = json.loads(PRODUCT_CONTRACTIONS.read_text())


def transcribed_clean(text):
    return "".join(" " if letter in "\n\t" else letter for letter in text).strip()


@cache
def transcribed_normalize(text):
    triples = zip(text, text[1:], text[2:])
    thousands = any(a.isdecimal() and b == "," and c.isdecimal() for a, b, c in triples)
    beside_space = set()
    for left, right in itertools.pairwise(text):
        if left == " ":
            beside_space.add(right)
        if right == " ":
            beside_space.add(left)

    unmarked = ""
    for letter in text:
        if letter not in MARKS:
            unmarked += letter
        elif not thousands and letter not in beside_space:
            unmarked += " "

    without_periods = ""
    removed = 0
    for place, letter in enumerate(unmarked):
        decimal_point = unmarked[place + 1 : place + 2].isdecimal()
        if letter == "." and not decimal_point and removed < 32:
            removed += 1
        else:
            without_periods += letter

    words = []
    for word in without_periods.lower().split():
        if word == "none":
            word = "0"
        elif word in NUMBERS:
            word = str(NUMBERS.index(word))
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def transcribed_accuracy(prediction, answers, *, only_if_different):
    prediction = transcribed_clean(prediction)
    given = [
        {"answer_id": number, "answer": transcribed_clean(answer)}
        for number, answer in enumerate(answers)
    ]
    all_equal = all(record["answer"] == given[0]["answer"] for record in given)
    if not (only_if_different and all_equal):
        prediction = transcribed_normalize(prediction)
        for record in given:
            record["answer"] = transcribed_normalize(record["answer"])
    scores = []
    for left_out in given:
        others = [record for record in given if record != left_out]
        matching = [record for record in others if record["answer"] == prediction]
        scores.append(min(1.0, len(matching) / 3))
    return sum(scores) / len(scores)


def assert_same_as_transcribed(prediction, answers):
    for mode in metric.MODES:
        expected = transcribed_accuracy(
            prediction, answers, only_if_different=mode == "official_2021"
        )
        ours = accuracy(prediction, answers, mode)
        assert abs(ours - expected) < 1e-12, (mode, prediction, answers, ours, expected)


PIECES = [*MARKS, *MARKS, *".......,,,    \n\t\u00a0\u2003':$%&#*", *"0123456789٣", *"abxyzABßİ"]
PIECES += [*NUMBERS, "none", "None", "the", "an", "The", "1,2", ". ", " -", "- ", 33 * "."]
PIECES += [" dont ", " Im ", " a ", " somebody'd ", " ten "]


def random_text(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))


def test_normalize_equals_the_transcription_on_random_text():
    seed = 20260
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(20_000):
        text = random_text(rng)
        assert normalize(text) == transcribed_normalize(transcribed_clean(text)), ascii(text)


def test_accuracy_equals_the_transcription_on_random_text():
    seed = 20261
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(2_000):
        choices = [random_text(rng) for _ in range(rng.randrange(1, 4))]
        answers = [rng.choice(choices) for _ in range(rng.randrange(2, 12))]
        assert_same_as_transcribed(rng.choice(choices), answers)


def real_answers():
    with gzip.open(ANNOTATIONS, "rt", encoding="utf-8") as file:
        annotations = json.load(file)["annotations"]
    return [[record["answer"] for record in entry["answers"]] for entry in annotations]


def predictions_for(answers, rng):
    """The majority, each annotator, "Answer." with a capital, nothing, and punctuation noise."""
    majority = Counter(answers).most_common(1)[0][0]
    noisy = list(majority)
    for _ in range(3):
        noisy.insert(rng.randrange(len(noisy) + 1), rng.choice([*MARKS, ".", "'", " "]))
    return [*dict.fromkeys(answers), majority.capitalize() + ".", "", "".join(noisy)]


@needs_annotations
def test_equals_the_transcription_on_real_annotations():
    seed = 20262
    print(f"seed {seed}")
    rng = random.Random(seed)
    for answers in rng.sample(real_answers(), 1_500):
        for prediction in predictions_for(answers, rng):
            assert_same_as_transcribed(prediction, answers)


@pytest.mark.slow
@needs_annotations
def test_equals_the_transcription_on_all_real_annotations():
    seed = 20263
    print(f"seed {seed}")
    rng = random.Random(seed)
    questions = real_answers()
    assert len(questions) == 8_977
    for answers in questions:
        for prediction in predictions_for(answers, rng):
            assert_same_as_transcribed(prediction, answers)


@needs_annotations
def test_one_real_question_in_nine_cannot_reach_full_marks():
    questions = real_answers()
    short = sum(
        max(accuracy_normalized(answer, answers) for answer in set(answers)) < 1.0
        for answers in questions
    )
    assert short / len(questions) == pytest.approx(1 / 9, abs=0.01)
