"""Workers on the machines of a Ray cluster: connects, finds places for them, starts actors.

A cluster that the driver starts itself listens on the loopback interface only. To one that is
there already (`ray start` on each machine) it connects. Machines may join and leave at any time:
a worker whose machine leaves is replaced, and where there is no room it waits until there is.
The machine with the cluster's head, and the driver, must stay; if they end, the job does, and the
same command goes on from the store.
"""

import contextlib
import fcntl
import math
import os
import re
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_bridge.channel import poll_in_turns
from qwen_bridge.errors import InputError, check_within
from qwen_bridge.messages import Settings
from qwen_bridge.ray_worker import RayWorker, ScorerActor
from qwen_bridge.worker_process import THREAD_VARIABLES, bridge_variables

MAX_RAY_WORKERS = 1024
_LOOK_S = 2.0
_CONNECT_S = 10.0
_LOCAL_STORE_BYTES = 128 << 20
_LOOPBACK = "127.0.0.1"
_FOLDER = "qwen_bridge-"

# Of the driver's environment, what its workers are to have on other machines too.
_CARRIED = re.compile(r"QWEN_BRIDGE_FACTORIES|LEVER_\w+|HF_HUB_OFFLINE|HF_HOME")


class RayEngine:
    """Actors of a Ray cluster; see `engine.Engine`."""

    elastic = True

    def __init__(
        self,
        *,
        address: str = "auto",
        workers: int | None = None,
        threads: int = 0,
        gpus_per_worker: float | None = None,
        deadline_s: float = 600.0,
    ):
        """Checks the arguments; `open` connects.

        Args:
          address: `auto`, the cluster of this machine or of the variable RAY_ADDRESS; `HOST:PORT`
            of its head; or `local`, a new one of this machine alone.
          workers: how many, at most 1024; those that find no room wait for it. None: as many as
            the cluster has room for, and more when machines join.
          threads: CPU threads of each, which are also the CPUs that it asks for; 0 means 1.
          gpus_per_worker: 0, 1, or the share of one GPU, so that 1/share workers share it. None:
            1 where the cluster has GPUs, else 0.
          deadline_s: as for `Environment`.

        Raises:
          InputError: an argument is out of range.
        """
        if not re.fullmatch(r"auto|local|[^\s:/]+:\d+|\[[0-9a-fA-F:]+\]:\d+", address):
            raise InputError(f"--ray_address={address} is not auto, local or HOST:PORT")
        if workers is not None:
            check_within("workers", workers, 1, MAX_RAY_WORKERS)
        if gpus_per_worker is not None and not (
            gpus_per_worker == 0 or 0.001 <= gpus_per_worker <= 1
        ):
            raise InputError(
                f"--gpus_per_worker={gpus_per_worker:g} must be 0, 1, or a share of one GPU such "
                "as 0.5; a worker uses one GPU"
            )
        self._address, self._workers, self._deadline_s = address, workers, deadline_s
        self._cpus, self._gpus = max(threads, 1), gpus_per_worker
        self._places, self._looked = 0, -math.inf
        self._news: deque[RayWorker] = deque()
        self._bell: int | None = None
        self._ringing = threading.Lock()
        self._ray = None
        self._connected = False
        self._folder: LockedFolder | None = None

    def open(self) -> None:
        """See `Engine`."""
        try:
            import ray
        except ImportError:
            raise InputError(
                "--engine=ray needs Ray: pip install 'lever[ray]', on every machine of the cluster"
            ) from None
        self._ray = ray
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if not ray.is_initialized():  # Else the caller's own, which it will close.
            self._connected = True
            with _keeping_signals():
                (self._start_local if self._address == "local" else self._connect)()
        if self._gpus is None:
            self._gpus = float(any(node.get("GPU", 0) >= 1 for node in self._nodes()))
        self._actor = ray.remote(ScorerActor)

    def _connect(self) -> None:
        try:
            if self._address != "auto":  # Ray itself would try for minutes.
                host, _, port = self._address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
            self._ray.init(address=self._address, logging_level="WARNING", namespace="lever")
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:300]
            raise InputError(
                f"--ray_address={self._address}: {why}; start a cluster with `ray start --head` "
                "on one machine and `ray start --address=HEAD:6379` on the others, or give "
                "--ray_address=local"
            ) from None

    def _start_local(self) -> None:
        """A cluster of this machine, on its loopback interface."""
        self._folder = LockedFolder()
        cpus = max(os.cpu_count() or 1, (self._workers or 1) * self._cpus)
        with _loopback_only():
            self._ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_LOCAL_STORE_BYTES,
                logging_level="ERROR",
                namespace="lever",
                _node_ip_address=_LOOPBACK,
                _temp_dir=str(self._folder.path),
            )
        address = self._ray.util.get_node_ip_address()
        if address != _LOOPBACK:
            raise RuntimeError(f"Ray listens on {address}, not on {_LOOPBACK} alone")

    def places(self) -> int:
        """See `Engine`."""
        if self._workers is not None:
            return self._workers
        if self.now() >= self.look_at():
            self._looked = self.now()
            rooms = sum(self._room(node) for node in self._nodes())
            self._places = min(max(self._places, rooms, 1), MAX_RAY_WORKERS)
        return self._places

    def look_at(self) -> float:
        """See `Engine`."""
        return math.inf if self._workers is not None else self._looked + _LOOK_S

    def _nodes(self) -> list[dict[str, float]]:
        """What each machine that is alive has in all, by resource."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _room(self, resources: dict[str, float]) -> int:
        """How many workers a machine holds."""
        return room(resources, cpus=self._cpus, gpus=self._gpus)

    def start(self, index: int, settings: Settings) -> RayWorker:
        """See `Engine`."""
        # Workers that share a GPU, or the memory of a machine.
        if self._gpus:
            neighbours = int(1 / self._gpus + 1e-6)
        else:
            neighbours = max([1, *map(self._room, self._nodes())])
            neighbours = min(neighbours, self.places())
        variables = bridge_variables(index, neighbours)
        variables |= {name: value for name, value in os.environ.items() if _CARRIED.fullmatch(name)}
        variables |= dict.fromkeys(THREAD_VARIABLES, str(self._cpus))
        if not self._gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        actor = self._actor.options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": variables},
        ).remote(self._deadline_s)
        return RayWorker(settings, actor, self._kill, self._ring)

    def _kill(self, actor) -> None:
        if self._ray.is_initialized():
            self._ray.kill(actor, no_restart=True)

    def _ring(self, worker: RayWorker) -> None:
        """Called in threads of Ray's."""
        self._news.append(worker)
        with self._ringing:
            if self._bell is not None:
                os.eventfd_write(self._bell, 1)

    def wait(self, workers: Sequence[RayWorker], timeout_s: float) -> list[RayWorker]:
        """See `Engine`."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if poll_in_turns(poll, timeout_s):
            os.eventfd_read(self._bell)
        talking = []
        while self._news:
            talking.append(self._news.popleft())
        return talking

    def now(self) -> float:
        """See `Engine`."""
        return time.monotonic()

    def describe(self) -> str:
        """See `Engine`."""
        asked = f"{self._cpus} CPU" + (f" and {self._gpus:g} GPU" if self._gpus else "")
        nodes = self._nodes()
        has = (f"{n.get('CPU', 0):g} CPU and {n.get('GPU', 0):g} GPU" for n in nodes)
        return (
            f"a worker asks for {asked}, and the cluster has {len(nodes)} machines, with "
            f"{', '.join(has) or 'nothing'}; see `ray status`"
        )

    def close(self) -> None:
        """See `Engine`."""
        if self._connected:
            with _keeping_signals():
                self._ray.shutdown()
            self._connected = False
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
        with self._ringing:
            if self._bell is not None:
                os.close(self._bell)
                self._bell = None


class LockedFolder:
    """A temporary folder for Ray's logs and sockets, removed at the end or by the next one.

    Attributes:
      path: the folder.
    """

    def __init__(self, place: Path | None = None):
        """Makes one in `place`, and removes those there whose driver was killed."""
        if place is None:  # Ray puts Unix sockets in it, whose paths may have 107 characters.
            place = Path(tempfile.gettempdir())
            place = place if len(str(place)) <= 16 else Path("/tmp")
        for folder in place.glob(f"{_FOLDER}*"):
            with contextlib.suppress(OSError):  # It is in use, or not ours.
                os.close(_lock(folder))
                shutil.rmtree(folder, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=place))
        self._lock = _lock(self.path)

    def remove(self) -> None:
        """Removes it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _lock(folder: Path) -> int:
    """Locks a folder as long as the descriptor is open; OSError where another process has."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def room(resources: dict[str, float], *, cpus: int, gpus: float) -> int:
    """How many workers a machine with these resources holds, of so many CPUs and GPUs each.

    Workers that share a GPU lie on one: 0.4 of a GPU leaves 0.2 of each unused.
    """
    by_cpu = int(resources.get("CPU", 0.0) / cpus + 1e-6)
    if not gpus:
        return by_cpu
    return min(by_cpu, int(resources.get("GPU", 0.0)) * int(1 / gpus + 1e-6))


@contextlib.contextmanager
def _keeping_signals() -> Iterator[None]:
    """Ray installs a handler of SIGTERM of its own; ours stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray replaces 127.0.0.1 by the machine's address and then binds every interface.

    It does not on macOS and Windows, where it is not made for clusters; so it takes this machine
    for one of these while it starts one. `_start_local` checks that it did.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, enabled = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        os.environ.pop(name) if before is None else os.environ.update({name: before})
