"""Who is to blame when a batch comes to nothing: a prompt, a machine, or a bug in the scorer.

A batch in hand is decided by exactly one of:

| what comes back                      | what happens                                            |
|--------------------------------------|---------------------------------------------------------|
| a result                             | checked, copied out, delivered                          |
| a failure: the user's input is wrong | `InputError` in the driver, the same line               |
| any other failure of the scorer      | halved; a single prompt is tried again, then given up;  |
|                                      | each time elsewhere: the machine may be at fault        |
| a failure that says the GPU is lost  | the worker is replaced, and the batch is a suspect      |
| nothing, or nonsense                 | the worker is replaced, and the batch is a suspect      |

A suspect is sent again, elsewhere (see `queues`). After `jobs.KILLS` such ends it is convicted: it
is halved, and each half again at its next, down to the prompt that does it, which must do it twice
and is then given up with its reason. The end that convicts is that of a worker which has given a
result before, so a place where every worker ends convicts nothing, and counts its own ends until
it is closed. Only before the first result of a call may any end convict; the conviction explains
that end, which then does not count against its seat, if the batch failed in two seats, or if there
is but one.

Where the prompts of more than `IN_VAIN` queries in a row are given up, with no result between
them, no prompt is to blame, and the call fails: `ScorerError` if the scorer raised an exception,
else `WorkerError`. A prompt that ended a worker which had given a result does not count: what is
broken altogether gives none. Prompts are handed out as given up only once a result, or the end of
the call, shows that this is not so; those of a call that fails are open as if they had never been
tried.
"""

import logging

from qwen_bridge.errors import InputError, ScorerError, WorkerError
from qwen_bridge.jobs import TRIES, Call, Job
from qwen_bridge.messages import Failure
from qwen_bridge.protocol import failed_answer, failed_score
from qwen_bridge.queues import Queues
from qwen_bridge.supervision import Seat, Supervisor

# Queries whose prompts may be given up in a row.
IN_VAIN = 4

_log = logging.getLogger(__name__)


class Judge:
    """Decides what becomes of batches that gave no result; remembers what was given up in vain."""

    def __init__(self, queues: Queues, supervisor: Supervisor, stats: dict):
        """Batches go back to `queues`; `stats` are the counters of `Environment`."""
        self._queues = queues
        self._supervisor = supervisor
        self._stats = stats
        self._in_vain: set[int] = set()

    def acquit(self, call: Call) -> None:
        """A result came: what was given up before it was at fault, and nothing else."""
        self._in_vain.clear()
        _believe(call)

    def failed(self, job: Job, seat: Seat, failure: Failure) -> None:
        """The scorer raised an exception over this job, and its worker lives."""
        if failure.type == "InputError":
            job.call.fail(InputError(failure.message))
            return
        why = f"{failure.type}: {failure.message}"
        job.tries += 1
        self._queues.send_elsewhere(job, seat)
        if len(job.rows) > 1:
            _log.warning("%d prompts in one batch failed with %s; halving", len(job.rows), why)
            self._queues.put_halves(job, job.chances)
        elif job.tries < TRIES:
            self._queues.put_first(job)
        else:
            self._give_up(job, why, ScorerError, f"In worker {seat.index}:\n{failure.detail}")

    def suspect(self, job: Job, seat: Seat, why: str) -> bool:
        """A worker ended while it was at this job; returns whether that explains it."""
        job.chances -= 1
        self._queues.send_elsewhere(job, seat)
        if job.chances:
            self._queues.put_first(job)
            return False
        if len(job.rows) > 1:
            # The verdict on a single prompt is final, and so it takes two to reach it.
            self._queues.put_halves(job, 1 if len(job.rows) > 3 else 2)
        else:
            last = f"worker died on this prompt again and again, last: it {why}"
            self._give_up(job, last, WorkerError, in_vain=not seat.proven)
        return len(set(job.failed_in)) > 1 or len(self._supervisor.usable()) == 1

    def _give_up(
        self, job: Job, why: str, kind: type[Exception], detail: str = "", *, in_vain: bool = True
    ) -> None:
        """Settles the one prompt of a job without a result; `kind` of error if it is one of many.

        An exception for want of memory counts like any other: no prompt fits, and so on.
        """
        call = job.call
        if call.verb == "embed":
            id_ = int(call.arrays["ids"][job.rows[0]])
            error = WorkerError(f"{call.kind} id {id_} could not be embedded: {why}")
        else:
            query = int(call.arrays["queries"][job.rows[0]])
            if in_vain:
                self._in_vain.add(query)
            if len(self._in_vain) <= IN_VAIN:
                _log.warning("gave up a prompt (%s query %d): %s", call.verb, query, why)
                self._stats["prompts_given_up"] += 1
                call.unsettled -= 1
                failed = failed_score if call.verb == "score" else failed_answer
                call.given_up.append((job.rows, failed(1, why)))
                if not call.unsettled:
                    _believe(call)
                return
            # Not cleared: until a result lands no prompt is to blame, in a later call neither.
            count = len(self._in_vain)
            error = kind(f"{call.verb} failed for {count} queries in a row, the last with {why}")
        if detail:
            error.add_note(detail)
        call.fail(error)


def _believe(call: Call) -> None:
    """The prompts given up land as such."""
    call.landed += call.given_up
    call.given_up.clear()
