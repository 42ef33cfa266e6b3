"""The one exception that means "your input is wrong", on the environment's side.

Entry points print it in one line and exit with code 2; anything else is a bug and keeps its
traceback. The policy's side has a class of the same name, as the two never import each other.
"""


class InputError(Exception):
    """Bad user input; the message names the file, field or flag, its value and the mend."""
