"""Ctrl-C arrives only where it does no harm.

Python raises KeyboardInterrupt between any two steps of the program: after a slot is taken and
before its request is sent, or while a process is being started and nobody knows it yet. Here it
is held back for those few milliseconds and delivered at the next wait or callback.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Holds back the Python handlers of SIGINT and SIGTERM, in the main thread.

    What the user installed as a handler is called, only later; signals that end the process
    without Python's doing still do.
    """

    def __init__(self):
        self._handlers: dict[int, object] = {}
        self._pending: list[int] = []
        self._allowed = False
        self._but_the_first = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until `allowed`, or until the end of the outermost such block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        outermost, before = not self._handlers, self._allowed
        self._allowed = False
        try:
            if outermost:
                self._install()
            yield
        finally:
            self._allowed = before
            if outermost:
                self._restore()
            elif self._due():
                self._deliver(self._handlers)

    @contextlib.contextmanager
    def allowed(self, *, but_the_first: bool = False) -> Iterator[None]:
        """Signals are delivered at once, those that waited first.

        Args:
          but_the_first: the first Ctrl-C waits on; a second one brings it along.
        """
        before = self._allowed, self._but_the_first
        try:
            self._allowed, self._but_the_first = True, but_the_first
            if self._due():
                self._deliver(self._handlers)
            yield
        finally:
            self._allowed, self._but_the_first = before

    def _due(self) -> bool:
        """Whether what waits may be delivered now."""
        return self._allowed and not (self._but_the_first and self._pending == [signal.SIGINT])

    def _install(self) -> None:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def _restore(self) -> None:
        handlers, self._handlers = self._handlers, {}
        for number, handler in handlers.items():
            # Somebody may have installed another one meanwhile; that one stays.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._deliver(handlers)

    def _handle(self, number: int, frame) -> None:
        self._pending.append(number)
        if self._due():
            self._deliver(self._handlers, frame)

    def _deliver(self, handlers: dict, frame=None) -> None:
        try:
            while self._pending:
                number = self._pending.pop(0)
                handlers[number](number, frame)
        finally:
            self._pending.clear()  # What is left would hit a later call.
