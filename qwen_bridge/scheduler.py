"""Keeps the workers busy: hands out the batches of a call and takes in what comes back.

    Scheduler -- sends, receives; the order of things within a call
      supervision.Supervisor -- who sits where: starts, deadlines, back-off, closed places
      queues.Queues -- which batch goes to whom
      judgement.Judge -- what becomes of a batch that gave no result, and who is to blame

A worker has several batches in flight, each in a slot of its memory, and answers them in order;
so what it dies of is the first of them. A worker that ends is replaced, the first batch goes to
the judge, and the others are sent again.
"""

import logging
import math
from collections.abc import Iterator

import numpy as np

from qwen_bridge.batching import Batch
from qwen_bridge.channel import DeadlineExceeded, PeerGone
from qwen_bridge.engine import Engine, Worker
from qwen_bridge.errors import InputError
from qwen_bridge.interrupts import Interrupts
from qwen_bridge.jobs import Call, Job
from qwen_bridge.judgement import Judge
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
    join_result,
    read_arrays,
    request_arrays,
    result_arrays,
    write_arrays,
)
from qwen_bridge.queues import Queues
from qwen_bridge.supervision import EXIT_GRACE_S, Seat, Supervisor, close_seats

_log = logging.getLogger(__name__)


class Scheduler:
    """Seats for as many workers as the engine has places, and the call that they work on.

    Its methods are for the inside of `interrupts.held()`: they let Ctrl-C through only while
    they wait.

    Attributes:
      seats: of the workers; see `Supervisor`.
      stats: counters; see `Environment.stats`.
    """

    def __init__(self, settings: Settings, engine: Engine, interrupts: Interrupts, **limits):
        """Starts nothing yet; `limits` are those of `Supervisor`."""
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
        self._engine = engine
        self._interrupts = interrupts
        self._supervisor = Supervisor(settings, engine, self.stats, **limits)
        self.seats = self._supervisor.seats
        self._queues = Queues(self._supervisor)
        self._judge = Judge(self._queues, self._supervisor, self.stats)
        self._said: set[str] = set()
        self._call: Call | None = None
        self._finishing = False
        self._stopped: KeyboardInterrupt | None = None
        self._in_hand: list[Job] = []

    @property
    def hello(self) -> dict | None:
        """What all workers say they are."""
        return self._supervisor.hello

    def start(self) -> None:
        """Starts all workers and waits until they are ready; the first failure is final.

        Where workers come and go, the first one that is ready is enough.
        """
        with self._interrupts.allowed():
            self._engine.open()
        self._supervisor.start_all()
        while not self._supervisor.all_ready:
            self._supervisor.start_due()
            self._collect(self._patience())

    def run(
        self, call: Call, batches: list[Batch], *, finishing: bool = False
    ) -> Iterator[tuple[np.ndarray, object]]:
        """Does a call; yields (rows, result) as batches land, in whatever order they do.

        Results are the caller's own copies. Closing the generator drops what is still open: its
        replies are read and forgotten. Where it is `finishing`, the first Ctrl-C lets the batches
        that workers are at land before it is raised, and the second is raised at once.
        """
        self._supervisor.add_seats()
        self._supervisor.wait_for_places()
        call.unsettled = sum(len(batch.rows) for batch in batches)
        self._queues.fill(call, batches)
        self._call, self._finishing = call, finishing
        try:
            self._collect(0.0)  # Deaths and replies since the last call.
            while call.unsettled or call.landed:
                if call.unsettled and not self._stopped:
                    self._supervisor.start_due()
                    self._dispatch()
                if call.landed:
                    yield call.landed.popleft()
                if self._stopped and not call.landed and not self._at_work():
                    raise self._stopped
                self._raise_error()  # A worker may have ended on what it was to be sent.
                if call.unsettled:
                    self._collect(0.0 if call.landed else self._patience())
        finally:
            self._call = self._stopped = None
            self._finishing = False
            self._queues.clear()

    # Towards the workers ---------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Hands out batches, to the seat with the least to do first.

        Towards the end of a call a seat holds no more than its share, so that none sits idle
        while another has batches waiting.
        """
        while True:
            ready = [seat for seat in self.seats if seat.worker and seat.worker.hello]
            waiting = len(self._queues)
            if not ready or not waiting:
                return
            open_jobs = waiting + sum(len(seat.worker.in_flight) for seat in ready)
            depth = math.ceil(open_jobs / len(ready))
            for seat in sorted(ready, key=lambda seat: len(seat.worker.in_flight)):
                if len(seat.worker.in_flight) >= depth or not seat.worker.slots.num_free:
                    return
                if job := self._queues.next_for(seat):
                    self._send(seat, job)
                    break
            else:
                return

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
        return self._supervisor.patience(restarting=not self._stopped)

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
        self._supervisor.check_placed()
        now = self._engine.now()
        for seat in sitting:
            if late := self._supervisor.overdue(seat, now):
                seat.worker.dump_stack()
                self._replace(seat, late, grace_s=0.0)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._call is not None and self._call.error is not None:
            raise self._call.error

    def _stop(self, interrupt: KeyboardInterrupt) -> None:
        """Ctrl-C: no further batch goes out, and those that workers are at may land."""
        self._stopped = interrupt
        working = [seat.worker for seat in self.seats if seat.worker and seat.worker.in_flight]
        heads = [worker.in_flight[0][0] for worker in working]
        self._in_hand = [job for job in heads if self._is_open(job)]
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
            if refused := self._supervisor.greet(seat, message.hello):
                self._replace(seat, refused, grace_s=0.0)
        elif isinstance(message, Failure) and worker.hello is None:
            self._could_not_start(seat, message)
        elif isinstance(message, Result) and worker.hello:
            self._take_result(seat, message)
        elif isinstance(message, Failure):
            self._take_failure(seat, message)
        else:
            raise ProtocolError(f"an unexpected {message.tag}")

    def _could_not_start(self, seat: Seat, failure: Failure) -> None:
        if failure.type == "InputError" and not self._supervisor.tolerant:
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
        seat.deaths, seat.proven = 0, True
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
        if worker.in_flight[0][0].control:
            self._replace(seat, f"failed where another did not ({failure.message})", grace_s=0.0)
            return
        job = self._close_head(worker)
        if job.call is self._call:
            self._judge.failed(job, seat, failure)

    def _close_head(self, worker: Worker) -> Job:
        """The worker is done with its first request; the clock of the next one starts."""
        job, slot = worker.in_flight.popleft()
        worker.slots.land(slot)
        worker.slots.free(slot)
        worker.since = self._engine.now()
        return job

    def _is_open(self, job: Job) -> bool:
        """Whether anyone waits for its result."""
        return job.call is self._call and not job.control

    def _land(self, job: Job, result) -> None:
        self._judge.acquit(job.call)
        if job.control:
            return
        verb, rows = job.call.verb, job.rows
        names = {"score": "prompts_scored", "answer": "prompts_answered", "embed": "ids_embedded"}
        self.stats[names[verb]] += len(rows)
        job.call.unsettled -= len(rows)
        job.call.control = rows[:1]
        job.call.landed.append((rows, result))

    def _replace(
        self, seat: Seat, why: str, *, grace_s: float = EXIT_GRACE_S, detail: str = ""
    ) -> None:
        """Puts a worker away, saves what it had in flight, and plans for the next one."""
        worker = seat.worker
        why = self._supervisor.put_away(seat, why, grace_s, detail)
        jobs = [job for job, _ in worker.in_flight if self._is_open(job)]
        suspect = jobs.pop(0) if jobs and jobs[0] is worker.in_flight[0][0] else None
        _log.warning(
            "worker %d %s with %d prompts in hand; restarting it",
            seat.index,
            why,
            sum(len(job.rows) for job in jobs) + (len(suspect.rows) if suspect else 0),
        )
        for job in reversed(jobs):
            self._queues.put_first(job)
        explained = suspect is not None and self._judge.suspect(suspect, seat, why)
        self._supervisor.plan_restart(seat, why, explained=explained)

    # Goodbye ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all workers and lets go of the engine; idempotent."""
        close_seats(self.seats, self._engine)
