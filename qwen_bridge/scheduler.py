"""Keeps the workers busy and alive: dispatches batches, collects results, replaces the dead.

A batch belongs to a *seat*, the place of one worker, whoever sits there. Each seat has a queue;
a seat whose queue is empty takes from the end of the longest other one. A worker that dies, hangs
or answers nonsense is replaced, and its batches are sent again. The batch it was working on is
under suspicion and goes to another seat, if there is one, and to no seat that it has been in: the
machine may be at fault. After `KILLS` such ends it is convicted: it is halved, and each half again
at its next, down to the prompt that does it, which must do it twice and is then given up with its
reason.

A batch in hand is decided by exactly one of:

| what comes back                      | what happens                                            |
|--------------------------------------|---------------------------------------------------------|
| a result                             | checked, copied out, delivered                          |
| a failure: the user's input is wrong | `InputError` in the driver, the same line               |
| any other failure of the scorer      | halved; a single prompt is tried again, then given up   |
| a failure that says the GPU is lost  | the worker is replaced; see above                       |
| nothing, or nonsense                 | the worker is replaced; see above                       |

Two limits tell a hard prompt from a broken machine and from a bug. A seat whose worker ends more
than `max_restarts` times in a row, without a result or a conviction, is closed, and the call fails
with the last one; a conviction counts if the batch ended workers in two seats, or if there is but
one. And where the prompts of more than `IN_VAIN` queries in a row are given up, with
no result between them, the call fails too: `ScorerError` if the scorer raised an exception, else
`WorkerError`. Prompts are handed out as given up only once a result, or the end of the call, shows
that this is not so; those of a call that fails are open as if they had never been tried.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qwen_bridge.batching import Batch, home_worker
from qwen_bridge.channel import DeadlineExceeded, PeerGone
from qwen_bridge.engine import Engine, Worker
from qwen_bridge.errors import InputError
from qwen_bridge.interrupts import Interrupts
from qwen_bridge.messages import (
    NO_JOB,
    Failure,
    Hello,
    Message,
    Request,
    Result,
    Settings,
    device_is_lost,
)
from qwen_bridge.protocol import (
    ProtocolError,
    check_result,
    failed_answer,
    failed_score,
    join_result,
    read_arrays,
    request_arrays,
    result_arrays,
    write_arrays,
)

# Workers that a batch may end before it is convicted, and times that a prompt is tried for which
# the scorer raises an exception; memory may just have been full.
KILLS = 3
TRIES = 3
# Queries whose prompts may be given up in a row.
IN_VAIN = 4

_LONGEST_BACKOFF_S = 5.0
_EXIT_GRACE_S = 2.0

_log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """The workers cannot be kept running, or one that came back is not the same."""


class ScorerError(RuntimeError):
    """The scorer raises an exception for one query after the other: a bug, not a hard prompt."""


@dataclass(eq=False)
class Call:
    """One call of the driver: its prompts, and the rows still open.

    Attributes:
      verb: "embed", "score" or "answer".
      kind: for embed, "bank" or "query".
      arrays: what the request consists of, by name, one row a prompt.
      shots: columns of the pointers; 0 for embed.
      unsettled: rows neither answered nor given up.
      queues: for each seat, the batches that wait.
    """

    verb: str
    kind: str
    arrays: dict[str, np.ndarray]
    shots: int
    unsettled: int = 0
    queues: list[deque["Job"]] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """A batch on its way: which rows of which call, and what it has been through.

    Attributes:
      number: its own in all calls of a scheduler.
      call: to which it belongs.
      rows: of the call's arrays.
      home: index of the seat in whose queue it waits.
      kills: workers that it ended, or as good as.
      ended_in: indices of the seats where it, or what it was cut from, ended them, in order.
      tries: times that the scorer raised an exception.
    """

    number: int
    call: Call
    rows: np.ndarray
    home: int
    kills: int = 0
    ended_in: tuple[int, ...] = ()
    tries: int = 0


@dataclass(eq=False)
class Seat:
    """The place of one worker.

    Attributes:
      index: which.
      worker: who sits there; None while it waits for `restart_at`.
      restart_at: when the next one may be started (monotonic seconds).
      deaths: workers that ended here since the last result or conviction.
      closed: whether no further one is started.
    """

    index: int
    worker: Worker | None = None
    restart_at: float = 0.0
    deaths: int = 0
    closed: bool = False


class Scheduler:
    """Seats for as many workers as the engine has places, and the call that they work on.

    Its methods are for the inside of `interrupts.held()`: they let Ctrl-C through only while
    they wait.

    Attributes:
      hello: what all workers say they are.
      stats: counters; see `Environment.stats`.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        *,
        deadline_s: float,
        startup_s: float,
        max_restarts: int,
        backoff_s: float,
        interrupts: Interrupts,
    ):
        self.hello: dict | None = None
        self.seats: list[Seat] = []
        self.stats = {
            "requests": 0,
            "prompts_scored": 0,
            "prompts_answered": 0,
            "ids_embedded": 0,
            "prompts_given_up": 0,
            "restarts": 0,
            "workers_closed": 0,
            "busy_s": [],
        }
        self._settings = settings
        self._engine = engine
        self._deadline_s = deadline_s
        self._startup_s = startup_s
        self._max_restarts = max_restarts
        self._backoff_s = backoff_s
        self._interrupts = interrupts
        self._numbers = itertools.count()
        self._error: Exception | None = None
        self._said: set[str] = set()
        self._call: Call | None = None
        self._landed: deque[tuple[np.ndarray, object]] = deque()
        self._given_up: list[tuple[np.ndarray, object]] = []
        self._in_vain: set[int] = set()
        self._finishing = False
        self._stopped: KeyboardInterrupt | None = None
        self._in_hand: list[Job] = []
        self._placed_at = engine.now()

    def start(self) -> None:
        """Starts all workers and waits until they are ready; the first failure is final.

        Where workers come and go, the first one that is ready is enough.
        """
        with self._interrupts.allowed():
            self._engine.open()
        self._add_seats()
        for seat in self.seats:
            seat.worker = self._engine.start(seat.index, self._settings)
        enough = any if self._engine.elastic else all
        while not enough(seat.worker and seat.worker.hello for seat in self._open()):
            self._restart_due()
            self._collect(self._patience())

    def run(
        self, call: Call, batches: list[Batch], *, finishing: bool = False
    ) -> Iterator[tuple[np.ndarray, object]]:
        """Does a call; yields (rows, result) as batches land, in whatever order they do.

        Results are the caller's own copies. Closing the generator drops what is still open: its
        replies are read and forgotten. Where it is `finishing`, the first Ctrl-C lets the batches
        that workers are at land before it is raised, and the second is raised at once.
        """
        self._add_seats()
        self._placed_at = self._engine.now()
        call.queues = [deque() for _ in self.seats]
        call.unsettled = sum(len(batch.rows) for batch in batches)
        for batch in batches:
            home = home_worker(batch.key, len(self.seats))
            call.queues[home].append(Job(next(self._numbers), call, batch.rows, home))
        self._call = call
        self._error, self._finishing = None, finishing
        self._landed.clear()
        self._given_up.clear()
        try:
            self._collect(0.0)  # Deaths and replies since the last call.
            while call.unsettled or self._landed:
                if call.unsettled and not self._stopped:
                    self._restart_due()
                    self._dispatch(call)
                if self._landed:
                    yield self._landed.popleft()
                if self._stopped and not self._landed and not self._at_work():
                    raise self._stopped
                self._raise_error()  # A worker may have ended on what it was to be sent.
                if call.unsettled:
                    self._collect(0.0 if self._landed else self._patience())
        finally:
            self._call = self._stopped = None
            self._finishing = False
            self._landed.clear()
            self._given_up.clear()

    # Towards the workers ---------------------------------------------------------------------

    def _add_seats(self) -> None:
        """One for each place that the engine has by now; their first workers are due at once."""
        while len(self.seats) < self._engine.places():
            self.seats.append(Seat(len(self.seats)))
            self.stats["busy_s"].append(0.0)
            if self._call is not None:
                self._call.queues.append(deque())

    def _restart_due(self) -> None:
        self._add_seats()
        now = self._engine.now()
        for seat in self.seats:
            if seat.closed or seat.worker or now < seat.restart_at:
                continue
            try:
                seat.worker = self._engine.start(seat.index, self._settings)
            except OSError as error:  # No process, memory or descriptor to be had just now.
                why = f"could not be started: {error}"
                _log.warning("worker %d %s", seat.index, why)
                self._plan_restart(seat, why)

    def _dispatch(self, call: Call) -> None:
        """Hands out batches, to the seat with the least to do first.

        Towards the end of a call a seat holds no more than its share, so that none sits idle
        while another has batches waiting.
        """
        while True:
            ready = [seat for seat in self.seats if seat.worker and seat.worker.hello]
            waiting = sum(map(len, call.queues))
            if not ready or not waiting:
                return
            open_jobs = waiting + sum(len(seat.worker.in_flight) for seat in ready)
            depth = math.ceil(open_jobs / len(ready))
            for seat in sorted(ready, key=lambda seat: len(seat.worker.in_flight)):
                if len(seat.worker.in_flight) >= depth or not seat.worker.slots.num_free:
                    return
                if job := self._next_job(call, seat):
                    self._send(seat, job)
                    break
            else:
                return

    def _next_job(self, call: Call, seat: Seat) -> Job | None:
        """Takes the first job of the seat's queue, or else the last of the longest, that it may."""
        own = call.queues[seat.index]
        for place, job in enumerate(own):
            if self._may_have(seat, job):
                del own[place]
                return job
        for queue in sorted(call.queues, key=len, reverse=True):
            for place, job in enumerate(reversed(queue), 1):
                if self._may_have(seat, job):
                    del queue[-place]
                    return job
        return None

    def _may_have(self, seat: Seat, job: Job) -> bool:
        """Not where it ended a worker, if it was not everywhere yet; never there twice running."""
        if not job.ended_in:
            return True
        usable = {other.index for other in self._usable()}
        elsewhere = usable.difference(job.ended_in) or usable.difference(job.ended_in[-1:])
        return seat.index in elsewhere or not elsewhere

    def _open(self) -> list[Seat]:
        return [seat for seat in self.seats if not seat.closed]

    def _usable(self) -> list[Seat]:
        """Open seats, without those whose worker waits for a place, perhaps for ever."""
        return [seat for seat in self._open() if seat.worker is None or seat.worker.placed]

    def _send(self, seat: Seat, job: Job) -> None:
        worker, call = seat.worker, job.call
        slot = worker.slots.take()
        specs = request_arrays(call.verb, len(job.rows), call.shots)
        arrays = {name: array[job.rows] for name, array in call.arrays.items()}
        write_arrays(worker.arena.view(slot), specs, arrays)
        if not worker.in_flight:
            worker.since = self._engine.now()
        worker.in_flight.append((job, slot))
        worker.slots.send(slot)
        request = Request(call.verb, job.number, slot, len(job.rows), call.shots, call.kind)
        self.stats["requests"] += 1
        try:
            worker.send(request)
        except (PeerGone, DeadlineExceeded):
            self._replace(seat, "died")

    # From the workers ------------------------------------------------------------------------

    def _patience(self) -> float:
        """Seconds until something must have happened."""
        now = self._engine.now()
        due = [self._engine.look_at()]
        for seat in self.seats:
            if seat.worker is None:
                if not (seat.closed or self._stopped):
                    due.append(seat.restart_at)
            elif not seat.worker.placed:
                due.append(self._placed_at + self._startup_s)
            elif seat.worker.hello is None or seat.worker.in_flight:
                due.append(seat.worker.since + self._allowed_s(seat.worker))
        if min(due) == math.inf:
            raise RuntimeError("the bridge waits, but no worker has anything to do: a bug")
        return max(0.0, min(due) - now)

    def _allowed_s(self, worker: Worker) -> float:
        return self._startup_s if worker.hello is None else self._deadline_s

    def _collect(self, timeout_s: float) -> None:
        """Takes in all that has come, then replaces workers whose time is over.

        An error that ends the call is raised last: replies read together with it are not lost.
        """
        sitting = [seat for seat in self.seats if seat.worker]
        try:
            with self._interrupts.allowed():
                ready = self._engine.wait([seat.worker for seat in sitting], timeout_s)
        except KeyboardInterrupt as interrupt:
            if self._stopped or not self._finishing:
                raise
            self._stop(interrupt)
            return
        talking = set(map(id, ready))
        for seat in sitting:
            if id(seat.worker) in talking:
                self._read(seat)
        now = self._engine.now()
        self._check_placed(now)
        for seat in sitting:
            worker = seat.worker
            if worker is None or not worker.placed or (worker.hello and not worker.in_flight):
                continue
            allowed = self._allowed_s(worker)
            if now > worker.since + allowed:
                worker.dump_stack()
                doing = "answer" if worker.hello else "start"
                self._replace(seat, f"did not {doing} within {allowed:g} s", grace_s=0.0)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _check_placed(self, now: float) -> None:
        """A worker without a place may wait for ever, but not where no other one works."""
        if self._usable():
            self._placed_at = now
        elif now > self._placed_at + self._startup_s:
            raise WorkerError(
                f"no worker found a place within {self._startup_s:g} s; {self._engine.describe()}"
            )

    def _stop(self, interrupt: KeyboardInterrupt) -> None:
        """Ctrl-C: no further batch goes out, and those that workers are at may land."""
        self._stopped = interrupt
        working = [seat.worker for seat in self.seats if seat.worker and seat.worker.in_flight]
        heads = [worker.in_flight[0][0] for worker in working]
        self._in_hand = [job for job in heads if job.call is self._call]
        prompts = sum(len(job.rows) for job in self._in_hand)
        _log.warning("finishing the %d prompts in hand; Ctrl-C again stops at once", prompts)

    def _at_work(self) -> bool:
        """Whether a worker is still at a batch that was in hand when Ctrl-C came."""
        workers = [seat.worker for seat in self.seats if seat.worker and seat.worker.in_flight]
        return any(worker.in_flight[0][0] in self._in_hand for worker in workers)

    def _read(self, seat: Seat) -> None:
        worker = seat.worker
        try:
            for message in worker.receive_ready():
                self._take(seat, message)
                if seat.worker is not worker:
                    return
        except PeerGone:
            self._replace(seat, "died")
        except ProtocolError as error:
            self._replace(seat, f"answered nonsense ({error})", grace_s=0.0)

    def _take(self, seat: Seat, message: Message) -> None:
        """Acts on one message of a worker; a `ProtocolError` here condemns the worker."""
        worker = seat.worker
        if isinstance(message, Hello) and worker.hello is None:
            self._greet(seat, message.hello)
        elif isinstance(message, Failure) and worker.hello is None:
            self._could_not_start(seat, message)
        elif isinstance(message, Result) and worker.hello:
            self._take_result(seat, message)
        elif isinstance(message, Failure):
            self._take_failure(seat, message)
        else:
            raise ProtocolError(f"an unexpected {message.tag}")

    def _greet(self, seat: Seat, hello: dict) -> None:
        if self.hello is None:
            self.hello = hello
        for name in sorted(self.hello.keys() | hello.keys()):
            ours, theirs = self.hello.get(name), hello.get(name)
            if ours == theirs:
                continue
            why = (
                f"workers disagree: {name} was {ours!r} and is now {theirs!r}{seat.worker.where}; "
                "do not change model, data or code under a running job"
            )
            if self._tolerant:
                self._replace(seat, f"is refused ({why})", grace_s=0.0)
                return
            seat.worker.put_away(0.0)
            seat.worker = None
            raise WorkerError(why)
        seat.worker.hello = hello

    @property
    def _tolerant(self) -> bool:
        """Whether a worker that cannot be used is refused without ending a job that others do."""
        return self._engine.elastic and self.stats["requests"] > 0

    def _could_not_start(self, seat: Seat, failure: Failure) -> None:
        if failure.type == "InputError" and not self._tolerant:
            raise InputError(failure.message + seat.worker.where)
        why = f"could not start: {failure.type}: {failure.message}"
        self._replace(seat, why, detail=failure.detail)

    def _take_result(self, seat: Seat, message: Result) -> None:
        worker = seat.worker
        if not worker.in_flight:
            raise ProtocolError("a result that nobody asked for")
        job, slot = worker.in_flight[0]
        call = job.call
        if (message.job, message.slot, message.rows) != (job.number, slot, len(job.rows)):
            raise ProtocolError(
                f"result of {message.rows} rows for job {message.job} in slot {message.slot}, "
                f"expected {len(job.rows)} rows for job {job.number} in slot {slot}"
            )
        arrays = read_arrays(
            worker.arena.view(slot), result_arrays(call.verb, message.rows, message.columns)
        )
        result = join_result(call.verb, arrays, message.texts, dict(message.reasons))
        result = check_result(call.verb, result, message.rows, self.hello["embedding_dim"])
        self._close_head(worker)
        seat.deaths = 0
        self.stats["busy_s"][seat.index] += message.seconds
        for note in message.notes:
            if note not in self._said:  # Every worker, and each that replaces one, says it anew.
                self._said.add(note)
                _log.warning("%s", note)
        if call is self._call:
            self._land(job, result)

    def _take_failure(self, seat: Seat, failure: Failure) -> None:
        worker = seat.worker
        if failure.job == NO_JOB or failure.type == "ProtocolError":
            raise ProtocolError(failure.message)
        if not worker.in_flight or failure.job != worker.in_flight[0][0].number:
            raise ProtocolError(f"a failure for job {failure.job}, which it was not at")
        if device_is_lost(failure):
            self._replace(seat, f"lost its device ({failure.message})", grace_s=0.0)
            return
        job = self._close_head(worker)
        if job.call is not self._call:
            return
        if failure.type == "InputError":
            self._fail(InputError(failure.message))
            return
        why = f"{failure.type}: {failure.message}"
        job.tries += 1
        if len(job.rows) > 1:
            _log.warning("%d prompts in one batch failed with %s; halving", len(job.rows), why)
            self._halve(job, job.kills)
        elif job.tries < TRIES:
            self._queue_first(job)
        else:
            self._give_up(job, why, ScorerError, f"In worker {seat.index}:\n{failure.detail}")

    def _fail(self, error: Exception) -> None:
        """Ends the call with `error`, the first one counts, once all replies are taken in."""
        self._error = self._error or error

    def _close_head(self, worker: Worker) -> Job:
        """The worker is done with its first request; the clock of the next one starts."""
        job, slot = worker.in_flight.popleft()
        worker.slots.land(slot)
        worker.slots.free(slot)
        worker.since = self._engine.now()
        return job

    # What becomes of a batch -----------------------------------------------------------------

    def _land(self, job: Job, result) -> None:
        verb, rows = job.call.verb, job.rows
        names = {"score": "prompts_scored", "answer": "prompts_answered", "embed": "ids_embedded"}
        self.stats[names[verb]] += len(rows)
        job.call.unsettled -= len(rows)
        self._in_vain.clear()
        self._believe()
        self._landed.append((rows, result))

    def _give_up(self, job: Job, why: str, kind: type[Exception], detail: str = "") -> None:
        """Settles the one prompt of a job without a result; `kind` of error if it is one of many.

        An exception for want of memory counts like any other: no prompt fits, and so on.
        """
        call = job.call
        if call.verb == "embed":
            id_ = int(call.arrays["ids"][job.rows[0]])
            error = WorkerError(f"{call.kind} id {id_} could not be embedded: {why}")
        else:
            self._in_vain.add(self._query(job))
            if len(self._in_vain) <= IN_VAIN:
                _log.warning("gave up a prompt (%s query %d): %s", call.verb, self._query(job), why)
                self.stats["prompts_given_up"] += 1
                call.unsettled -= 1
                failed = failed_score if call.verb == "score" else failed_answer
                self._given_up.append((job.rows, failed(1, why)))
                if not call.unsettled:
                    self._believe()
                return
            # Not cleared: until a result lands no prompt is to blame, in a later call neither.
            count = len(self._in_vain)
            error = kind(f"{call.verb} failed for {count} queries in a row, the last with {why}")
        if detail:
            error.add_note(detail)
        self._fail(error)

    def _believe(self) -> None:
        """The prompts given up were at fault, and nothing else: they land as such."""
        self._landed += self._given_up
        self._given_up.clear()

    def _query(self, job: Job) -> int:
        return int(job.call.arrays["queries"][job.rows[0]])

    def _queue_first(self, job: Job) -> None:
        job.call.queues[job.home].appendleft(job)

    def _halve(self, job: Job, kills: int) -> None:
        """Cuts a job in two, each as if it had ended so many workers."""
        middle = len(job.rows) // 2
        for rows in (job.rows[middle:], job.rows[:middle]):
            number = next(self._numbers)
            half = Job(number, job.call, rows, job.home, kills=kills, ended_in=job.ended_in)
            self._queue_first(half)

    def _suspect(self, job: Job, seat: Seat, why: str) -> bool:
        """A worker ended while it was at this job; returns whether that explains it."""
        job.kills += 1
        job.ended_in += (seat.index,)
        job.home = self._another(seat, job)
        if job.kills < KILLS:
            self._queue_first(job)
            return False
        if len(job.rows) > 1:
            # The verdict on a single prompt is final, and so it takes two to reach it.
            self._halve(job, KILLS - 1 if len(job.rows) > 3 else max(KILLS - 2, 0))
        else:
            last = f"worker died on this prompt again and again, last: it {why}"
            self._give_up(job, last, WorkerError)
        return len(set(job.ended_in)) > 1 or len(self._usable()) == 1

    def _another(self, seat: Seat, job: Job) -> int:
        """The next seat after this one that may have the job; itself where there is no other."""
        after = self.seats[seat.index + 1 :] + self.seats[: seat.index + 1]
        fit = (o.index for o in after if not o.closed and self._may_have(o, job))
        return next(fit, seat.index)

    def _replace(
        self, seat: Seat, why: str, *, grace_s: float = _EXIT_GRACE_S, detail: str = ""
    ) -> None:
        """Puts a worker away, saves what it had in flight, and plans for the next one."""
        worker = seat.worker
        ready = worker.hello is not None
        ended = worker.put_away(grace_s)
        seat.worker = None
        if why == "died":
            why = f"died ({ended})"
        if self.hello is None or (not ready and not self.stats["requests"]):
            error = WorkerError(f"worker {seat.index} {why}")
            if detail:
                error.add_note(f"In worker {seat.index}:\n{detail}")
            raise error
        jobs = [job for job, _ in worker.in_flight if job.call is self._call]
        suspect = jobs.pop(0) if jobs and jobs[0] is worker.in_flight[0][0] else None
        _log.warning(
            "worker %d %s with %d prompts in hand; restarting it",
            seat.index,
            why,
            sum(len(job.rows) for job in jobs) + (len(suspect.rows) if suspect else 0),
        )
        for job in reversed(jobs):
            self._queue_first(job)
        explained = suspect is not None and self._suspect(suspect, seat, why)
        self._plan_restart(seat, why, explained=explained)

    def _plan_restart(self, seat: Seat, why: str, *, explained: bool = False) -> None:
        """When the next worker may sit here, if any: an end that a batch explains is no sign."""
        seat.deaths = 0 if explained else seat.deaths + 1
        backoff = self._backoff_s * 2 ** min(max(seat.deaths - 1, 0), 16)
        seat.restart_at = self._engine.now() + min(backoff, _LONGEST_BACKOFF_S)
        if seat.deaths <= self._max_restarts:
            self.stats["restarts"] += 1
            return
        why = f"{seat.deaths} workers in a row ended without one result; the last one {why}"
        if len(self._open()) == 1:
            raise WorkerError(why)
        seat.closed = True
        self.stats["workers_closed"] += 1
        _log.warning("place %d of a worker is closed, the others go on: %s", seat.index, why)

    # Goodbye ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all workers and lets go of the engine; idempotent."""
        close_seats(self.seats, self._engine)


def close_seats(seats: list[Seat], engine: Engine) -> None:
    """Ends the workers in these seats, all at once, waits until they are gone; then the engine."""
    workers = [seat.worker for seat in seats if seat.worker]
    for worker in workers:
        worker.ask_to_leave()
    deadline = engine.now() + _EXIT_GRACE_S
    for worker in workers:
        worker.put_away(max(0.0, deadline - engine.now()))
    for seat in seats:
        seat.worker = None
    engine.close()
