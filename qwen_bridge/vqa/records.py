"""Reads records out of JSON files: plain or gzip, field by field, refusing what does not fit.

A reader takes a `Report`, which is told of everything that is wrong. Loaders hand it `stop`, which
raises at the first fault; the check of a whole data set hands it a list to be filled, and goes on.
So what is checked before a run and what is refused in a run cannot drift apart. A reader that
reported and was not stopped returns what it could read, or None.
"""

import contextlib
import gzip
import json
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from qwen_bridge.errors import InputError

_HALF_A_PAIR = "half a surrogate pair, which is no character; write the whole character"

# Takes the kind of a fault (one of the keys of `checks.KINDS`) and the message.
Report = Callable[[str, str], None]


def stop(kind: str, message: str):
    """The `Report` of loaders: the first fault ends it."""
    del kind
    raise InputError(message)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def shown(value: Any) -> str:
    """A value from a file as messages show it: as Python writes it, cut where it is long."""
    return _SHORT.repr(value)


def one_line(error: Exception) -> str:
    """The error's message in one line, its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def open_bytes(flag: str, path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a plain or gzip file, known by its content, whatever its name ends in.

    Raises:
      InputError: the file cannot be opened, or reading it fails later; names `flag`.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"--{flag}={path} cannot be read ({one_line(error)}); check the path and the file"
        ) from None


def read_json(flag: str, path: str | Path) -> Any:
    """Parses a whole file of UTF-8 JSON, plain or gzip; an annotator's record becomes its answer.

    Raises:
      InputError: it cannot be read, or is not JSON.
    """
    try:
        with open_bytes(flag, path) as file:
            return json.loads(file.read().decode("utf-8-sig"), object_hook=_only_the_answer)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"--{flag}={path} is not JSON ({one_line(error)}); give the official file, plain or "
            "gzip"
        ) from None


def read_records(
    flag: str, path: str | Path, name: str, report: Report = stop
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Reads an official document: what stands around its list `name`, and the list's records by id.

    Raises:
      InputError: the file has no such list, whatever `report` does.
    """
    document = read_json(flag, path)
    if not isinstance(document, dict):
        raise InputError(f"--{flag}={path} is not a JSON object; give the official file")
    records = document.pop(name, None)
    if not isinstance(records, list):
        raise InputError(f"--{flag}={path} has no list {name!r}; give the {name} file of the split")
    by_id = {}
    for row, record in enumerate(records):
        question_id = record.get("question_id") if isinstance(record, dict) else None
        if type(question_id) is not int:
            report(
                "bad_record",
                f"{path}: {name}[{row}] has no whole number as 'question_id'; add it or remove it",
            )
        elif question_id in by_id:
            report("duplicate_id", f"{path}: question_id {question_id} occurs twice; remove one")
        else:
            by_id[question_id] = record
    return document, by_id


def report_orphans(
    kind: str,
    ids: Iterable[int],
    path: str | Path,
    missing: str,
    others: dict[int, Any],
    other: str | Path,
    report: Report = stop,
):
    """Reports the question ids of one file that another, which has `missing`, does not have."""
    orphans = [question_id for question_id in ids if question_id not in others]
    # Where the first is also the last that is reported, it speaks for the others.
    more = f" (and {len(orphans) - 1} more)" if len(orphans) > 1 and report is stop else ""
    for question_id in orphans:
        report(
            kind,
            f"{path}: question_id {question_id}{more} has no {missing} in {other}; "
            "add it there or remove it here",
        )


def field(
    record: dict[str, Any],
    name: str,
    kinds: type | tuple[type, ...],
    place: str,
    report: Report = stop,
) -> Any:
    """The value of a field that must be there and of one of the `kinds`; else None.

    A text must also be Unicode; see `is_unicode`.
    """
    value = record.get(name)
    if isinstance(value, kinds) and not isinstance(value, bool):
        if not isinstance(value, str) or is_unicode(value):
            return value
        report("bad_text", f"{place}: field {name!r} has {_HALF_A_PAIR}")
        return None
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    wanted = " or ".join({int: "a whole number", str: "text"}[kind] for kind in kinds)
    given = f"is {shown(value)}" if name in record else "is missing"
    report("bad_field", f"{place}: field {name!r} {given}; it must be {wanted}")
    return None


def label(record: dict[str, Any], name: str, place: str, report: Report = stop) -> str:
    """The text of a field that may be absent."""
    return sys.intern(field(record, name, str, place, report) or "") if name in record else ""


def official_answers(
    annotation: dict[str, Any], place: str, report: Report = stop
) -> tuple[str, ...]:
    """The annotators' raw answers in an annotation of the official format."""
    answers = annotation.get("answers")
    if not isinstance(answers, list) or not answers:
        report(
            "no_answers",
            f"{place}: field 'answers' is missing or empty; a split needs answers",
        )
        return ()
    return texts(answers, place, "has no text as 'answer'; add it", report)


def texts(answers: list[Any], place: str, otherwise: str, report: Report = stop) -> tuple[str, ...]:
    """Those of the `answers` that are texts; of others, `otherwise` says what is wrong."""
    kept = []
    for row, answer in enumerate(answers):
        if not isinstance(answer, str):
            report("bad_field", f"{place}: answers[{row}] {otherwise}")
        elif not is_unicode(answer):
            report("bad_text", f"{place}: answers[{row}] has {_HALF_A_PAIR}")
        else:
            kept.append(sys.intern(answer))
    return tuple(kept)


def is_unicode(text: str) -> bool:
    """Whether the text can be written: JSON can hold half a surrogate pair, a tokenizer cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _only_the_answer(record: dict[str, Any]) -> Any:
    """Turns an annotator's record into its answer while parsing: millions of records are GBs."""
    if "answer" not in record or "question_id" in record:
        return record
    answer = record["answer"]
    return sys.intern(answer) if isinstance(answer, str) else answer
