"""Looks a data set over before any GPU-hour is spent on it, and lists all that is wrong.

    python -m experiments.check_data --bank_jsonl=bank.jsonl --query_jsonl=queries.jsonl
    python -m experiments.check_data --out=check.json
        --bank_questions=... --bank_annotations=... --bank_images=...
        --query_questions=... --query_annotations=... --query_images=...

The flags of the data are those of `experiments.train`, whose flag files can be given as they are.
Bank or queries alone can be checked too, and with --image_check=none without image folders.
Exit code 0: nothing wrong, at most notes; 1: problems were found; 2: bad flags, or a file that
cannot be read at all.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from rich.table import Table

from experiments import cli, settings
from experiments.output import check_out, write_out
from experiments.progress import CONSOLE, bar, note, stage
from qwen_bridge.errors import InputError
from qwen_bridge.vqa.checks import (
    IMAGE_CHECKS,
    KINDS,
    NOTES,
    PROBLEMS,
    Findings,
    check_examples,
    check_images,
)
from qwen_bridge.vqa.examples import Example
from qwen_bridge.vqa.images import ImageFolders, image_folders
from qwen_bridge.vqa.jsonl import NAMED_BY, images_of, read_jsonl
from qwen_bridge.vqa.official import check_pattern, read_split

ROLES = ("bank", "query")
_OFFICIAL = ("questions", "annotations", "images")
_PROBLEMS_FOUND = 1

MIN_ANSWERS = flags.DEFINE_integer(
    "min_answers",
    None,
    "Fewer answers to a question are a problem; 10 if left out, 1 for JSONL.",
    lower_bound=1,
)
IMAGE_CHECK = flags.DEFINE_enum(
    "image_check", "decode", IMAGE_CHECKS, "Decode every image, read headers only, or none."
)
SHOW = flags.DEFINE_integer("show", 5, "Findings printed of each kind.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "JSON file of all figures and findings.")


def main():
    check_out(OUT.value)
    format, roles = _format_and_roles()
    folders = _folders(format, roles)
    min_answers = MIN_ANSWERS.value or (10 if format == "official" else 1)
    findings = Findings()

    stage(f"read: {format} files of {' and '.join(roles)}")
    splits, places = {}, {}
    for role in roles:
        splits[role], places[role] = _read(format, role, folders, findings)
        note(f"{role}: {len(splits[role]):,} questions that can be read")
    figures = {
        role: check_examples(splits[role], places[role], min_answers, findings) for role in roles
    }
    of_images = _check_images(splits, folders, findings)
    figures = {role: figures[role] | of_images[role] for role in roles}

    _print_figures(figures)
    _print_findings(findings)
    problems, notes = findings.count(PROBLEMS), findings.count(NOTES)
    write_out(
        OUT.value,
        {
            "format": format,
            "min_answers": min_answers,
            "image_check": IMAGE_CHECK.value,
            "problems": problems,
            "notes": notes,
            "splits": figures,
            "findings": {
                kind: {
                    "severity": "problem" if kind in PROBLEMS else "note",
                    "meaning": KINDS[kind],
                    "count": len(messages),
                    "messages": messages,
                }
                for kind, messages in findings.by_kind.items()
            },
        },
    )
    note(f"verdict: {_count(problems, 'problem')}, {_count(notes, 'note')}")
    if OUT.value:
        note(f"written to {OUT.value}")
    if problems:
        sys.exit(_PROBLEMS_FOUND)


def _check_images(splits, folders, findings) -> dict[str, dict[str, Any]]:
    how = IMAGE_CHECK.value
    if how == "none":
        return check_images(splits, folders, findings, how=how)
    stage(f"images: {how}")
    images = {example.image for examples in splits.values() for example in examples}
    with bar("images", len(images)) as advance:
        threads = settings.THREADS.value or os.cpu_count() or 1
        return check_images(splits, folders, findings, how=how, threads=threads, on_done=advance)


def _flag(role: str, what: str) -> str:
    return flags.FLAGS[f"{role}_{what}"].value


def _format_and_roles() -> tuple[str, list[str]]:
    """Which format, and which of the splits, the flags ask for; complete or refused."""
    lines = [role for role in ROLES if _flag(role, "jsonl")]
    documents = [role for role in ROLES if _flag(role, "questions") or _flag(role, "annotations")]
    format = "jsonl" if lines else "official"
    if flags.FLAGS["dataset"].present:
        format = settings.DATASET.value
    elif lines and documents:
        raise InputError(
            f"--{lines[0]}_jsonl and --{documents[0]}_questions are two formats; give one, or say "
            "which by --dataset"
        )
    if format not in ("official", "jsonl"):
        raise InputError(f"--dataset={format} reads no files, so there is nothing to check")
    roles = lines if format == "jsonl" else documents
    if not roles:
        wanted = "jsonl" if format == "jsonl" else "questions"
        raise InputError(
            f"no {format} data to check; give --bank_{wanted} or --query_{wanted}, or both"
        )
    if format == "official":
        for role in roles:
            for what in _OFFICIAL:
                if _flag(role, what) or (what == "images" and IMAGE_CHECK.value == "none"):
                    continue
                or_else = ", or --image_check=none" if what == "images" else ""
                raise InputError(
                    f"--{role}_{what} is missing; the {role} split needs it too{or_else}"
                )
    return format, roles


def _folders(format: str, roles: list[str]) -> ImageFolders:
    images = dict.fromkeys(ROLES)
    for role in roles:
        images[role] = _flag(role, "images") or None
        if format == "jsonl":
            images[role] = images_of(role, _flag(role, "jsonl"), _flag(role, "images"))
    if format == "jsonl":
        return image_folders(images["bank"], images["query"], NAMED_BY)
    check_pattern(settings.IMAGE_PATTERN.value)
    return image_folders(images["bank"], images["query"])


def _read(
    format: str, role: str, folders: ImageFolders, findings: Findings
) -> tuple[list[Example], Callable[[Example], str]]:
    """The examples of a split, and where each of them stands."""
    if format == "jsonl":
        path = _flag(role, "jsonl")
        by_line = read_jsonl(role, path, folders, findings)
        lines = {example.id: line for line, example in by_line.items()}
        return list(by_line.values()), lambda example: f"{path}:{lines[example.id]}"
    path = _flag(role, "questions")
    examples = read_split(
        role, path, _flag(role, "annotations"), settings.IMAGE_PATTERN.value, folders, findings
    )
    if not examples:
        findings("empty_split", f"{path}: not one question that can be read")
    return examples, lambda example: f"{path}: question_id {example.id}"


_FIGURES = (
    ("questions", "questions"),
    ("question_types", "question types"),
    ("answer_types", "answer types"),
    ("answers_per_question", "answers a question, least to most"),
    ("fewer_than_ten_answers", "questions with fewer than ten answers"),
    ("cannot_reach_full_marks", "questions that cannot reach accuracy 1.0"),
    ("best_possible_accuracy", "best possible accuracy, mean"),
    ("images", "images"),
    ("images_in_bank", "images that the bank has too"),
    ("width", "width, pixels: least, median, most"),
    ("height", "height, pixels: least, median, most"),
    ("megapixels", "megapixels: least, median, most"),
)


def _print_figures(figures: dict[str, dict[str, Any]]):
    table = Table(title="the data", title_justify="left")
    table.add_column("figure", no_wrap=True)
    for role in figures:
        table.add_column(role, justify="right", no_wrap=True)
    for name, title in _FIGURES:
        cells = [_cell(name, row.get(name), row["questions"]) for row in figures.values()]
        if any(cells):
            table.add_row(title, *cells)
    CONSOLE.print(table)


def _cell(name: str, value: Any, questions: int) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        places = 2 if name == "megapixels" else 0
        return " / ".join(f"{one:,.{places}f}" for one in value)
    if name == "best_possible_accuracy":
        return f"{value:.3f}"
    if name in ("fewer_than_ten_answers", "cannot_reach_full_marks") and questions:
        return f"{value:,} ({value / questions:.1%})"
    return f"{value:,}"


def _print_findings(findings: Findings):
    for severity, kinds in (("problem", PROBLEMS), ("note", NOTES)):
        for kind in kinds:
            messages = findings.by_kind.get(kind, [])
            if not messages:
                continue
            note(f"{severity}: {KINDS[kind]}: {len(messages):,}")
            for message in messages[: SHOW.value]:
                note(f"    {message}")
            if 0 < SHOW.value < len(messages):
                where = "all are in --out" if OUT.value else "--out=FILE lists all"
                note(f"    and {len(messages) - SHOW.value:,} more; {where}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}" if number else f"no {what}s"


if __name__ == "__main__":
    cli.run(main)
