"""The one exception that means "your input is wrong", on the environment's side.

Entry points print it in one line and exit with code 2; anything else is a bug and keeps its
traceback. The policy's side has a class of the same name, as the two never import each other.
"""


class InputError(Exception):
    """Bad user input; the message names the file, field or flag, its value and the mend."""


def check_within(name: str, value: int, low: int, high: int) -> None:
    """Raises InputError where an argument is out of its range."""
    if not low <= value <= high:
        raise InputError(f"{name}={value} is out of range; it must be in [{low}, {high}]")
