"""A worker as an actor of Ray: the scorer in a process of some machine of a cluster.

What goes to the actor and comes back are two strings of bytes: a message as in `messages.py`,
and the arrays of a slot as they lie in it. Both are checked here as those of a local worker are.
Pixels never travel: each machine reads the images and the checkpoint from its own disks, at the
same path.

Ray itself pickles: it ships the actor's class and these strings between the machines of the
cluster, and whoever can connect to a cluster can run code on it. So all its machines must trust
each other, and its ports belong on a private network. On our own read paths nothing is pickled.

Ray restarts no actor (`max_restarts=0`) and sends no call again (`max_task_retries=0`): a worker
that ended is replaced by the scheduler, like a process, so that the scheduler alone counts
attempts, waits between them and says when it is enough. An actor that Ray restarted would come
back without a scorer and without a hello, behind its back.
"""

import concurrent.futures
import contextlib
import faulthandler
import mmap
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from qwen_bridge.arena import SlotTable
from qwen_bridge.channel import PeerGone
from qwen_bridge.messages import (
    NO_JOB,
    Message,
    Request,
    Result,
    Settings,
    decode,
    encode,
    failure_of,
)
from qwen_bridge.protocol import ProtocolError, extent, request_arrays, result_arrays
from qwen_bridge.server import build_scorer, run_request

_MAX_WHY = 300


class PrivateMemory:
    """Slots in plain memory of this process, which the system backs as they are touched.

    In small pages: a driver of 500 workers would else have 2 MiB for each of their slots, of
    which a batch takes a few KiB.
    """

    def __init__(self, slots: int, slot_bytes: int):
        pages = mmap.mmap(-1, slots * slot_bytes)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        self._view = memoryview(pages)
        self._slots, self._slot_bytes = slots, slot_bytes

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot."""
        if not 0 <= slot < self._slots:
            raise ProtocolError(f"slot {slot} is not in [0, {self._slots})")
        return self._view[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]


class ScorerActor:
    """What lives in the cluster: builds a scorer, then serves one request after the other."""

    def __init__(self, deadline_s: float):
        """`deadline_s`: a request that takes almost so long prints where it hangs, to stderr."""
        os.dup2(2, 1)  # The driver's standard output is for its results; ours goes to its stderr.
        self._deadline_s = deadline_s
        self._scorer: Any = None

    def place(self) -> str:
        """Where this runs; the first call, which comes back once Ray has found a place."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def build(self, body: bytes) -> tuple[bytes, bytes]:
        """The hello of the scorer that these settings name, or a failure."""
        try:
            settings = decode(body)
            self._scorer, hello = build_scorer(settings)
            self._embedding_dim = hello.hello["embedding_dim"]
            self._arena = PrivateMemory(settings.slots, settings.slot_bytes)
            return encode(hello), b""
        except Exception as error:
            return encode(failure_of(error, NO_JOB, traceback.format_exc())), b""

    def serve(self, body: bytes, arrays: bytes) -> tuple[bytes, bytes]:
        """The result of one request and its arrays, or a failure."""
        job = NO_JOB
        try:
            request = decode(body)
            job = request.job
            view = self._arena.view(request.slot)
            view[: len(arrays)] = arrays
            faulthandler.dump_traceback_later(0.95 * self._deadline_s, file=sys.__stderr__)
            try:
                result = run_request(self._scorer, request, self._arena, self._embedding_dim)
            finally:
                faulthandler.cancel_dump_traceback_later()
            specs = result_arrays(request.verb, result.rows, result.columns)
            return encode(result), bytes(view[: extent(specs, len(view))])
        except Exception as error:
            failure = failure_of(error, job, traceback.format_exc())
            if hasattr(self._scorer, "empty_caches"):  # Nothing half done outlives the exception.
                self._scorer.empty_caches()
            return encode(failure), b""


class RayWorker:
    """The driver's end of a `ScorerActor`; see `engine.Worker`.

    Attributes:
      pid: of the actor's process on its machine; None until it is placed.
    """

    def __init__(self, settings: Settings, actor, kill: Callable, news: Callable):
        """Asks for the scorer; the hello comes later.

        Args:
          settings: as for a process.
          actor: handle of a new `ScorerActor`.
          kill: ends an actor at once.
          news: called with this worker, in another thread, when there is something to receive.
        """
        self.in_flight: deque[tuple[Any, int]] = deque()
        self.hello: dict | None = None
        self.placed = False
        self.since = time.monotonic()
        self.where = ""
        self.pid: int | None = None
        self.slots = SlotTable(settings.slots)
        self.arena = PrivateMemory(settings.slots, settings.slot_bytes)
        self._actor, self._kill, self._news = actor, kill, news
        # What was asked of the actor, in order, and for which request.
        self._calls: deque[tuple[concurrent.futures.Future, Request | None]] = deque()
        self._why = "stopped by the driver"
        self._watch(actor.place.remote())
        self._watch(actor.build.remote(encode(settings)))

    def send(self, message: Request) -> None:
        """Sends a request with what is in its slot; an actor that is gone shows when we read."""
        view = self.arena.view(message.slot)
        specs = request_arrays(message.verb, message.rows, message.shots)
        arrays = bytes(view[: extent(specs, len(view))])
        self._watch(self._actor.serve.remote(encode(message), arrays), message)

    def _watch(self, reference, request: Request | None = None) -> None:
        future = reference.future()
        self._calls.append((future, request))
        future.add_done_callback(lambda _: self._news(self))

    def receive_ready(self) -> list[Message]:
        """All messages that are here, in the order of the calls."""
        messages = []
        while self._calls and self._calls[0][0].done():
            call, request = self._calls[0]
            if (error := call.exception()) is not None:
                if messages:  # What it said last still counts; the end shows again next time.
                    self._news(self)
                    return messages
                self._why = _in_short(error)
                raise PeerGone(f"the actor is gone: {self._why}")
            self._calls.popleft()
            reply = call.result()
            if self.placed:
                messages.append(self._unpack(reply, request))
                continue
            self.placed, self.since = True, time.monotonic()
            self.where = f" (on {reply})"
            self.pid = int(reply.rpartition(" ")[2])
        return messages

    def _unpack(self, reply: tuple[bytes, bytes], request: Request | None) -> Message:
        body, arrays = reply
        message = decode(body)
        if isinstance(message, Result):
            if request is None or message.slot != request.slot:
                raise ProtocolError(f"a result in slot {message.slot}, which was not asked for")
            view = self.arena.view(request.slot)
            specs = result_arrays(request.verb, message.rows, message.columns)
            if len(arrays) != extent(specs, len(view)):
                raise ProtocolError(f"{len(arrays)} bytes of arrays for {message.rows} rows")
            view[: len(arrays)] = arrays
        return message

    def dump_stack(self) -> None:
        """It has done so by itself; see `ScorerActor`."""

    def ask_to_leave(self) -> None:
        """Ends the actor's process, whatever it is doing."""
        with contextlib.suppress(Exception):  # Ray may be gone itself.
            self._kill(self._actor)

    def put_away(self, grace_s: float) -> str:
        """Ends the actor; waits at most `grace_s` until the cluster knows."""
        self.ask_to_leave()
        with contextlib.suppress(Exception):
            self._actor.place.remote().future().exception(timeout=grace_s)
        return f"{self._why}{self.where}"


def _in_short(error: BaseException) -> str:
    """One line of what Ray says of an actor's end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("The actor") or "Error:" in line]
    line = (told or lines or [type(error).__name__])[-1]
    return line.partition("Some common causes")[0].strip()[:_MAX_WHY]
