"""Which batch goes to whom: a queue for each seat, and who may take what from it.

A batch waits in the queue of its home, the seat that its affinity prefers. A seat whose queue is
empty takes from the end of the longest other one. A batch that has ended a worker, or over which
its scorer raised an exception, is under suspicion and goes to another seat, if there is one, and
to no seat that it has been in before it has been in all of them: the machine may be at fault.

A batch on trial goes only to a worker that has shown that it can do something: what else it ends
may be ended by anything. A worker that has yet to show it is first tried on a *control*, one
prompt of the call whose result has landed; it is scored again, and the second result forgotten.
So is a worker in a seat where the one before it ended without a result: a broken machine does not
get batch after batch, and prompts that kill do not close the seat of a sound one. Before the first
result of a call there is no control, and any worker will do.
"""

import itertools
from collections import deque

from qwen_bridge.batching import Batch, home_worker
from qwen_bridge.jobs import Call, Job
from qwen_bridge.supervision import Seat, Supervisor


class Queues:
    """The batches of the current call that wait, each in the queue of a seat."""

    def __init__(self, supervisor: Supervisor):
        """Over the seats of a supervisor, of which there may be more later."""
        self._supervisor = supervisor
        self._numbers = itertools.count()

    def fill(self, call: Call, batches: list[Batch]) -> None:
        """Puts each batch where its affinity has it, in the place of what was there."""
        self.clear()
        seats = self._supervisor.seats
        for batch in batches:
            home = home_worker(batch.key, len(seats))
            seats[home].queue.append(Job(next(self._numbers), call, batch.rows, home))

    def clear(self) -> None:
        """Drops all that waits."""
        for seat in self._supervisor.seats:
            seat.queue.clear()

    def __len__(self) -> int:
        return sum(len(seat.queue) for seat in self._supervisor.seats)

    def next_for(self, seat: Seat) -> Job | None:
        """Takes the first job of the seat's queue, or else the last of the longest, that it may.

        Before them all a control, where the seat's worker is to be tried first.
        """
        if not seat.proven and not seat.worker.in_flight and (job := self._control(seat)):
            return job
        for place, job in enumerate(seat.queue):
            if self._may_have(seat, job):
                del seat.queue[place]
                return job
        queues: list[deque[Job]] = [other.queue for other in self._supervisor.seats]
        for queue in sorted(queues, key=len, reverse=True):
            for place, job in enumerate(reversed(queue), 1):
                if self._may_have(seat, job):
                    del queue[-place]
                    return job
        return None

    def put_first(self, job: Job) -> None:
        """The job is the next one of its home."""
        self._supervisor.seats[job.home].queue.appendleft(job)

    def put_halves(self, job: Job, chances: int) -> None:
        """Cuts a job in two, each with so many chances."""
        middle = len(job.rows) // 2
        for rows in (job.rows[middle:], job.rows[:middle]):
            number = next(self._numbers)
            half = Job(number, job.call, rows, job.home, chances=chances, failed_in=job.failed_in)
            self.put_first(half)

    def send_elsewhere(self, job: Job, seat: Seat) -> None:
        """Notes that it failed in a seat; its new home is after that, or it where there is none."""
        last = seat.index
        job.failed_in += (last,)
        seats = self._supervisor.seats
        after = seats[last + 1 :] + seats[: last + 1]
        fit = (seat.index for seat in after if not seat.closed and self._is_elsewhere(seat, job))
        job.home = next(fit, last)

    def _control(self, seat: Seat) -> Job | None:
        """A job to try the seat's worker on, if there is doubt or one on trial waits for it."""
        queues = [other.queue for other in self._supervisor.seats]
        for job in itertools.chain.from_iterable(queues):
            call = job.call
            if call.control is None:
                return None
            if seat.deaths > 1 or (job.on_trial and self._is_elsewhere(seat, job)):
                return Job(next(self._numbers), call, call.control, seat.index, control=True)
        return None

    def _may_have(self, seat: Seat, job: Job) -> bool:
        proven = seat.proven or job.call.control is None
        return (proven or not job.on_trial) and self._is_elsewhere(seat, job)

    def _is_elsewhere(self, seat: Seat, job: Job) -> bool:
        """Not where it failed, if it was not everywhere yet; never there twice running."""
        if not job.failed_in:
            return True
        usable = {other.index for other in self._supervisor.usable()}
        elsewhere = usable.difference(job.failed_in) or usable.difference(job.failed_in[-1:])
        return seat.index in elsewhere or not elsewhere
