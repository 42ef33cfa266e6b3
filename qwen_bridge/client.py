"""The driver's only door to the VLM: embed, score and answer, by ids, through workers.

    with Environment({"model": "qwen_bridge/tiny_qwen", ...}, workers=2) as environment:
        embeddings = environment.embed("bank", ids).embeddings
        scores = environment.score(queries, pointers)

Prompts are cut into batches, kept in flight on all workers, and come back in the caller's order.
Workers that die are replaced and their prompts sent again; a prompt that cannot be done comes
back with a reason, never with a zero. A worker in doubt may be tried on a prompt that is done, and
that second result is forgotten. Nothing here imports torch or JAX.
"""

import contextlib
import os
import weakref
from collections.abc import Callable

import numpy as np

from qwen_bridge.batching import (
    Batch,
    assemble_answer,
    assemble_embed,
    assemble_score,
    plan_batches,
)
from qwen_bridge.engine import Engine, LocalEngine
from qwen_bridge.errors import InputError, check_within
from qwen_bridge.interrupts import Interrupts
from qwen_bridge.jobs import Call
from qwen_bridge.messages import MAX_SLOT_BYTES, MAX_SLOTS, MIN_SLOT_BYTES, Settings, decode, encode
from qwen_bridge.protocol import (
    KINDS,
    MAX_ANSWERS,
    AnswerBatch,
    EmbedBatch,
    ProtocolError,
    ScoreBatch,
    check_ids,
    check_prompts,
    rows_that_fit,
)
from qwen_bridge.scheduler import Scheduler
from qwen_bridge.supervision import Seat, close_seats


