"""Reads VQAv2, OK-VQA and any data in their JSON format.

A split is a questions file (`{"questions": [{"question_id", "image_id", "question"}]}`), an
annotations file (`{"annotations": [{"question_id", "answers": [{"answer"}], "question_type",
"answer_type"}]}`), both plain or gzip, and a folder of images. Of OK-VQA's two strings an
annotator, `answer` and `raw_answer`, the first is read, as its metric does. One split becomes the
bank, the other the queries. Nothing is guessed: what does not fit together is an `InputError`
that names the file and the question. Images are opened only when asked for.
"""

import gzip
import hashlib
import itertools
import json
import string
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset, Example, fingerprint_of

DEFAULT_IMAGE_PATTERN = "COCO_{data_subtype}_{image_id:012d}.jpg"
# Eight 3840 x 2160 frames: far more than a VLM looks at; a larger file is a bomb or a mistake.
MAX_IMAGE_PIXELS = 8 * 3840 * 2160
# Pillow would start other programs for some formats (EPS); these it decodes itself.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_PLACEHOLDERS = {"image_id", "data_subtype"}


def load_official(
    bank_questions: str | Path,
    bank_annotations: str | Path,
    bank_images: str | Path,
    query_questions: str | Path,
    query_annotations: str | Path,
    query_images: str | Path,
    image_pattern: str = DEFAULT_IMAGE_PATTERN,
    *,
    num_train: int,
    num_eval: int,
    seed: int,
    max_bank: int | None = None,
    name: str = "vqa",
) -> Dataset:
    """Loads two splits; queries and, if asked, the bank are sub-sampled by seed.

    Evaluation queries lie on different images if they can, and training queries on images
    without evaluation queries until these are used up. As long as `num_train` is at most half of
    the questions, the evaluation queries do not depend on it and a larger one adds training
    queries and changes none. No choice depends on the order of the file.

    Args:
      bank_questions: questions of the bank; its annotations and image folder follow.
      query_questions: questions of the queries, likewise.
      image_pattern: file name of an image; `{image_id}` is the question's, `{data_subtype}` the
        questions file's ("train2014").
      num_train: how many queries to train on, at least 0.
      num_eval: how many queries to evaluate on, at least 0.
      seed: draws the sub-samples.
      max_bank: at most so many demonstrations; all of them by default.
      name: for reports.

    Returns:
      A data set whose fingerprint covers the bank, the evaluation queries and all queries of
      the file, but not which of them are trained on: mined scores stay valid when `num_train`
      grows.

    Raises:
      InputError: whatever is wrong with the files or the numbers.
    """
    if max_bank is not None and max_bank < 1:
        raise InputError(f"--max_bank={max_bank} leaves no demonstrations; give 1 or more")
    for flag, number in (("num_train", num_train), ("num_eval", num_eval)):
        if number < 0:
            raise InputError(f"--{flag}={number} is negative; give 0 or more")
    _check_pattern(image_pattern)
    folders = _image_folders(bank_images, query_images)

    bank = _read_split("bank", bank_questions, bank_annotations, image_pattern, folders)
    queries = _read_split("query", query_questions, query_annotations, image_pattern, folders)
    if num_train + num_eval > len(queries):
        raise InputError(
            f"--num_train={num_train} and --num_eval={num_eval} together exceed the "
            f"{len(queries)} questions in {query_questions}; lower them or add questions"
        )
    if max_bank is not None and max_bank < len(bank):
        chosen = set(_shuffled((example.id for example in bank), seed, "bank")[:max_bank])
        bank = [example for example in bank if example.id in chosen]
    train, evaluation = _divide(queries, num_train, num_eval, seed)
    return Dataset(
        name=name,
        bank=tuple(bank),
        train=tuple(train),
        eval=tuple(evaluation),
        load_image=folders,
        fingerprint=fingerprint_of(bank, evaluation, sorted(queries, key=lambda e: e.id)),
    )


