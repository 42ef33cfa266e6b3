"""Keeps a worker in each seat: starts them, waits for them, and closes seats where none lives.

A *seat* is the place of one worker, whoever sits there. A worker that dies, hangs or answers
nonsense is replaced after a pause that doubles as long as no result comes. A seat whose workers
end more than `max_restarts` times in a row, without a result or a batch that explains it, is
closed; the last one is not closed, but ends the call.

| what it waits for        | how long                                                           |
|--------------------------|--------------------------------------------------------------------|
| a worker to be ready     | `startup_s`, once it has a place                                   |
| a place for a worker     | for ever while others have one, else `startup_s`                   |
| the reply to a request   | `deadline_s`, from when the worker was done with the one before it |
| the next worker's start  | `backoff_s`, doubled with each end in a row, at most 5 s           |
"""

import logging
import math
from collections import deque
from dataclasses import dataclass, field

from qwen_bridge.engine import Engine, Worker
from qwen_bridge.errors import WorkerError
from qwen_bridge.jobs import Job
from qwen_bridge.messages import Settings

EXIT_GRACE_S = 2.0

_LONGEST_BACKOFF_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Seat:
    """The place of one worker.

    Attributes:
      index: which.
      worker: who sits there; None while it waits for `restart_at`.
      restart_at: when the next one may be started (monotonic seconds).
      deaths: workers that ended here since the last result or conviction.
      proven: whether the worker, or the last one, has given a result.
      closed: whether no further one is started.
      queue: the batches that wait for it; see `queues`.
    """

    index: int
    worker: Worker | None = None
    restart_at: float = 0.0
    deaths: int = 0
    proven: bool = False
    closed: bool = False
    queue: deque[Job] = field(default_factory=deque)


