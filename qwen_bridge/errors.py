"""The exceptions that users of the bridge see: their input is wrong, or the workers are.

Entry points print an `InputError` in one line and exit with code 2; the policy's side has a class
of the same name, as the two never import each other. What is none of these is a bug and keeps its
traceback.
"""


class InputError(Exception):
    """Bad user input; the message names the file, field or flag, its value and the mend."""


class WorkerError(RuntimeError):
    """The workers cannot be kept running, or one that came back is not the same."""


class ScorerError(RuntimeError):
    """The scorer raises an exception for one query after the other: a bug, not a hard prompt."""


def check_within(name: str, value: int, low: int, high: int) -> None:
    """Raises InputError where an argument is out of its range."""
    if not low <= value <= high:
        raise InputError(f"{name}={value} is out of range; it must be in [{low}, {high}]")
