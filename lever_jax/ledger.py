"""The ledger of jobs: what is to be scored, who has it in hand, and how often that went wrong.

A job is a run of up to `JOB_PROMPTS` prompts of one call, named by the hash of its verb and its
prompts, so that ten million prompts are forty thousand small rows. It is marked done in the very
transaction that stores the last of its records. The ledger lives in the store's file, whose one
writer is its one owner: leases that are found when it is opened are of a process that is gone.

| state    | what it means                                                      | prompts |
|----------|--------------------------------------------------------------------|---------|
| `todo`   | asked for, in nobody's hand                                         | kept    |
| `leased` | handed to the environment by `owner`                                | kept    |
| `done`   | all its records are stored                                          | dropped |
| `failed` | one prompt that was given up; its record says `eval_failed`         | kept    |

An attempt is a lease that ended badly: the process died, or an exception came through that nobody
asked for. Ctrl-C and bad input give the lease back and count nothing. Jobs of one call are leased
together. One with `KILLS` attempts is leased alone, after all others; if that too ends badly, it
is cut into its prompts, each leased alone, the least suspected first; and a prompt that ends badly
alone `ALONE` times is given up with the reason. Where another prompt ended badly alone m times and
was then scored all the same, something else kills, and it takes `ALONE` times 1 + m. So a prompt
that kills the driver is found, and a hand that kills it at random, however often, blames none.
"""

import contextlib
import dataclasses
import hashlib
import os
import socket
from collections.abc import Iterator, Sequence

import numpy as np

from lever_jax import store_schema as schema
from lever_jax.errors import InputError
from lever_jax.store import ScoreRecord, Store, StoreError

JOB_PROMPTS = 256
KILLS = 3
ALONE = 5
STATES = ("todo", "leased", "done", "failed")
RETRY = "retry_"

# Ends of a lease that somebody asked for; they say nothing about its prompts.
_ASKED_FOR = (KeyboardInterrupt, SystemExit, GeneratorExit, InputError)
_REASON_CHARS = 300


@dataclasses.dataclass(eq=False)
class Job:
    """Some prompts of one verb.

    Attributes:
      verb: "score" or "answer", with "retry_" before it for failures that are asked for again.
      prompts: int64 [n, 1 + S], query id and pointer, right-padded with -1.
      attempts: leases that ended badly, those of the job it was cut from included.
      reason: how the last of them ended.
    """

    verb: str
    prompts: np.ndarray
    attempts: int = 0
    reason: str | None = None

    @property
    def key(self) -> bytes:
        """What names the job: 16 bytes of BLAKE2b over verb and prompts."""
        text = f"{self.verb} {self.prompts.shape[1]} ".encode()
        content = np.ascontiguousarray(self.prompts, "<i8").tobytes()
        return hashlib.blake2b(text + content, digest_size=16).digest()


class Lease:
    """Jobs in hand, from the beginning to the end of a `with` statement.

    Attributes:
      rows: int [n] which prompts of the call are in them.
      given_up: why they are to be stored as failures and not to be asked for; None by default.
    """

    def __init__(self, ledger: "Ledger", jobs: list[Job], members: list[np.ndarray]):
        self.rows = np.concatenate(members)
        self._ledger, self._jobs = ledger, jobs
        self._open = np.array([len(rows) for rows in members])
        self._job_of = np.repeat(np.arange(len(jobs)), self._open)
        self._landed = np.zeros(len(self.rows), bool)
        self.given_up = None
        if len(jobs) == 1 and ledger.is_hopeless(jobs[0]):
            self.given_up = f"given up after {jobs[0].attempts} attempts; {jobs[0].reason}"

    @contextlib.contextmanager
    def landing(self, rows: np.ndarray) -> Iterator[None]:
        """A transaction for the records of some prompts, and for the jobs that end with them.

        Args:
          rows: int [m] positions in `rows`.
        """
        jobs, counts = np.unique(self._job_of[rows], return_counts=True)
        left = self._open[jobs] - counts
        with self._ledger.transaction():
            yield
            ended = [self._jobs[job] for job in jobs[left == 0]]
            self._ledger.write(ended, "failed" if self.given_up else "done")
        self._open[jobs] = left
        self._landed[rows] = True

    def __enter__(self) -> "Lease":
        self._ledger.write(self._jobs, "leased")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        left = {
            job: ~self._landed[self._job_of == i]
            for i, job in enumerate(self._jobs)
            if self._open[i]
        }
        blamed = error is not None and not isinstance(error, self._ledger.blameless)
        reason = f"the last one ended with {kind.__name__}: {error}" if blamed else None
        # Where the disk is full, say, the leases stay, and whoever opens the store takes them back.
        with contextlib.suppress(StoreError):
            self._ledger.give_back(left, reason)