class Supervisor:
    """A seat for each place of the engine.

    Attributes:
      seats: all of them, by index; there may be more later.
      hello: what all workers say they are, but for the device of each; None before the first did.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        stats: dict,
        *,
        deadline_s: float,
        startup_s: float,
        max_restarts: int,
        backoff_s: float,
    ):
        """Args as for `Environment`; `stats` are its counters, some of which are kept here."""
        self.seats: list[Seat] = []
        self.hello: dict | None = None
        self._settings = settings
        self._engine = engine
        self._stats = stats
        self._deadline_s = deadline_s
        self._startup_s = startup_s
        self._max_restarts = max_restarts
        self._backoff_s = backoff_s
        self._placed_at = engine.now()

    # Seats -----------------------------------------------------------------------------------

    def add_seats(self) -> None:
        """One for each place that the engine has by now; their first workers are due at once."""
        while len(self.seats) < self._engine.places():
            self.seats.append(Seat(len(self.seats)))
            self._stats["busy_s"].append(0.0)

    def open(self) -> list[Seat]:
        """Seats that are not closed."""
        return [seat for seat in self.seats if not seat.closed]

    def usable(self) -> list[Seat]:
        """Open seats, without those whose worker waits for a place, perhaps for ever."""
        return [seat for seat in self.open() if seat.worker is None or seat.worker.placed]

    # Starting --------------------------------------------------------------------------------

    def start_all(self) -> None:
        """Starts the first workers; a failure is final."""
        self.add_seats()
        for seat in self.seats:
            self._start(seat)

    @property
    def all_ready(self) -> bool:
        """Whether work can begin; where workers come and go, the first that is ready is enough."""
        enough = any if self._engine.elastic else all
        return enough(seat.worker and seat.worker.hello for seat in self.open())

    def start_due(self) -> None:
        """Starts those whose time has come."""
        self.add_seats()
        now = self._engine.now()
        for seat in self.seats:
            if seat.closed or seat.worker or now < seat.restart_at:
                continue
            try:
                self._start(seat)
            except OSError as error:  # No process, memory or descriptor to be had just now.
                why = f"could not be started: {error}"
                _log.warning("worker %d %s", seat.index, why)
                self.plan_restart(seat, why)

    def _start(self, seat: Seat) -> None:
        seat.worker = self._engine.start(seat.index, self._settings)
        seat.proven = False

    def greet(self, seat: Seat, hello: dict) -> str | None:
        """Takes a worker in, or returns why it is refused: it is not like the others.

        Only where it computes may differ.
        """
        told = {name: value for name, value in hello.items() if name != "device"}
        if self.hello is None:
            self.hello = told
        for name in sorted(self.hello.keys() | told.keys()):
            ours, theirs = self.hello.get(name), told.get(name)
            if ours == theirs:
                continue
            why = (
                f"workers disagree: {name} was {ours!r} and is now {theirs!r}{seat.worker.where}; "
                "do not change model, data or code under a running job"
            )
            if self.tolerant:
                return f"is refused ({why})"
            seat.worker.put_away(0.0)
            seat.worker = None
            raise WorkerError(why)
        seat.worker.hello = hello
        return None

    @property
    def tolerant(self) -> bool:
        """Whether a worker that cannot be used is refused without ending a job that others do."""
        return self._engine.elastic and self._stats["requests"] > 0

    # Waiting ---------------------------------------------------------------------------------

    def wait_for_places(self) -> None:
        """From now on, time counts in which no worker has a place."""
        self._placed_at = self._engine.now()

    def check_placed(self) -> None:
        """A worker without a place may wait for ever, but not where no other one works."""
        now = self._engine.now()
        if self.usable():
            self._placed_at = now
        elif now > self._placed_at + self._startup_s:
            raise WorkerError(
                f"no worker found a place within {self._startup_s:g} s; {self._engine.describe()}"
            )

    def patience(self, *, restarting: bool = True) -> float:
        """Seconds until something must have happened; a start, only if it is `restarting`."""
        now = self._engine.now()
        due = [self._engine.look_at()]
        for seat in self.seats:
            if seat.worker is None:
                if restarting and not seat.closed:
                    due.append(seat.restart_at)
            elif not seat.worker.placed:
                due.append(self._placed_at + self._startup_s)
            elif seat.worker.hello is None or seat.worker.in_flight:
                due.append(seat.worker.since + self._allowed_s(seat.worker))
        if min(due) == math.inf:
            raise RuntimeError("the bridge waits, but no worker has anything to do: a bug")
        return max(0.0, min(due) - now)

    def overdue(self, seat: Seat, now: float) -> str | None:
        """What the seat's worker has not done in time, if it had something to do."""
        worker = seat.worker
        if worker is None or not worker.placed or (worker.hello and not worker.in_flight):
            return None
        allowed = self._allowed_s(worker)
        if now <= worker.since + allowed:
            return None
        return f"did not {'answer' if worker.hello else 'start'} within {allowed:g} s"

    def _allowed_s(self, worker: Worker) -> float:
        return self._startup_s if worker.hello is None else self._deadline_s

    # Ending ----------------------------------------------------------------------------------

    def put_away(self, seat: Seat, why: str, grace_s: float, detail: str) -> str:
        """Empties a seat; returns why, in more words where the worker died.

        Raises:
          WorkerError: no worker of this environment was ready, or this one was not and none has
            been given any work: the first failure is final.
        """
        ready = seat.worker.hello is not None
        ended = seat.worker.put_away(grace_s)
        seat.worker = None
        if why == "died":
            why = f"died ({ended})"
        if self.hello is None or (not ready and not self._stats["requests"]):
            error = WorkerError(f"worker {seat.index} {why}")
            if detail:
                error.add_note(f"In worker {seat.index}:\n{detail}")
            raise error
        return why

    def plan_restart(self, seat: Seat, why: str, *, explained: bool = False) -> None:
        """When the next worker may sit here, if any: an end that a batch explains is no sign."""
        seat.deaths = 0 if explained else seat.deaths + 1
        backoff = self._backoff_s * 2 ** min(max(seat.deaths - 1, 0), 16)
        seat.restart_at = self._engine.now() + min(backoff, _LONGEST_BACKOFF_S)
        if seat.deaths <= self._max_restarts:
            self._stats["restarts"] += 1
            return
        why = f"{seat.deaths} workers in a row ended without one result; the last one {why}"
        if len(self.open()) == 1:
            raise WorkerError(why)
        seat.closed = True
        self._stats["workers_closed"] += 1
        _log.warning("place %d of a worker is closed, the others go on: %s", seat.index, why)


def close_seats(seats: list[Seat], engine: Engine) -> None:
    """Ends the workers in these seats, all at once, waits until they are gone; then the engine."""
    workers = [seat.worker for seat in seats if seat.worker]
    for worker in workers:
        worker.ask_to_leave()
    deadline = engine.now() + EXIT_GRACE_S
    for worker in workers:
        worker.put_away(max(0.0, deadline - engine.now()))
    for seat in seats:
        seat.worker = None
    engine.close()