class Environment:
    """N workers, each with a VLM, behind three functions. For one thread; a context manager.

    Attributes:
      hello: what the workers are: fingerprints of model, prompt template, generation settings,
        dataset and metric as the factory reports them, `embedding_dim`, and `parts`, the column
        range of each part of an embedding.
      stats: counters since the start: `requests`, `prompts_scored`, `prompts_answered`,
        `ids_embedded`, `prompts_given_up`, `restarts`, `workers_closed` (places that no worker
        lives in), and `busy_s`, seconds that each worker spent in the scorer.
    """

    def __init__(
        self,
        settings: dict,
        *,
        workers: int = 1,
        threads: int = 0,
        slots: int = 4,
        deadline_s: float = 600.0,
        factory: str = "qwen_bridge.workers:build",
        engine: Engine | None = None,
        startup_s: float = 1800.0,
        max_restarts: int = 16,
        backoff_s: float = 0.1,
        slot_bytes: int = 4 << 20,
    ):
        """Starts the workers and waits until each has built its scorer.

        Args:
          settings: passed as it is to the factory; what msgpack can carry, with string keys.
          workers: how many processes, in [1, 64].
          threads: CPU threads each; 0 shares the cores evenly.
          slots: batches in flight to one worker, in [1, 64].
          deadline_s: longest time for one batch, after which the worker counts as hung.
          factory: "module:function" that builds the scorer, in the worker.
          engine: where workers live, instead of `workers` processes of `threads` on this machine;
            opened here, and closed with the environment.
          startup_s: longest time to build the scorer.
          max_restarts: workers that may end in a row in one place, without one result between
            them, before the place is closed; with the last place the call fails.
          backoff_s: wait before the first restart; doubles up to 5 s while no result comes.
          slot_bytes: shared memory of a slot; bounds the rows of a batch.

        Raises:
          InputError: an argument or the settings are wrong, with the line the factory wrote.
          WorkerError: a worker could not be started.
        """
        check_within("slots", slots, 1, MAX_SLOTS)
        check_within("slot_bytes", slot_bytes, MIN_SLOT_BYTES, MAX_SLOT_BYTES)
        for name, seconds in (("deadline_s", deadline_s), ("startup_s", startup_s)):
            if not seconds > 0:
                raise InputError(f"{name}={seconds} must be above 0")
        engine = engine or LocalEngine(workers, threads)
        message = Settings(factory, settings, slots, slot_bytes)
        try:
            decode(encode(message))
        except ProtocolError as error:
            raise InputError(f"the settings of the environment: {error}") from None
        self._in_call = False
        self._slot_bytes = slot_bytes
        self._interrupts = Interrupts()
        self._scheduler = Scheduler(
            message,
            engine,
            self._interrupts,
            deadline_s=deadline_s,
            startup_s=startup_s,
            max_restarts=max_restarts,
            backoff_s=backoff_s,
        )
        seats = self._scheduler.seats
        self._finalizer = weakref.finalize(self, _close_in, os.getpid(), seats, engine)
        try:
            with self._interrupts.held():
                self._scheduler.start()
            hello = self._scheduler.hello
            parts = {name: tuple(columns) for name, columns in hello["parts"].items()}
            self.hello = {**hello, "parts": parts}
            self._embedding_dim = hello["embedding_dim"]
            if not rows_that_fit("embed", 0, self._embedding_dim, slot_bytes):
                raise InputError(
                    f"slot_bytes={slot_bytes} cannot hold one embedding of "
                    f"{self._embedding_dim} floats; raise it"
                )
        except BaseException:
            self.close()
            raise

    @property
    def stats(self) -> dict:
        """Counters since the start; a copy."""
        stats = self._scheduler.stats
        return {**stats, "busy_s": list(stats["busy_s"])}

    @property
    def devices(self) -> list[str]:
        """Where each worker that is ready computes, and how, as `cuda:1, bfloat16`."""
        workers = [seat.worker for seat in self._scheduler.seats]
        hellos = [worker.hello for worker in workers if worker and worker.hello]
        return [hello.get("device", "unknown") for hello in hellos]

    def embed(
        self,
        kind: str,
        ids,
        on_batch: Callable[[np.ndarray, EmbedBatch], None] | None = None,
        batch_size: int = 64,
    ) -> EmbedBatch:
        """Embeddings [N, D] of demonstrations ("bank") or queries ("query").

        Args:
          kind: "bank" or "query"; "bank:image" and the like compute the image part or the text
            parts only, and leave the other columns zero.
          ids: [N] ids of the dataset.
          on_batch: as in `score`.
          batch_size: most ids in one request.

        Returns:
          All embeddings, in the caller's order; an image that cannot be read has a reason.
        """
        if kind not in KINDS:
            raise InputError(f"embed: kind {kind!r} is not known; it must be one of {KINDS}")
        ids = check_ids(ids)
        limit = self._limit("embed", 0, self._embedding_dim, batch_size)
        rows = np.arange(len(ids))
        batches = [Batch(rows[i : i + limit], i) for i in range(0, len(ids), limit)]
        pieces = self._run(Call("embed", kind, {"ids": ids}, 0), batches, on_batch)
        return assemble_embed(len(ids), self._embedding_dim, pieces)

    def score(
        self,
        queries,
        pointers,
        on_batch: Callable[[np.ndarray, ScoreBatch], None] | None = None,
        batch_size: int = 64,
        affinity=None,
    ) -> ScoreBatch:
        """How probable the ground truths are after each prompt; nothing is generated.

        Args:
          queries: [n] query ids.
          pointers: [n, S] demonstration ids in prompt order, right-padded with -1.
          on_batch: called with (rows, batch) in this thread as each batch lands, in any order;
            `rows` says where its prompts stand in the caller's arrays. What it raises ends the
            call. It must not call this environment. Given one, the first Ctrl-C is raised only
            once the batches that workers are at have landed, the second at once.
          batch_size: most prompts in one request, fewer where a slot holds fewer.
          affinity: [n] int64 keys, the query ids by default. Prompts of one key travel in one
            batch where they fit, and prefer one worker, the same in every call.

        Returns:
          All scores, in the caller's order.

        Raises:
          InputError: the worker finds the input wrong, say an unknown id.
          ScorerError: the scorer raises exceptions for query after query, without any result.
          WorkerError: workers end one after the other, without any result.
        """
        return self._prompts("score", queries, pointers, on_batch, batch_size, affinity)

    def answer(
        self,
        queries,
        pointers,
        on_batch: Callable[[np.ndarray, AnswerBatch], None] | None = None,
        batch_size: int = 64,
        affinity=None,
    ) -> AnswerBatch:
        """What the VLM generates after each prompt, and how right it is; as `score`."""
        return self._prompts("answer", queries, pointers, on_batch, batch_size, affinity)

    def close(self) -> None:
        """Ends the workers, whatever they are doing; idempotent. Nothing is left behind."""
        with self._interrupts.held():
            self._scheduler.close()
            self._finalizer.detach()

    def __enter__(self) -> "Environment":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _prompts(self, verb: str, queries, pointers, on_batch, batch_size: int, affinity):
        queries, pointers = check_prompts(queries, pointers)
        keys = queries if affinity is None else np.asarray(affinity)
        if keys.shape != queries.shape or keys.dtype.kind not in "iu":
            raise ProtocolError(
                f"affinity is {keys.dtype} of shape {keys.shape}; "
                f"it must hold one integer for each of {len(queries)} prompts"
            )
        shots = pointers.shape[1]
        columns = MAX_ANSWERS if verb == "score" else 0
        limit = self._limit(verb, shots, columns, batch_size)
        batches = plan_batches(queries, keys, limit) if len(queries) else []
        call = Call(verb, "", {"queries": queries, "pointers": pointers}, shots)
        pieces = self._run(call, batches, on_batch)
        assemble = assemble_score if verb == "score" else assemble_answer
        return assemble(len(queries), pieces)

    def _limit(self, verb: str, shots: int, columns: int, batch_size: int) -> int:
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1")
        return max(1, min(batch_size, rows_that_fit(verb, shots, columns, self._slot_bytes)))

    def _run(self, call: Call, batches: list[Batch], on_batch) -> list[tuple]:
        if not self._finalizer.alive:
            raise RuntimeError("the environment is closed")
        if self._in_call:
            raise RuntimeError("on_batch may not call the environment that is calling it")
        self._in_call = True
        pieces = []
        try:
            with (
                self._interrupts.held(),
                contextlib.closing(
                    self._scheduler.run(call, batches, finishing=on_batch is not None)
                ) as landing,
            ):
                for rows, result in landing:
                    pieces.append((rows, result))
                    if on_batch is not None:
                        with self._interrupts.allowed(but_the_first=True):
                            on_batch(rows, result)
        finally:
            self._in_call = False
        return pieces


def _close_in(pid: int, seats: list[Seat], engine: Engine) -> None:
    """Closes at exit, but not in a process that was forked off the driver."""
    if os.getpid() == pid:
        close_seats(seats, engine)