class Ledger:
    """The jobs of a store that is open for writing; see the module's text.

    Args:
      store: whose.
      blameless: exceptions, besides Ctrl-C and `InputError`, that say nothing about the prompts
        in hand.

    Attributes:
      blameless: all of these.
      transaction: of the store.
    """

    def __init__(self, store: Store, blameless: Sequence[type[BaseException]] = ()):
        self.blameless = (*_ASKED_FOR, *blameless)
        self.transaction = store.transaction
        self._store = store
        self._owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._waiting: dict[bytes, Job] = {}
        leased = []
        for job, owner in self._open_jobs():
            self._waiting[job.key] = job
            if owner is not None:
                leased.append((job, f"the last one ended with {owner}"))
        with self.transaction():
            for job, reason in leased:
                self.give_back({job: self._unknown(job)}, reason)

    def leases(self, verb: str, query_ids: np.ndarray, pointers: np.ndarray) -> Iterator[Lease]:
        """Leases that hold each of n distinct prompts once; to be entered one after another.

        Args:
          verb: as `Job.verb`.
          query_ids: int64 [n].
          pointers: int64 [n, S], right-padded with -1.
        """
        prompts = np.column_stack([query_ids, pointers]).astype(np.int64, copy=False)
        together, alone = [], []
        with self.transaction():
            for rows, before in self._by_waiting_job(verb, prompts):
                attempts = before.attempts if before else 0
                if attempts < KILLS:
                    cut, size = together, JOB_PROMPTS
                elif attempts == KILLS or len(before.prompts) == 1:
                    cut, size = alone, len(rows)
                else:
                    cut, size, attempts = alone, 1, KILLS
                for start in range(0, len(rows), size):
                    part = rows[start : start + size]
                    reason = before.reason if before else None
                    cut.append((Job(verb, prompts[part], attempts, reason), part))
            alone.sort(key=lambda pair: pair[0].attempts)
            self.write([job for job, _ in alone], "todo")
        if together:
            yield Lease(self, *map(list, zip(*together, strict=True)))
        for job, rows in alone:
            yield Lease(self, [job], [rows])

    def write(self, jobs: list[Job], state: str) -> None:
        """Writes jobs in a state, in one transaction, in the place of what was there of them."""
        owner = self._owner if state == "leased" else None
        rows = []
        for job in jobs:
            prompts = None if state == "done" else schema.pack_array(_narrow(job.prompts))
            size = len(job.prompts)
            rows.append((job.key, job.verb, state, job.attempts, size, owner, prompts, job.reason))
        with self.transaction():
            self._store.write_rows("jobs", rows)
        for job in jobs:
            if state == "todo":
                self._waiting[job.key] = job
            else:
                self._waiting.pop(job.key, None)

    def is_hopeless(self, job: Job) -> bool:
        """Whether it is one prompt that has ended badly alone often enough."""
        deaths = job.attempts - KILLS
        if len(job.prompts) > 1 or deaths < ALONE:
            return False
        survivors = self._store.read_rows("jobs", "WHERE state = 'done' AND size = 1")
        survived = max((attempts - KILLS for _, _, _, attempts, *_ in survivors), default=0)
        return deaths >= ALONE * (1 + max(survived, 0))

    def give_back(self, jobs: dict[Job, np.ndarray], reason: str | None) -> None:
        """Ends leases without their end; with a reason this counts as an attempt of the jobs.

        Args:
          jobs: with bool [n], which prompts of each have not landed.
          reason: None if the jobs are not to blame.
        """
        with self.transaction():
            for job, open_ in jobs.items():
                attempts = job.attempts + (reason is not None)
                why = job.reason if reason is None else reason[:_REASON_CHARS]
                self._forget(job)
                self._keep(Job(job.verb, job.prompts[open_], attempts, why))

    def _by_waiting_job(
        self, verb: str, prompts: np.ndarray
    ) -> list[tuple[np.ndarray, Job | None]]:
        """Rows of `prompts` by the job that they wait in, None for none; takes them out of it."""
        places: dict[tuple, Job] = {}
        for job in self._waiting.values():
            if job.verb == verb:
                places.update(dict.fromkeys(map(_name, job.prompts), job))
        if not places:
            return [(np.arange(len(prompts)), None)]
        names = list(map(_name, prompts))
        rows: dict[Job | None, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(places.get(name), []).append(row)
        asked = set(names)
        for job in filter(None, rows):
            rest = [name not in asked for name in map(_name, job.prompts)]
            self._forget(job)
            self._keep(dataclasses.replace(job, prompts=job.prompts[np.array(rest, bool)]))
        return [(np.array(found), job) for job, found in rows.items()]

    def _keep(self, job: Job) -> None:
        if len(job.prompts):
            self.write([job], "todo")

    def _forget(self, job: Job) -> None:
        self._store.delete_rows("jobs", "WHERE key = ?", (job.key,))
        self._waiting.pop(job.key, None)

    def _unknown(self, job: Job) -> np.ndarray:
        """Which prompts of a job have no record yet, or that of a failure to be retried: bool [n].

        For a job of a process that is gone. Of a prompt that was retried and has failed again the
        records do not say that it landed: it is taken for open, blamed with the rest, and paid
        for again.
        """
        records = self._store.get_scores(job.prompts[:, 0], job.prompts[:, 1:])
        retried, answer = job.verb.startswith(RETRY), job.verb.endswith("answer")
        return np.array([_is_open(record, retried, answer) for record in records], bool)

    def _open_jobs(self) -> list[tuple[Job, str | None]]:
        jobs = []
        for row in self._store.read_rows("jobs", "WHERE state IN ('todo', 'leased')"):
            _, verb, _, attempts, _, owner, prompts, reason = row
            prompts = schema.unpack_array(prompts).astype(np.int64)
            jobs.append((Job(verb, prompts, attempts, reason), owner))
        return jobs


def count_states(store: Store) -> dict[str, int]:
    """How many jobs of a store are in each state."""
    counts = dict.fromkeys(STATES, 0)
    for _, _, state, *_ in store.read_rows("jobs"):
        counts[state] += 1
    return counts


def _is_open(record: ScoreRecord | None, retried: bool, answer: bool) -> bool:
    """Whether a job still has something to do for the prompt of a record."""
    if record is None:
        return True
    unscored = record.eval_failed is not None and not record.answered
    if not answer:
        return retried and unscored
    return not unscored and (not record.answered or (retried and record.eval_failed is not None))


def _name(prompt: np.ndarray) -> tuple[int, ...]:
    """A prompt however far it is padded."""
    return tuple(i for i in prompt.tolist() if i >= 0)


def _narrow(prompts: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest signed integers that hold them all."""
    largest = int(prompts.max(initial=0))
    return prompts.astype(np.min_scalar_type(-largest - 1))
