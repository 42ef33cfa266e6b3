"""Reads VQAv2, OK-VQA and any data in their JSON format.

A split is a questions file (`{"questions": [{"question_id", "image_id", "question"}]}`), an
annotations file (`{"annotations": [{"question_id", "answers": [{"answer"}], "question_type",
"answer_type"}]}`), both plain or gzip, and a folder of images. Of OK-VQA's two strings an
annotator, `answer` and `raw_answer`, the first is read, as its metric does. One split becomes the
bank, the other the queries. Nothing is guessed: what does not fit together is an `InputError`
that names the file and the question. Images are opened only when asked for.
"""

import string
import sys
from pathlib import Path

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.examples import Dataset, Example
from qwen_bridge.vqa.images import ImageFolders, image_folders, path_inside
from qwen_bridge.vqa.records import (
    Report,
    field,
    label,
    official_answers,
    read_records,
    report_orphans,
    shown,
    stop,
)
from qwen_bridge.vqa.subsample import SubSample, subsampled

DEFAULT_IMAGE_PATTERN = "COCO_{data_subtype}_{image_id:012d}.jpg"
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
    sample: SubSample,
    name: str = "vqa",
) -> Dataset:
    """Loads two splits and draws from them; see `subsampled`.

    Args:
      bank_questions: questions of the bank; its annotations and image folder follow.
      query_questions: questions of the queries, likewise.
      image_pattern: file name of an image; `{image_id}` is the question's, `{data_subtype}` the
        questions file's ("train2014").
      sample: how many examples to use, and which.
      name: for reports.

    Raises:
      InputError: whatever is wrong with the files or the numbers.
    """
    check_pattern(image_pattern)
    folders = image_folders(bank_images, query_images)
    return subsampled(
        name,
        read_split("bank", bank_questions, bank_annotations, image_pattern, folders),
        read_split("query", query_questions, query_annotations, image_pattern, folders),
        folders,
        sample,
        queries_file=query_questions,
    )


def check_pattern(pattern: str):
    """Refuses an image pattern that cannot name images.

    Raises:
      InputError: it lacks `{image_id}`, or asks for what is not there.
    """
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern)} - {None}
    except ValueError as error:
        raise InputError(f"--image_pattern={pattern} is not a pattern ({error})") from None
    if "image_id" not in fields or not fields <= _PLACEHOLDERS:
        raise InputError(
            f"--image_pattern={pattern} must contain {{image_id}}, may contain {{data_subtype}}, "
            "and nothing else in braces"
        )


def read_split(
    role: str,
    questions: str | Path,
    annotations: str | Path,
    pattern: str,
    folders: ImageFolders,
    report: Report = stop,
) -> list[Example]:
    """Joins the two files of a split by question_id, in the order of the questions file.

    Args:
      role: "bank" or "query".
      questions: the questions file.
      annotations: the annotations file.
      pattern: checked by `check_pattern`.
      folders: where the images are.
      report: is told of every fault.

    Returns:
      One example a question. Where `report` does not stop at a fault, a question that cannot be
      an example is left out, and one without answers has none.

    Raises:
      InputError: a file cannot be read at all, or whatever `report` raises.
    """
    _, annotated = read_records(f"{role}_annotations", annotations, "annotations", report)
    document, asked = read_records(f"{role}_questions", questions, "questions", report)
    report_orphans("no_annotation", asked, questions, "annotation", annotated, annotations, report)
    report_orphans("no_question", annotated, annotations, "question", asked, questions, report)
    subtype = document.get("data_subtype")
    if "{data_subtype" in pattern and not isinstance(subtype, str):
        raise InputError(
            f"{questions}: no text field 'data_subtype', which --image_pattern={pattern} needs; "
            "add it, or write its value into the pattern"
        )
    images: dict[int | str, str | None] = {}
    examples = []
    for question_id, record in asked.items():
        place = f"{questions}: question_id {question_id}"
        if not 0 <= question_id < 2**63:
            report("bad_id", f"{place} is outside [0, 2**63); renumber it in both files")
            continue
        annotation = annotated.get(question_id)
        annotation_place = f"{annotations}: question_id {question_id}"
        image_id = field(record, "image_id", (int, str), place, report)
        if image_id is not None:
            if annotation and annotation.get("image_id", image_id) != image_id:
                report(
                    "two_images",
                    f"{annotation_place}: image_id {shown(annotation['image_id'])} "
                    f"is not the {shown(image_id)} of {questions}; correct one",
                )
            if image_id not in images:
                file = _image_file(pattern, image_id, subtype, place, report)
                images[image_id] = file and f"{folders.folder_of(role)}/{file}"
        question = field(record, "question", str, place, report)
        answers, question_type, answer_type = (), "", ""
        if annotation is not None:
            answers = official_answers(annotation, annotation_place, report)
            question_type = label(annotation, "question_type", annotation_place, report)
            answer_type = label(annotation, "answer_type", annotation_place, report)
        image = images.get(image_id)
        if image is not None and question is not None:
            examples.append(
                Example(
                    id=question_id,
                    image=image,
                    question=sys.intern(question),
                    answers=answers,
                    question_type=question_type,
                    answer_type=answer_type,
                )
            )
    return examples


def _image_file(
    pattern: str, image_id: int | str, subtype: str | None, place: str, report: Report
) -> str | None:
    """Forms the path of an image inside its folder, and refuses one that would leave it."""
    try:
        file = pattern.format(image_id=image_id, data_subtype=subtype)
    except (ValueError, TypeError, LookupError) as error:
        report(
            "bad_image_name",
            f"{place}: image_id {shown(image_id)} does not fit --image_pattern={pattern} "
            f"({error}); change the pattern",
        )
        return None
    path = path_inside(file)
    if path is None:
        report(
            "bad_image_name",
            f"{place}: image {shown(file)} lies outside the image folder; correct the image_id",
        )
    return path