@dataclass(frozen=True)
class _ImageFolders:
    """Opens images by key, "FOLDER/FILE", where FOLDER is one of the names in `paths`.

    Keys hold no absolute path, so that a data set can be moved and keep its fingerprint. Where
    bank and queries share a folder they share its name, so that the same file has the same key.
    """

    paths: dict[str, Path]

    def folder_of(self, role: str) -> str:
        return role if role in self.paths else "bank"

    def __call__(self, key: str) -> Image.Image:
        folder, _, file = key.partition("/")
        path = self.paths[folder] / file
        try:
            with Image.open(path, formats=_IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height <= MAX_IMAGE_PIXELS:
                    return image.convert("RGB")
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such image; check --{folder}_images and --image_pattern"
            ) from None
        except Exception as error:  # A broken file can make the decoders raise nearly anything.
            raise InputError(
                f"{path}: cannot be decoded as an image ({_line(error)}); replace the file "
                "or remove its questions"
            ) from error
        raise InputError(
            f"{path}: {width} x {height} pixels exceed the limit of {MAX_IMAGE_PIXELS}; "
            "scale the image down"
        )


def _image_folders(bank_images: str | Path, query_images: str | Path) -> _ImageFolders:
    paths = {"bank": Path(bank_images), "query": Path(query_images)}
    for role, path in paths.items():
        if not path.is_dir():
            raise InputError(f"--{role}_images={path} is not a folder; give the images' folder")
    if paths["bank"].resolve() == paths["query"].resolve():
        del paths["query"]
    return _ImageFolders(paths)


def _read_split(
    role: str, questions: str | Path, annotations: str | Path, pattern: str, folders: _ImageFolders
) -> list[Example]:
    """Joins the two files of a split by question_id, in the order of the questions file."""
    _, annotated = _read_records(f"{role}_annotations", annotations, "annotations")
    document, asked = _read_records(f"{role}_questions", questions, "questions")
    _refuse_orphans(asked, questions, "annotation", annotated, annotations)
    _refuse_orphans(annotated, annotations, "question", asked, questions)
    subtype = document.get("data_subtype")
    if "{data_subtype" in pattern and not isinstance(subtype, str):
        raise InputError(
            f"{questions}: no text field 'data_subtype', which --image_pattern={pattern} needs; "
            "add it, or write its value into the pattern"
        )
    images: dict[int | str, str] = {}
    examples = []
    for question_id, record in asked.items():
        place = f"{questions}: question_id {question_id}"
        annotation = annotated[question_id]
        annotation_place = f"{annotations}: question_id {question_id}"
        image_id = _field(record, "image_id", (int, str), place)
        if annotation.get("image_id", image_id) != image_id:
            raise InputError(
                f"{annotation_place}: image_id {annotation['image_id']!r} is not the {image_id!r} "
                f"of {questions}; correct one"
            )
        if image_id not in images:
            file = _image_file(pattern, image_id, subtype, place)
            images[image_id] = f"{folders.folder_of(role)}/{file}"
        examples.append(
            Example(
                id=question_id,
                image=images[image_id],
                question=sys.intern(_field(record, "question", str, place)),
                answers=_answers(annotation, annotation_place),
                question_type=_label(annotation, "question_type", annotation_place),
                answer_type=_label(annotation, "answer_type", annotation_place),
            )
        )
    return examples


def _read_records(
    flag: str, path: str | Path, name: str
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Reads the document of one file, and the records in its list `name` by question_id."""
    document = _read_json(flag, path)
    records = document.pop(name, None)
    if not isinstance(records, list):
        raise InputError(f"--{flag}={path} has no list {name!r}; give the {name} file of the split")
    by_id = {}
    for row, record in enumerate(records):
        question_id = record.get("question_id") if isinstance(record, dict) else None
        if type(question_id) is not int:
            raise InputError(
                f"{path}: {name}[{row}] has no whole number as 'question_id'; add it or remove it"
            )
        if question_id in by_id:
            raise InputError(f"{path}: question_id {question_id} occurs twice; remove one")
        by_id[question_id] = record
    return document, by_id


def _read_json(flag: str, path: str | Path) -> dict[str, Any]:
    """Parses a JSON object from a plain or gzip file, whatever its name ends in."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        opener = gzip.open if zipped else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            document = json.load(file, object_hook=_only_the_answer)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"--{flag}={path} is not JSON ({_line(error)}); give the official file, plain or gzip"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"--{flag}={path} cannot be read ({_line(error)}); check the path and the file"
        ) from None
    if not isinstance(document, dict):
        raise InputError(f"--{flag}={path} is not a JSON object; give the official file")
    return document


