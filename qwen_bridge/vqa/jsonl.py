"""Reads people's own data: one JSON object a line, beside a folder of images.

    {"image": "kitchen/12.jpg", "question": "What is on the stove?", "answers": ["pot", "a pot"]}

`image` is a path inside the image folder; `answers` is a list with one text an annotator, or a
single text. Optional are `id` (a whole number, or a text), `question_type` and `answer_type`;
other fields are passed over, and null counts as absent. Files may be gzip. One file becomes the
bank, another (or the same) the queries. Nothing is guessed: what does not fit is an `InputError`
that names the file and the line. Images are opened only when asked for.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset, Example
from qwen_bridge.vqa.images import ImageFolders, image_folders, path_inside
from qwen_bridge.vqa.records import Report, field, label, one_line, open_bytes, shown, stop, texts
from qwen_bridge.vqa.subsample import SubSample, subsampled

# What decides the name of an image's file, for messages.
NAMED_BY = "the field 'image'"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def load_jsonl(
    bank_jsonl: str | Path,
    query_jsonl: str | Path,
    bank_images: str | Path = "",
    query_images: str | Path = "",
    *,
    sample: SubSample,
    name: str = "jsonl",
) -> Dataset:
    """Loads two files and draws from them; see `subsampled`.

    An example without `id` gets a hash of its image's path, question and answers, so that ids do
    not depend on the order of the lines and an example that changes becomes another.

    Args:
      bank_jsonl: demonstrations.
      query_jsonl: queries.
      bank_images: folder of the bank's images; the folder of `bank_jsonl` if empty.
      query_images: likewise.
      sample: how many examples to use, and which.
      name: for reports.

    Raises:
      InputError: whatever is wrong with the files or the numbers.
    """
    folders = image_folders(
        images_of("bank", bank_jsonl, bank_images),
        images_of("query", query_jsonl, query_images),
        named_by=NAMED_BY,
    )
    return subsampled(
        name,
        list(read_jsonl("bank", bank_jsonl, folders).values()),
        list(read_jsonl("query", query_jsonl, folders).values()),
        folders,
        sample,
        queries_file=query_jsonl,
    )


def images_of(role: str, path: str | Path, images: str | Path) -> str | Path:
    """The image folder of a file: the one that is given, or else the file's own.

    Raises:
      InputError: no folder is given, and there is no file.
    """
    if not images and not Path(path).is_file():
        raise InputError(f"--{role}_jsonl={path} is not a file; check the path")
    return images or Path(path).parent


def read_jsonl(
    role: str, path: str | Path, folders: ImageFolders, report: Report = stop
) -> dict[int, Example]:
    """Reads one file.

    Args:
      role: "bank" or "query".
      path: the file, plain or gzip.
      folders: where the images are.
      report: is told of every fault.

    Returns:
      The examples by the number of their line, in the file's order; ids are unique, and blank
      lines are passed over. Where `report` does not stop at a fault, a line that cannot be an
      example is left out, and one without answers has none.

    Raises:
      InputError: the file cannot be read at all, or whatever `report` raises.
    """
    folder = folders.folder_of(role)
    examples: dict[int, Example] = {}
    line_of: dict[int, int] = {}
    with open_bytes(f"{role}_jsonl", path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            place = f"{path}:{number}"
            record = _parsed(line, place, report)
            example = None if record is None else _example(record, folder, place, report)
            if example is None:
                continue
            if example.id in line_of:
                report(
                    "duplicate_id",
                    f"{place}: id {example.id} is that of line {line_of[example.id]} already; "
                    "give each line an id of its own, or remove the line if it is a repetition",
                )
                continue
            line_of[example.id] = number
            examples[number] = example
    if not examples:
        report("empty_split", f"{path}: no line is an example; write one a line")
    return examples


def _parsed(line: bytes, place: str, report: Report) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        report("bad_record", f"{place}: not JSON ({one_line(error)}); a line is one object")
        return None
    if not isinstance(record, dict):
        report("bad_record", f"{place}: not a JSON object; write it as {{...}} in one line")
        return None
    return record


def _example(record: dict[str, Any], folder: str, place: str, report: Report) -> Example | None:
    file = field(record, "image", str, place, report)
    image = None if file is None else path_inside(file)
    if file is not None and image is None:
        report(
            "bad_image_name",
            f"{place}: image {shown(file)} lies outside the image folder; give a path inside it",
        )
    question = field(record, "question", str, place, report)
    answers = _answers(record, place, report)
    labels = [
        "" if record.get(name) is None else label(record, name, place, report)
        for name in ("question_type", "answer_type")
    ]
    id = _id(record, [image, question, answers], place, report)
    if None in (image, question, id):
        return None
    return Example(id, sys.intern(f"{folder}/{image}"), sys.intern(question), answers, *labels)


def _answers(record: dict[str, Any], place: str, report: Report) -> tuple[str, ...]:
    answers = record.get("answers")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers:
        report(
            "no_answers",
            f"{place}: field 'answers' is missing or empty; give a list of texts, one an "
            "annotator, or a single text",
        )
        return ()
    # As the official files have them: an annotator's record with the answer in it.
    answers = [each.get("answer") if isinstance(each, dict) else each for each in answers]
    return texts(
        answers,
        place,
        "is neither a text in quotation marks nor an object with a text 'answer'",
        report,
    )


def _id(record: dict[str, Any], content: list, place: str, report: Report) -> int | None:
    """The example's number: as given, or a hash of the text given, or else of the content."""
    id = record.get("id")
    if id is None:
        return _hash63(content)
    if isinstance(id, str):
        return _hash63(id)  # as JSON in ASCII, so any text will do
    if type(id) is not int or not 0 <= id < 2**63:
        report(
            "bad_id",
            f"{place}: id {shown(id)} is not one; give a whole number in [0, 2**63) or a "
            "text, or none",
        )
        return None
    return id


def _hash63(content: Any) -> int:
    """A number in [0, 2**63) that is the same on every machine and in every run."""
    text = json.dumps(content, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
