"""Workers that compute nothing and answer in simulated time, so that only the driver works.

Time is virtual: a clock that runs with the driver's own work, as measured, and jumps ahead
whenever the driver waits. So 512 workers need neither machines nor threads, and other programs on
this machine do not count as driver's work if that is measured in CPU time.
"""

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar

from qwen_bridge.arena import SlotTable
from qwen_bridge.messages import Hello, Message, Request, Result, Settings, decode, encode
from qwen_bridge.protocol import ScoreBatch, result_arrays, split_result, write_arrays
from qwen_bridge.ray_worker import PrivateMemory


class VirtualEngine:
    """Any number of simulated workers; see `qwen_bridge.engine.Engine`.

    Attributes:
      waited_s: virtual seconds in which the driver had nothing to do.
      sent_at, heard_at: when it sent its first request and took in the last reply.
    """

    elastic = False

    def __init__(
        self,
        workers: int,
        seconds_per_prompt: float,
        answer: Callable[[Request, memoryview], ScoreBatch],
        *,
        message_s: float = 0.0,
        clock: Callable[[], float] = time.thread_time,
    ):
        """Its clock stands at zero.


        Args:
          workers: how many.
          seconds_per_prompt: how long a worker is at a prompt.
          answer: makes the result of a request.
          message_s: driver's time for one request and its reply that is not spent here, in the
            transport.
          clock: how the driver's own work is measured, seconds.
        """
        self.answer, self.seconds_per_prompt = answer, seconds_per_prompt
        self.waited_s, self.sent_at, self.heard_at = 0.0, math.inf, 0.0
        self._workers, self._message_s, self._clock = workers, message_s, clock
        self._began, self._added, self._due, self._count = clock(), 0.0, [], 0

    def open(self) -> None:
        """See `Engine`."""

    def places(self) -> int:
        """See `Engine`."""
        return self._workers

    def look_at(self) -> float:
        """See `Engine`."""
        return math.inf

    def start(self, index: int, settings: Settings) -> "SimulatedWorker":
        """See `Engine`."""
        return SimulatedWorker(self, settings)

    def schedule(self, worker: "SimulatedWorker", due: float) -> None:
        """Something of this worker's will be here at `due`; the transport costs the driver."""
        self._added += self._message_s
        self._count += 1
        heapq.heappush(self._due, (due, self._count, worker))

    def wait(self, workers: Sequence["SimulatedWorker"], timeout_s: float) -> list:
        """See `Engine`."""
        now = self.now()
        until = min(now + timeout_s, self._due[0][0] if self._due else math.inf)
        if until > now:
            self._added += until - now
            self.waited_s += until - now
            now = until
        talking = []
        while self._due and self._due[0][0] <= now:
            talking.append(heapq.heappop(self._due)[2])
        return talking

    def not_driver(self, started: float) -> None:
        """What happened since `started` (by the clock) is a worker's doing, and takes no time."""
        self._added -= self._clock() - started

    def clock(self) -> float:
        """The driver's own work so far, and that of `not_driver`."""
        return self._clock()

    def now(self) -> float:
        """See `Engine`."""
        return self._clock() - self._began + self._added

    def describe(self) -> str:
        """See `Engine`."""
        return f"{self._workers} simulated workers"

    def close(self) -> None:
        """See `Engine`."""


class SimulatedWorker:
    """Answers its requests one after the other, each at its time; see `engine.Worker`."""

    placed, where = True, ""
    hello_fields: ClassVar = {"embedding_dim": 1, "parts": {}, "model": "simulated"}

    def __init__(self, engine: VirtualEngine, settings: Settings):
        """Its hello is there at once."""
        self.in_flight: deque = deque()
        self.hello: dict | None = None
        self.since = engine.now()
        self.slots = SlotTable(settings.slots)
        self.arena = PrivateMemory(settings.slots, settings.slot_bytes)
        self._engine, self._free_at = engine, self.since
        self._replies: deque[tuple[float, bytes]] = deque()
        self._replies.append((self.since, encode(Hello(self.hello_fields))))
        engine.schedule(self, self.since)

    def send(self, message: Request) -> None:
        """As to a process: the frame is made, and read at the other end."""
        self._engine.sent_at = min(self._engine.sent_at, self._engine.now())
        encode(message)
        started = self._engine.clock()
        result = self._engine.answer(message, self.arena.view(message.slot))
        columns, arrays, texts, reasons = split_result(message.verb, result)
        specs = result_arrays(message.verb, message.rows, columns)
        write_arrays(self.arena.view(message.slot), specs, arrays)
        seconds = message.rows * self._engine.seconds_per_prompt
        reply = encode(
            Result(
                message.job,
                message.slot,
                message.rows,
                columns,
                seconds,
                texts,
                [[row, why] for row, why in reasons.items()],
                [],
            )
        )
        self._engine.not_driver(started)
        self._free_at = max(self._engine.now(), self._free_at) + seconds
        self._replies.append((self._free_at, reply))
        self._engine.schedule(self, self._free_at)

    def receive_ready(self) -> list[Message]:
        """Those whose time has come."""
        now, messages = self._engine.now(), []
        while self._replies and self._replies[0][0] <= now:
            messages.append(decode(self._replies.popleft()[1]))
            self._engine.heard_at = now
        return messages

    def dump_stack(self) -> None:
        """It never hangs."""

    def ask_to_leave(self) -> None:
        """It needs no notice."""

    def put_away(self, grace_s: float) -> str:
        """There is nothing to end."""
        return "simulated"