def _only_the_answer(record: dict[str, Any]) -> Any:
    """Turns an annotator's record into its answer while parsing: millions of records are GBs."""
    if "answer" not in record or "question_id" in record:
        return record
    answer = record["answer"]
    return sys.intern(answer) if isinstance(answer, str) else answer


def _refuse_orphans(
    ids: Iterable[int], path: str | Path, missing: str, others: dict[int, Any], other: str | Path
):
    orphans = [question_id for question_id in ids if question_id not in others]
    if orphans:
        more = f" (and {len(orphans) - 1} more)" if len(orphans) > 1 else ""
        raise InputError(
            f"{path}: question_id {orphans[0]}{more} has no {missing} in {other}; "
            "add it there or remove it here"
        )


def _field(record: dict[str, Any], name: str, kinds: type | tuple[type, ...], place: str) -> Any:
    value = record.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        wanted = " or ".join({int: "a whole number", str: "text"}[kind] for kind in kinds)
        given = f"is {value!r}" if name in record else "is missing"
        raise InputError(f"{place}: field {name!r} {given}; it must be {wanted}")
    return value


def _label(annotation: dict[str, Any], name: str, place: str) -> str:
    return sys.intern(_field(annotation, name, str, place)) if name in annotation else ""


def _answers(annotation: dict[str, Any], place: str) -> tuple[str, ...]:
    answers = annotation.get("answers")
    if not isinstance(answers, list) or not answers:
        raise InputError(f"{place}: field 'answers' is missing or empty; a split needs answers")
    for row, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise InputError(f"{place}: answers[{row}] has no text as 'answer'; add it")
    return tuple(answers)


def _check_pattern(pattern: str):
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(pattern)} - {None}
    except ValueError as error:
        raise InputError(f"--image_pattern={pattern} is not a pattern ({error})") from None
    if "image_id" not in fields or not fields <= _PLACEHOLDERS:
        raise InputError(
            f"--image_pattern={pattern} must contain {{image_id}}, may contain {{data_subtype}}, "
            "and nothing else in braces"
        )


def _image_file(pattern: str, image_id: int | str, subtype: str | None, place: str) -> str:
    """Forms the path of an image inside its folder, and refuses one that would leave it."""
    try:
        file = pattern.format(image_id=image_id, data_subtype=subtype)
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"{place}: image_id {image_id!r} does not fit --image_pattern={pattern} ({error}); "
            "change the pattern"
        ) from None
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in file:
        raise InputError(
            f"{place}: image {file!r} lies outside the image folder; correct the image_id"
        )
    return str(path)


def _divide(
    queries: list[Example], num_train: int, num_eval: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draws the training and the evaluation queries, as `load_official` promises."""
    by_id = {example.id: example for example in queries}
    order = [by_id[id] for id in _shuffled(by_id, seed, "query")]
    by_image: dict[str, list[Example]] = {}
    for example in order:
        by_image.setdefault(example.image, []).append(example)
    # Evaluation takes a query from each image before a second from any, and training wants images
    # that evaluation leaves: so evaluation draws from half of the questions, from fewer where
    # training needs more, and always from as many as it needs itself.
    limit = min(len(queries) // 2, len(queries) - num_train)
    groups: list[list[Example]] = []
    room = 0
    for group in by_image.values():
        if room >= num_eval and room + len(group) > limit:
            break
        groups.append(group)
        room += len(group)
    rounds = itertools.zip_longest(*groups)
    in_turn = (example for turn in rounds for example in turn if example is not None)
    evaluation = list(itertools.islice(in_turn, num_eval))

    taken = {example.id for example in evaluation}
    shared = {example.image for example in evaluation}
    rest = [example for example in order if example.id not in taken]
    rest.sort(key=lambda example: example.image in shared)
    return rest[:num_train], evaluation


def _shuffled(ids: Iterable[int], seed: int, purpose: str) -> list[int]:
    """Orders ids by a hash, so that where an id stands among others depends on the seed only."""

    def rank(id: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{purpose}/{id}".encode(), digest_size=16).digest()

    return sorted(ids, key=rank)


def _line(error: Exception) -> str:
    """The error's message in one line, its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
