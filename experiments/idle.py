"""How long the two sides of a run, the VLM's workers and JAX, had nothing to do."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from qwen_bridge.client import Environment


class IdleShares:
    """How much of the time the VLM's workers, and JAX, had nothing to do.

    Args:
      environment: the workers, whose `stats` tell how long each was busy.
    """

    def __init__(self, environment: Environment):
        self._environment = environment
        self._lock, self._inside = threading.Lock(), 0
        self._jax_s = self._entered = 0.0
        self._start = self._last = None

    @contextlib.contextmanager
    def jax_busy(self) -> Iterator[None]:
        """Counts the time of the block as JAX's, once where threads are in it together."""
        with self._lock:
            if not self._inside:
                self._entered = time.monotonic()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._jax_s += time.monotonic() - self._entered

    def begin(self) -> None:
        """Time counts from the first call on: before it nobody could have worked."""
        if self._start is None:
            self._start = self._last = self._now()

    def since_last(self) -> dict[str, float]:
        """Idle shares since the last call, in [0, 1]."""
        before, self._last = self._last, self._now()
        return _idle(before, self._last)

    def total(self) -> tuple[float, dict[str, float]]:
        """Seconds since `begin`, and idle shares of them."""
        now = self._now()
        return now.seconds - self._start.seconds, _idle(self._start, now)

    def _now(self) -> "_Clocks":
        busy = self._environment.stats["busy_s"]
        with self._lock:
            now = time.monotonic()
            jax_s = self._jax_s + (now - self._entered if self._inside else 0.0)
        return _Clocks(now, sum(busy) / len(busy), jax_s)


class _Clocks(NamedTuple):
    seconds: float
    bridge_busy: float
    jax_busy: float


def _idle(start: _Clocks, end: _Clocks) -> dict[str, float]:
    wall = max(end.seconds - start.seconds, 1e-9)
    return {
        "bridge_idle": 1.0 - (end.bridge_busy - start.bridge_busy) / wall,
        "jax_idle": 1.0 - (end.jax_busy - start.jax_busy) / wall,
    }
