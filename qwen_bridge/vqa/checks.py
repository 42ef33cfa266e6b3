"""Looks a whole data set over before any GPU-hour is spent on it, and collects all that is wrong.

The loaders stop at the first fault. Here the same readers go on, so that one pass names every
missing picture, double id and empty answer; and what is no fault, but worth knowing before one
reads accuracies of this data, is counted: how many questions cannot reach full marks at all, and
how large the pictures are.
"""

import collections
import concurrent.futures
import hashlib
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen_bridge.vqa.accuracy import leave_one_out, normalize
from qwen_bridge.vqa.examples import Example
from qwen_bridge.vqa.images import (
    BrokenImageError,
    ImageFolders,
    MissingImageError,
    OutsideImageError,
    upright_rgb,
)

# Qwen2.5-VL's preprocessing refuses longer strips.
MAX_ASPECT = 200

IMAGE_CHECKS = ("decode", "header", "none")

# What a run would stop at, or silently lose.
PROBLEMS = {
    "empty_split": "splits without any example",
    "bad_record": "records that cannot be read",
    "bad_field": "fields that are missing or of the wrong kind",
    "bad_id": "ids outside [0, 2**63)",
    "duplicate_id": "ids that occur twice",
    "no_annotation": "questions without annotation",
    "no_question": "annotations without question",
    "two_images": "questions whose annotation names another image",
    "bad_image_name": "images outside the image folder, or without a name",
    "empty_question": "empty questions",
    "bad_text": "texts with characters that are not Unicode",
    "no_answers": "questions without answers",
    "only_blank_answers": "questions whose answers are all empty: nothing can be scored",
    "few_answers": "questions with fewer answers than --min_answers",
    "missing_image": "missing images",
    "broken_image": "images that cannot be decoded, or are too large",
    "long_image": f"images longer than {MAX_ASPECT} times their width, which the VLM refuses",
}
# What a run takes as it is.
NOTES = {
    "blank_answer": "questions with an empty answer among others",
    "vanishing_answer": "questions with an answer that is empty after normalisation",
    "same_picture": "pictures of queries that the bank has under another name: not kept apart",
}
KINDS = PROBLEMS | NOTES


class Findings:
    """Everything that was found, by kind; a `Report` for readers.

    Attributes:
      by_kind: messages of each kind of `KINDS` that occurs, in the order they were found.
    """

    def __init__(self):
        self.by_kind: dict[str, list[str]] = {}

    def __call__(self, kind: str, message: str):
        if kind not in KINDS:
            raise KeyError(kind)
        self.by_kind.setdefault(kind, []).append(message)

    def count(self, kinds: Iterable[str]) -> int:
        """How many findings are of one of the `kinds`."""
        return sum(len(self.by_kind.get(kind, ())) for kind in kinds)


def check_examples(
    examples: Sequence[Example],
    place: Callable[[Example], str],
    min_answers: int,
    report: Callable[[str, str], None],
) -> dict[str, Any]:
    """Checks what the examples of a split say, images aside.

    Args:
      examples: as a reader that went on returned them; one that had its faults reported has an
        empty tuple of answers.
      place: where an example stands, for messages.
      min_answers: fewer answers than these are a problem.
      report: is told of every finding.

    Returns:
      Figures: `questions`, `answers_per_question` [least, most], `fewer_than_ten_answers`,
      `cannot_reach_full_marks` (questions on which not even the best answer has accuracy 1.0,
      which is the same in both modes of the metric) and its share of the questions with answers,
      `best_possible_accuracy` (the mean over these of the best answer's accuracy),
      `question_types` and `answer_types` (how many).
    """
    best = []
    counts = collections.Counter()
    for example in examples:
        answers = example.answers
        if not example.question.strip():
            report("empty_question", f"{place(example)}: the question is empty; write or remove it")
        if not answers:
            continue  # has been reported
        counts[len(answers)] += 1
        if len(answers) < min_answers:
            report(
                "few_answers",
                f"{place(example)}: {len(answers)} answers, fewer than {min_answers}",
            )
        matches = collections.Counter(map(normalize, answers))
        best.append(leave_one_out(max(matches.values()), len(answers)))
        if "" in matches:
            _report_empty(answers, place(example), report)
    labels = {
        f"{name}s": len({getattr(example, name) for example in examples} - {""})
        for name in ("question_type", "answer_type")
    }
    unreachable = sum(value < 1.0 for value in best)
    return {
        "questions": len(examples),
        "answers_per_question": [min(counts), max(counts)] if counts else None,
        "fewer_than_ten_answers": sum(n for answers, n in counts.items() if answers < 10),
        "cannot_reach_full_marks": unreachable,
        "share_cannot_reach_full_marks": unreachable / len(best) if best else None,
        "best_possible_accuracy": statistics.fmean(best) if best else None,
        **labels,
    }


