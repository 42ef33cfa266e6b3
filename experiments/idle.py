"""How long the two sides of a run, the VLM's workers and JAX, had nothing to do."""

import contextlib
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
        self._environment, self._jax_s = environment, 0.0
        self._start = self._last = None

    @contextlib.contextmanager
    def jax_busy(self) -> Iterator[None]:
        """Counts the time of the block as JAX's; one thread at a time."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._jax_s += time.monotonic() - start

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
        return _Clocks(time.monotonic(), sum(busy) / len(busy), self._jax_s)


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
