"""What a run may leave behind, by /proc: processes, descriptors, memory, temporary files, ports."""

import contextlib
import gc
import os
import tempfile
import time
import uuid
from pathlib import Path

SETTLE_S = 5.0
# Every process that this one starts has it in its environment, also those that it loses sight of.
# Not what it inherits: of two pytest processes that run side by side each has to have its own.
os.environ["LEVER_TEST_RUN"] = uuid.uuid4().hex


def children(pid: int | None = None) -> set[int]:
    """Process ids whose parent is `pid` (by default this process), zombies included."""
    parent, found = os.getpid() if pid is None else pid, set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.add(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers() -> set[int]:
    """Worker processes that this test run started, whoever is their parent now."""
    found, ours = set(), f"LEVER_TEST_RUN={os.environ['LEVER_TEST_RUN']}".encode()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"\0qwen_bridge.server\0" in command.read_bytes():
                environment = (command.parent / "environ").read_bytes().split(b"\0")
                found |= {int(command.parent.name)} if ours in environment else set()
        except OSError:
            continue
    return found


def descriptors() -> dict[str, str]:
    """Open file descriptors of this process and what they are."""
    gc.collect()  # What an earlier test let go of is not closed before it is collected.
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def mappings() -> int:
    """How many memory mappings of the bridge this process has."""
    return Path("/proc/self/maps").read_text().count("qwen_bridge (deleted)")


def files() -> set[str]:
    """Shared memory and temporary files that have a name and are the bridge's by it.

    Not those that a process holds a lock on: another test run beside this one works with them. If
    it is this process, `descriptors` tells.
    """
    held = {line.split()[5].rpartition(":")[2] for line in _locks() if "->" not in line}
    found = set()
    for place in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        for path in place.glob("qwen_bridge*"):
            with contextlib.suppress(FileNotFoundError):
                if str(path.stat().st_ino) not in held:
                    found.add(str(path))
    return found


def _locks() -> list[str]:
    return Path("/proc/locks").read_text().splitlines()


def sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process has."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def ports(*pids: int) -> set[str]:
    """Local addresses on which one of these processes listens, or receives without connecting.

    Unix sockets that have a name count; those of a socket pair have none.
    """
    own, found = set().union(*map(sockets, pids)), set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in own and fields[3] in ("0A", "07"):
                found.add(f"{table} {fields[1]}")
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] in own and len(fields) > 7:
            found.add(f"unix {fields[7]}")
    return found


def resident_kib(pid: int | str = "self") -> int:
    """Memory of a process that is in RAM and its own, KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise ProcessLookupError(pid)


@contextlib.contextmanager
def leaving_nothing():
    """Fails where its body leaves a process, descriptor, memory, file or port behind."""
    before = children(), workers(), descriptors(), mappings(), files()
    yield
    deadline = time.monotonic() + SETTLE_S  # A worker whose driver was killed needs a moment.
    while workers() - before[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    started = children() - before[0]
    assert not started, f"left as children: {started}"
    working = {pid for pid in workers() - before[1] if alive(pid)}
    assert not working, f"left at work: {working}"
    opened = dict(descriptors().items() - before[2].items())
    assert not opened, f"left open: {opened}"
    assert mappings() == before[3], f"mapped {before[3]} times before, {mappings()} now"
    named = files() - before[4]
    assert not named, f"left behind: {named}"
    listening = ports(os.getpid())
    assert not listening, f"left listening: {listening}"
