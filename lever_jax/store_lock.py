"""One writer at a time: a lock file beside the store that names who holds it.

The lock is the kernel's (`flock`), so it disappears with its process however that dies, and a
stale file stops nobody. What stands in the file is only there to tell the second writer whom it
is waiting for.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from lever_jax.store_schema import StoreError


class WriterLock:
    """Holds `PATH.lock` until `release`; raises StoreError where another process has it.

    A sidecar, and not the store itself: closing any descriptor of an SQLite file would drop
    SQLite's own locks on it.
    """

    def __init__(self, store: Path):
        self._path = store.with_name(store.name + ".lock")
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = self._owner()
                os.close(self._file)
                raise StoreError(
                    f"{store} is being written by {owner}; wait until it ends or stop it, use "
                    "another --workdir, or open the store read-only"
                ) from None
            # The owner removes the file when it releases. If that happened between our open and
            # our lock, we hold a file that nobody else can see: take the new one instead.
            if self._is_current():
                break
            os.close(self._file)
        os.ftruncate(self._file, 0)
        note = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "program": " ".join(sys.argv[:2])[:200] or "python",
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.pwrite(self._file, json.dumps(note).encode(), 0)

    def release(self) -> None:
        """Gives the lock back and removes the file. Safe to call twice."""
        if self._file < 0:
            return
        if self._is_current():
            self._path.unlink()
        os.close(self._file)
        self._file = -1

    def _is_current(self) -> bool:
        mine = os.fstat(self._file)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        return (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev)

    def _owner(self) -> str:
        return _words(os.pread(self._file, 4096, 0))


def writer_of(store: Path) -> str | None:
    """Who holds the lock of a store, by the note beside it; None where nobody does."""
    try:
        note = store.with_name(store.name + ".lock").read_bytes()
    except FileNotFoundError:
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(note)
        if owner["host"] == socket.gethostname() and not _lives(owner["pid"]):
            return None  # Killed; the next writer takes its place.
    return _words(note)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _words(note: bytes) -> str:
    try:
        return "process {pid} ({program}) on {host} since {since}".format(**json.loads(note))
    except (ValueError, KeyError, TypeError, IndexError):
        return "another process"  # It has the lock and has not written its name yet.
