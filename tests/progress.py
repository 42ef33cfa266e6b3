"""What tests give to those that show how far they are."""

import contextlib


@contextlib.contextmanager
def no_bar(label, total):
    """A progress bar that nobody sees."""
    del label, total
    yield lambda count: None
