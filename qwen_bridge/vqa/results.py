"""Scores answers in the official results format: a list of `{"question_id", "answer"}`.

The format is what the VQA evaluation servers take and what other systems write, so that their
answers and this project's can be scored by the same metric, on the same questions.
"""

from dataclasses import dataclass
from pathlib import Path

from qwen_bridge.errors import InputError
from qwen_bridge.vqa.accuracy import accuracy
from qwen_bridge.vqa.records import (
    label,
    official_answers,
    read_json,
    read_records,
    report_orphans,
)


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One question with the answer that was given and what it is worth.

    Attributes:
      question_id: of the questions file.
      answer: as the results file has it.
      accuracy: in [0, 1].
      question_type: the annotations' label; may be empty.
      answer_type: likewise.
    """

    question_id: int
    answer: str
    accuracy: float
    question_type: str
    answer_type: str


def read_results(path: str | Path) -> dict[int, str]:
    """Reads a results file, plain or gzip: the answer to each question id.

    Raises:
      InputError: the file is not in the format, or answers a question twice.
    """
    document = read_json("results", path)
    if not isinstance(document, list):
        raise InputError(
            f'--results={path} is not a list; the format is [{{"question_id": 1, "answer": "2"}}]'
        )
    answers: dict[int, str] = {}
    for row, record in enumerate(document):
        question_id = record.get("question_id") if isinstance(record, dict) else None
        if type(question_id) is not int:
            raise InputError(f"{path}: [{row}] has no whole number as 'question_id'; add it")
        if not isinstance(record.get("answer"), str):
            raise InputError(f"{path}: question_id {question_id} has no text as 'answer'; add it")
        if question_id in answers:
            raise InputError(f"{path}: question_id {question_id} is answered twice; keep one")
        answers[question_id] = record["answer"]
    return answers


def score_results(
    questions: str | Path,
    annotations: str | Path,
    results: str | Path,
    metric: str = "official_2021",
) -> list[ScoredAnswer]:
    """Scores a results file against all questions of a split, as the published tool does.

    Args:
      questions: official questions file.
      annotations: official annotations file of the same questions.
      results: answers; one to each question and to no other.
      metric: one of `accuracy.MODES`.

    Returns:
      One a question, in the order of the questions file; at least one.

    Raises:
      InputError: a file is not what it should be, or the three are not about the same questions.
    """
    answers = read_results(results)
    _, annotated = read_records("annotations", annotations, "annotations")
    _, asked = read_records("questions", questions, "questions")
    report_orphans("no_annotation", asked, questions, "annotation", annotated, annotations)
    report_orphans("no_question", annotated, annotations, "question", asked, questions)
    report_orphans("no_question", answers, results, "question", asked, questions)
    missing = [question_id for question_id in asked if question_id not in answers]
    if missing:
        raise InputError(
            f"--results={results} leaves {len(missing):,} of {len(asked):,} questions without an "
            f"answer, the first of them question_id {missing[0]}; answer all, if only with ''"
        )
    if not asked:
        raise InputError(f"--questions={questions} asks nothing; give a file with questions")
    scored = []
    for question_id in asked:
        place = f"{annotations}: question_id {question_id}"
        annotation = annotated[question_id]
        answer = answers[question_id]
        scored.append(
            ScoredAnswer(
                question_id=question_id,
                answer=answer,
                accuracy=accuracy(answer, official_answers(annotation, place), metric),
                question_type=label(annotation, "question_type", place),
                answer_type=label(annotation, "answer_type", place),
            )
        )
    return scored
