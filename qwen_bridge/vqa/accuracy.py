"""The VQA accuracy: how many of the annotators gave the answer that the model gives.

Two modes, always named in reports, as they can differ by 35 points on the same predictions:

- `normalized` compares normalised strings. The common harnesses do it, and it is the reward.
- `official_2021` repeats the published evaluation tool, which leaves both sides as they are
  where all annotators agree: "Black." scores 0 against ten times "black".

Both leave each annotator out in turn, compare with the others, and give full marks for three
matches: acc = mean over annotators i of min(1, matches among the annotators but i / 3).
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from qwen_bridge.errors import InputError

MODES = ("normalized", "official_2021")

# The tool's list: . ' : $ % & # * are not in it.
_MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
# The tool hands re.UNICODE, which is 32, to the parameter that limits the substitutions.
_MAX_PERIODS = 32
_DIGIT_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTIONS = json.loads(
    Path(__file__).with_name("contractions.json").read_text(encoding="utf-8")
)


@lru_cache(maxsize=1 << 17)
def normalize(text: str) -> str:
    """Normalises an answer exactly as the published evaluation tool does, oddities included.

    In order: new lines and tabs to spaces and strip; punctuation; lower case and split; digit
    words; articles; contractions; join with single spaces. Digits are Unicode digits, as in the
    tool under Python 3. The contractions with upper-case letters are never met, because lower
    case comes first ("Im" stays "im").

    >>> normalize("The two, red-ish t-shirts.")
    '2 red ish t shirts'
    """
    words = [_DIGIT_WORDS.get(word, word) for word in _strip_marks(_clean(text)).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str], mode: str = "normalized") -> float:
    """The accuracy of a prediction in one of the `MODES`, in [0, 1]."""
    if mode == "normalized":
        return accuracy_normalized(prediction, answers)
    if mode == "official_2021":
        return accuracy_official_2021(prediction, answers)
    raise InputError(f"--metric={mode} is not a VQA metric; it must be {' or '.join(MODES)}")


def accuracy_normalized(prediction: str, answers: Sequence[str]) -> float:
    """The share of credit for a prediction, in [0, 1], both sides always normalised.

    Args:
      prediction: what the model said.
      answers: raw answers, one an annotator; usually ten.
    """
    expected = normalize(prediction)
    matches = sum(normalize(answer) == expected for answer in answers)
    return leave_one_out(matches, len(answers))


def accuracy_official_2021(prediction: str, answers: Sequence[str]) -> float:
    """The same as `accuracy_normalized`, but as the published tool has it.

    Both sides are normalised only where the answers, stripped, are not all the same string.
    """
    prediction = _clean(prediction)
    answers = [_clean(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = normalize(prediction)
        answers = [normalize(answer) for answer in answers]
    return leave_one_out(answers.count(prediction), len(answers))


def leave_one_out(matches: int, annotators: int) -> float:
    """The accuracy of an answer that `matches` of so many `annotators` gave.

    For ten annotators 0.3, 0.6, 0.9 and 1.0 for one, two, three and more. Fewer annotators than
    four cannot give full marks: the tool wants three matches among the *others*. A single
    annotator has no others, so that the formula would call every answer wrong; there, and only
    there, a match counts 1.

    Args:
      matches: how many annotators gave the answer, in [0, annotators].
      annotators: how many there are, at least 1.

    Returns:
      In [0, 1]; exact, being a quotient of two integers.
    """
    if annotators < 1:
        raise ValueError("an accuracy needs the answer of at least one annotator")
    if annotators == 1:
        return float(matches)
    # In thirds: each of those who gave it sees one match fewer than each of those who did not.
    thirds = matches * min(3, matches - 1) + (annotators - matches) * min(3, matches)
    return thirds / (3 * annotators)


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_marks(text: str) -> str:
    """Deletes a mark that touches a space somewhere in the text, else makes it a space."""
    delete_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    stripped = text
    for mark in _MARKS.intersection(text):
        touches_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if delete_all or touches_space else " ")
    return _PERIOD_BEFORE_NO_DIGIT.sub("", stripped, count=_MAX_PERIODS)
