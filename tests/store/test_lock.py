"""The writer's lock: one at a time whatever happens to its file, and a dead owner owns nothing."""

import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from lever_jax import store_lock
from lever_jax.store import StoreError
from lever_jax.store_lock import WriterLock, writer_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


def check_held(path):
    """A further writer is refused."""
    with pytest.raises(StoreError, match=f"is being written by process {os.getpid()} "):
        WriterLock(path)


def test_a_file_that_its_owner_removes_before_it_is_locked_is_not_taken(path, monkeypatch):
    first, flock, calls = WriterLock(path), fcntl.flock, []

    def late(*arguments):
        calls.append(arguments)
        if len(calls) == 1:  # The file is open, and not locked yet.
            first.release()
        flock(*arguments)

    monkeypatch.setattr(store_lock.fcntl, "flock", late)
    second = WriterLock(path)
    assert len(calls) == 2
    check_held(path)
    second.release()
    assert os.listdir(path.parent) == []


def test_another_owners_file_is_not_removed(path):
    first = WriterLock(path)
    os.unlink(f"{path}.lock")  # By a user who took it for a stale one.
    second = WriterLock(path)
    first.release()
    check_held(path)
    second.release()
    second.release()
    assert os.listdir(path.parent) == []


def test_whose_it_is(path):
    assert writer_of(path) is None
    lock = WriterLock(path)
    assert writer_of(path).startswith(f"process {os.getpid()} (")
    lock.release()
    assert writer_of(path) is None
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    note = {"pid": dead.pid, "host": socket.gethostname(), "program": "mine", "since": "now"}
    file = path.with_name("store.sqlite.lock")
    file.write_text(json.dumps(note))  # As a process that was killed leaves it.
    assert writer_of(path) is None
    file.write_text(json.dumps({**note, "host": "elsewhere"}))  # Whether it lives is not known.
    assert writer_of(path) == f"process {dead.pid} (mine) on elsewhere since now"
    for text in ("", "[]", '{"pid": 1'):
        file.write_text(text)
        assert writer_of(path) == "another process"


def test_a_longer_note_of_a_dead_owner_leaves_no_trace(path):
    path.with_name("store.sqlite.lock").write_text(json.dumps({"pid": 1, "more": "x" * 4000}))
    lock = WriterLock(path)
    check_held(path)
    lock.release()
