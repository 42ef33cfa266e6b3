"""One worker process as the driver sees it: started, spoken to, watched, put away.

Each has an arena and a socket of its own, which end with it; a restart is a new `WorkerProcess`.
It is started by exec, never by forking a process that has JAX or CUDA in it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from qwen_bridge.arena import Arena, SlotTable
from qwen_bridge.channel import Channel, DeadlineExceeded, PeerGone
from qwen_bridge.messages import Message, Settings, Shutdown, decode, encode

# Control frames are small and the socket's buffer is not: waiting longer means a stuck worker.
_SEND_S = 10.0
_EXIT_TICK_S = 0.002

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


def worker_environment(index: int, workers: int, threads: int) -> dict[str, str]:
    """Environment variables of a worker.

    Args:
      index: which worker, in [0, workers); it reads it as `QWEN_BRIDGE_WORKER`, to choose a GPU.
      workers: how many there are, `QWEN_BRIDGE_WORKERS`.
      threads: CPU threads each; 0 shares the cores evenly, unless the user's environment
        already says how many.
    """
    variables = {**os.environ, **bridge_variables(index, workers)}
    if threads:
        variables.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    else:
        for name in THREAD_VARIABLES:
            variables.setdefault(name, str(max(1, _usable_cores() // workers)))
    return variables


def bridge_variables(index: int, workers: int) -> dict[str, str]:
    """Those of `worker_environment` that do not depend on the machine."""
    variables = {"QWEN_BRIDGE_WORKER": str(index), "QWEN_BRIDGE_WORKERS": str(workers)}
    root = Path(__file__).resolve().parent.parent
    if root.name != "site-packages":  # A source tree, which we may run from any folder.
        paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    variables["PYTHONUNBUFFERED"] = "1"
    variables["TOKENIZERS_PARALLELISM"] = "false"
    # Threads that spin while they wait take the cores from whoever else works on the machine; a
    # worker on two busy cores was ten times slower with them.
    variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return variables


class WorkerProcess:
    """A running worker; see `engine.Worker`.

    Attributes:
      pid: of the process, which also leads a process group of its own.
      arena: its shared memory.
      slots: the states of its slots.
      in_flight: requests it has, in the order in which it must answer: (job, slot).
      hello: what its scorer is; None until it is built.
      since: when it began what it is doing now (monotonic seconds).
    """

    placed = True  # It runs as soon as it is started.
    where = ""

    def __init__(self, settings: Settings, variables: dict[str, str]):
        """Starts the process and sends `settings`; the hello comes later."""
        self.in_flight: deque[tuple[Any, int]] = deque()
        self.hello: dict | None = None
        self.since = time.monotonic()
        self.slots = SlotTable(settings.slots)
        body = encode(settings)
        self.arena = Arena.create(settings.slots, settings.slot_bytes)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.arena.close)
            try:
                self.channel, theirs = Channel.pair()
                on_failure.callback(self.channel.close)
                with contextlib.closing(theirs):
                    self._process = self._start(theirs.fileno(), variables)
            finally:
                self.arena.release_fd()
            on_failure.pop_all()
        self.pid = self._process.pid
        with contextlib.suppress(PeerGone, DeadlineExceeded):  # It shows when we first read.
            self.channel.send(body, _SEND_S)

    def _start(self, socket_fd: int, variables: dict[str, str]) -> subprocess.Popen:
        command = [sys.executable, "-m", "qwen_bridge.server"]
        command += [f"--socket_fd={socket_fd}", f"--arena_fd={self.arena.fd}"]
        return subprocess.Popen(
            command,
            pass_fds=(socket_fd, self.arena.fd),
            stdin=subprocess.DEVNULL,
            stdout=2,  # The driver's standard output is for its results; ours goes to its stderr.
            env=variables,
            process_group=0,  # Ctrl-C in a terminal reaches the driver only.
        )

    def send(self, message: Message) -> None:
        """Sends one message, or raises `PeerGone` or `DeadlineExceeded`."""
        self.channel.send(encode(message), _SEND_S)

    def receive_ready(self) -> list[Message]:
        """All messages that are here; raises `PeerGone` or `ProtocolError`."""
        return [decode(body) for body in self.channel.receive_ready()]

    def dump_stack(self) -> None:
        """Asks a hung worker to print where it hangs, to stderr; works inside C code too."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.1)

    def ask_to_leave(self) -> None:
        """Says goodbye without waiting: an idle worker returns, a busy one stops at once."""
        with contextlib.suppress(PeerGone, DeadlineExceeded):
            self.channel.send(encode(Shutdown()), 0.0)
        self.channel.close()

    def put_away(self, grace_s: float) -> str:
        """Ends the process and everything it started; returns how it ended.

        Args:
          grace_s: how long it may take to leave by itself before it is killed.
        """
        self.channel.close()
        deadline = time.monotonic() + grace_s
        while not self._has_exited() and time.monotonic() < deadline:
            time.sleep(_EXIT_TICK_S)
        # Not yet waited for, so the group's id cannot have gone to somebody else.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self.arena.close()
        return _describe_exit(code)

    def _has_exited(self) -> bool:
        if self._process.returncode is not None:
            return True
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self.pid, options) is not None
        except ChildProcessError:  # Somebody else's wait took it.
            return True


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
