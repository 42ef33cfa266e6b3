"""Entry points; the first lines that run, and so the place that answers an early Ctrl-C."""

import sys


def _stopped_early(kind, error, trace):
    """One line where imports are interrupted; `cli.run` answers once they are done."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything had begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _stopped_early
