"""What the driver asks for in one call, and the batches that it is cut into."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

# Workers that a batch may end before it is convicted.
KILLS = 3
# Times that a prompt is tried for which the scorer raises an exception; memory may just have been
# full.
TRIES = 3


@dataclass(eq=False)
class Call:
    """One call of the driver: its prompts, and what has become of them.

    Attributes:
      verb: "embed", "score" or "answer".
      kind: for embed, "bank" or "query".
      arrays: what the request consists of, by name, one row a prompt.
      shots: columns of the pointers; 0 for embed.
      unsettled: rows neither answered nor given up.
      landed: (rows, result) that the driver may have.
      given_up: the same of prompts given up, until they are believed; see `judgement`.
      control: one row whose result has landed; None before there is one.
      error: what the call is to end with.
    """

    verb: str
    kind: str
    arrays: dict[str, np.ndarray]
    shots: int
    unsettled: int = 0
    landed: deque[tuple[np.ndarray, object]] = field(default_factory=deque)
    given_up: list[tuple[np.ndarray, object]] = field(default_factory=list)
    control: np.ndarray | None = None
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Ends the call with `error`, the first one counts, once all replies are taken in."""
        self.error = self.error or error


@dataclass(eq=False)
class Job:
    """A batch on its way: which rows of which call, and what it has been through.

    Attributes:
      number: its own in all calls of a scheduler.
      call: to which it belongs.
      rows: of the call's arrays.
      home: index of the seat in whose queue it waits.
      chances: workers that it may still end before it is convicted.
      failed_in: indices of the seats where it, or what it was cut from, ended a worker or met an
        exception, in order.
      tries: times that the scorer raised an exception.
      control: whether it is there to try the worker, and its result is known.
    """

    number: int
    call: Call
    rows: np.ndarray
    home: int
    chances: int = field(default_factory=lambda: KILLS)
    failed_in: tuple[int, ...] = ()
    tries: int = 0
    control: bool = False

    @property
    def on_trial(self) -> bool:
        """Whether it is convicted with the next worker that it ends, or the next exception."""
        return self.chances <= 1 or self.tries >= TRIES - 1
