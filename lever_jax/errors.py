"""The error for input that the user can mend."""


class InputError(Exception):
    """What the user gave cannot be used.

    The message names the flag, field or file, its value, what would be allowed and the mend. Entry
    points print it in one line, without a traceback, and exit with code 2.
    """
