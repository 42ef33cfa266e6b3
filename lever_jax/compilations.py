"""Counts what XLA compiles: a run can show that it compiles nothing after its first epoch."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_thread = threading.local()


@contextlib.contextmanager
def count_compilations() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many programs this process compiled since the block began.

    Every program of every thread counts, whoever asked for it, small ones of single operations
    too; but for what a thread compiles ahead.
    """
    count = 0

    def listen(event: str, seconds: float, **_) -> None:
        nonlocal count
        del seconds
        count += event == _EVENT and not getattr(_thread, "ahead", False)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """What this thread compiles in the block is for later, and counts for no one."""
    _thread.ahead = True
    try:
        yield
    finally:
        _thread.ahead = False
