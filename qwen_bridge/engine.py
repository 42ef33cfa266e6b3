"""Where workers live: what the scheduler asks of a worker, and of whoever starts them.

The scheduler decides what is sent where, what is sent again and what is given up; it is the same
whether workers are processes of this machine or actors of a Ray cluster. What differs stands
behind `Worker` and `Engine`.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from qwen_bridge.arena import SlotTable
from qwen_bridge.channel import wait_readable
from qwen_bridge.errors import check_within
from qwen_bridge.messages import Message, Settings
from qwen_bridge.worker_process import WorkerProcess, worker_environment

MAX_LOCAL_WORKERS = 64


class Slots(Protocol):
    """Memory cut into slots, in which requests are written and results read."""

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot."""


class Worker(Protocol):
    """One worker as the scheduler sees it; it ends with its object, and a new one replaces it.

    Attributes:
      arena: memory of its slots, the driver's side.
      slots: the states of its slots.
      in_flight: requests it has, in the order in which it must answer: (job, slot).
      placed: whether it has a place to run; one that has none waits, without a deadline.
      hello: what its scorer is; None until it is built. The scheduler sets it.
      since: when it began what it is doing now, by the engine's clock.
      where: for messages, " on machine so-and-so"; empty where it goes without saying.
    """

    arena: Slots
    slots: SlotTable
    in_flight: deque[tuple[Any, int]]
    placed: bool
    hello: dict | None
    since: float
    where: str

    def send(self, message: Message) -> None:
        """Sends one message and the slot it names; raises `PeerGone` or `DeadlineExceeded`."""

    def receive_ready(self) -> list[Message]:
        """All messages that are here, results in their slots; `PeerGone` or `ProtocolError`."""

    def dump_stack(self) -> None:
        """Has a hung worker print where it hangs, if it can."""

    def ask_to_leave(self) -> None:
        """Says goodbye without waiting."""

    def put_away(self, grace_s: float) -> str:
        """Ends the worker, at the latest after `grace_s`; returns how it ended."""


class Engine(Protocol):
    """Starts workers, and waits for them.

    Attributes:
      elastic: whether workers come and go while a job runs: the first one that is ready starts
        the job, and a later one that does not fit is refused without ending it.
    """

    elastic: bool

    def open(self) -> None:
        """Connects to wherever workers will live; raises InputError where that cannot be."""

    def places(self) -> int:
        """How many workers there should be now; it may grow, and never shrinks."""

    def look_at(self) -> float:
        """When `places` may next have changed, by `now`; infinity for never."""

    def start(self, index: int, settings: Settings) -> Worker:
        """A new worker for place `index`; raises OSError where none can be had just now."""

    def wait(self, workers: Sequence[Worker], timeout_s: float) -> Sequence[Worker]:
        """Those of the workers that have something to say, as soon as there is one."""

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""

    def describe(self) -> str:
        """What there is for workers to run on, in words."""

    def close(self) -> None:
        """Lets go of everything but the workers, which are gone by then; idempotent."""


class LocalEngine:
    """Processes of this machine, a fixed number."""

    elastic = False

    def __init__(self, workers: int, threads: int):
        """Args as for `Environment`; raises InputError where they are out of range."""
        check_within("workers", workers, 1, MAX_LOCAL_WORKERS)
        check_within("threads", threads, 0, 4096)
        self._workers, self._threads = workers, threads

    def open(self) -> None:
        """See `Engine`."""

    def places(self) -> int:
        """See `Engine`."""
        return self._workers

    def look_at(self) -> float:
        """See `Engine`."""
        return float("inf")

    def start(self, index: int, settings: Settings) -> WorkerProcess:
        """See `Engine`."""
        return WorkerProcess(settings, worker_environment(index, self._workers, self._threads))

    def wait(self, workers: Sequence[WorkerProcess], timeout_s: float) -> list[WorkerProcess]:
        """See `Engine`."""
        readable = wait_readable([worker.channel for worker in workers], timeout_s)
        return [worker for worker in workers if worker.channel.fileno() in readable]

    def now(self) -> float:
        """See `Engine`."""
        return time.monotonic()

    def describe(self) -> str:
        """See `Engine`."""
        return f"{self._workers} processes of this machine"

    def close(self) -> None:
        """See `Engine`."""