def _report_empty(answers: Sequence[str], place: str, report: Callable[[str, str], None]):
    blank = sum(not answer.strip() for answer in answers)
    vanishing = {answer for answer in answers if answer.strip() and not normalize(answer)}
    if blank == len(answers):
        report("only_blank_answers", f"{place}: every answer is empty; give one or remove it")
    elif blank:
        report("blank_answer", f"{place}: {blank} of {len(answers)} answers are empty")
    if vanishing:
        shown = ", ".join(map(repr, sorted(vanishing)))
        report("vanishing_answer", f"{place}: nothing is left of {shown} after normalisation")


@dataclass(frozen=True, slots=True)
class _Picture:
    """What is known of one image: its size and content, or what is wrong with it."""

    key: str
    size: tuple[int, int] | None = None
    digest: bytes = b""
    fault: tuple[str, str] | None = None


def check_images(
    splits: dict[str, Sequence[Example]],
    folders: ImageFolders,
    report: Callable[[str, str], None],
    *,
    how: str = "decode",
    threads: int = 1,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, Any]]:
    """Opens every image of the splits once.

    Args:
      splits: the examples by role, "bank" and "query".
      folders: opens the images.
      report: is told of every finding, in the order of the examples.
      how: "decode" reads every pixel, and sees which pictures are the same file, byte for byte;
        "header" believes what a file says of itself; "none" opens nothing.
      threads: images opened at once; decoding does not hold Python's lock.
      on_done: called with the number of images just finished.

    Returns:
      Figures of each role: `images`, and of those that could be opened `width`, `height` and
      `megapixels`, each [least, median, most] or None; for queries also `images_in_bank`, those
      that the bank has under the same key and that pools therefore leave out.
    """
    questions = {
        role: collections.Counter(example.image for example in examples)
        for role, examples in splits.items()
    }
    keys = list(dict.fromkeys(key for counts in questions.values() for key in counts))
    pictures = [] if how == "none" else _look_at(keys, folders, how, threads, on_done)
    by_key = {picture.key: picture for picture in pictures}
    for key, picture in by_key.items():
        if picture.fault is not None:
            kind, message = picture.fault
            count = sum(counts[key] for counts in questions.values())
            report(kind, f"{message} (questions: {count})")
    _report_same(questions, by_key, folders, report)
    figures = {}
    for role, counts in questions.items():
        sizes = [by_key[key].size for key in counts if key in by_key and by_key[key].size]
        figures[role] = {
            "images": len(counts),
            "width": _spread([width for width, _ in sizes]),
            "height": _spread([height for _, height in sizes]),
            "megapixels": _spread([width * height / 1e6 for width, height in sizes]),
        }
    if {"bank", "query"} <= set(questions):
        shared = questions["query"].keys() & questions["bank"].keys()
        figures["query"]["images_in_bank"] = len(shared)
    return figures


def _look_at(
    keys: list[str],
    folders: ImageFolders,
    how: str,
    threads: int,
    on_done: Callable[[int], None],
) -> list[_Picture]:
    pictures = []
    # Pillow warns of oddities that it overcomes; the filter is the process's, threads included.
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        chunk = 64 * threads  # so that Ctrl-C does not wait for all the images that are queued
        for start in range(0, len(keys), chunk):
            for picture in pool.map(partial(_look, folders, how), keys[start : start + chunk]):
                pictures.append(picture)
                on_done(1)
    return pictures


def _look(folders: ImageFolders, how: str, key: str) -> _Picture:
    digest = b""
    try:
        with folders.open(key) as image:
            width, height = image.size
            if how == "decode":
                upright_rgb(image)
                digest = hashlib.sha256(folders.path(key).read_bytes()).digest()
    except MissingImageError as error:
        return _Picture(key, fault=("missing_image", str(error)))
    except OutsideImageError as error:
        return _Picture(key, fault=("bad_image_name", str(error)))
    except BrokenImageError as error:
        return _Picture(key, fault=("broken_image", str(error)))
    fault = None
    if max(width, height) > MAX_ASPECT * min(width, height):
        message = f"{folders.path(key)}: {width} x {height} pixels; crop it or remove its questions"
        fault = ("long_image", message)
    return _Picture(key, (width, height), digest, fault)


def _report_same(
    questions: dict[str, collections.Counter],
    by_key: dict[str, _Picture],
    folders: ImageFolders,
    report: Callable[[str, str], None],
):
    """Reports pictures of queries that stand in the bank too, and that no key gives away."""
    bank, query = (questions.get(role, {}) for role in ("bank", "query"))
    in_bank = {by_key[key].digest: key for key in bank if key in by_key and by_key[key].digest}
    for key in query:
        twin = in_bank.get(by_key[key].digest) if key in by_key else None
        if twin is not None and key not in bank:
            report("same_picture", f"{folders.path(key)} is {folders.path(twin)}, byte for byte")


def _spread(values: Sequence[float]) -> list[float] | None:
    return [min(values), statistics.median(values), max(values)] if values else None
