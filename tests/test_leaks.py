"""The search for what a run leaves behind finds each kind of it, and nothing of other runs."""

import contextlib
import mmap
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import leaks
import pytest

from qwen_bridge.ray_cluster import LockedFolder

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)", "qwen_bridge.server"]


@pytest.fixture
def later():
    """What puts things right again."""
    with contextlib.ExitStack() as stack:
        yield stack


def left_child(later):
    child = later.enter_context(subprocess.Popen(["sleep", "60"]))
    later.callback(child.kill)


def left_worker(later):
    """Its parent is gone, so it is no child of ours."""
    subprocess.run(["sh", "-c", f"{shlex.join(SLEEP)} &"], check=True)
    until = time.monotonic() + 20
    while not leaks.workers() and time.monotonic() < until:
        time.sleep(0.01)
    later.callback(lambda pids: [os.kill(pid, 9) for pid in pids], leaks.workers())


def left_descriptor(later):
    later.callback(os.close, os.open("/dev/null", os.O_RDONLY))


def left_mapping(later):
    fd = os.memfd_create("qwen_bridge")
    os.truncate(fd, 4096)
    later.callback(mmap.mmap(fd, 4096).close)
    os.close(fd)


def left_file(later):
    path = tempfile.mkdtemp(prefix="qwen_bridge-")
    later.callback(os.rmdir, path)


def left_locked_folder(later):
    later.callback(LockedFolder().remove)


@pytest.mark.parametrize(
    ("leave", "words"),
    [
        (left_child, "left as children"),
        (left_worker, "left at work"),
        (left_descriptor, "left open.*/dev/null"),
        (left_mapping, "mapped 0 times before, 1 now"),
        (left_file, "left behind.*qwen_bridge-"),
        (left_locked_folder, "left open.*qwen_bridge-"),
    ],
)
def test_each_kind_is_found(later, monkeypatch, leave, words):
    monkeypatch.setattr(leaks, "SETTLE_S", 0.05)
    if leave is left_mapping:  # Python's maps hold a descriptor, too.
        monkeypatch.setattr(leaks, "descriptors", dict)
    with pytest.raises(AssertionError) as caught, leaks.leaving_nothing():
        leave(later)
    caught.match(words)


def test_ports_are_found():
    assert not leaks.ports(os.getpid())
    with socket.socket() as one, socket.socket(socket.AF_UNIX) as named:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            named.bind(f"{folder}/s")
            found = leaks.ports(os.getpid())
            assert sorted(found) == [f"tcp 0100007F:{port:04X}", f"unix {folder}/s"]


OTHER = """
import sys
from qwen_bridge.ray_cluster import LockedFolder
sys.stdin.readline()
folder = LockedFolder()
print(folder.path, flush=True)
sys.stdin.readline()
folder.remove()
"""


def test_the_folder_of_another_run_is_not_ours():
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        with leaks.leaving_nothing():
            print(file=other.stdin, flush=True)
            path = other.stdout.readline().strip()
            assert Path(path).is_dir()
        print(file=other.stdin, flush=True)
        assert other.wait(60) == 0
    assert not Path(path).exists()
