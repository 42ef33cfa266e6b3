"""Environments with the trivial scorer, and the check that they leave nothing behind."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from qwen_bridge.client import Environment


def children() -> set[int]:
    """Process ids whose parent is this process, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def descriptors() -> dict[str, str]:
    """Open file descriptors of this process and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return found


def mappings() -> int:
    """How many memory mappings of the bridge this process has."""
    return Path("/proc/self/maps").read_text().count("qwen_bridge (deleted)")


@contextlib.contextmanager
def leaving_nothing():
    """Fails where its body leaves a process, a descriptor or shared memory behind."""
    before = children(), descriptors(), mappings()
    yield
    assert children() == before[0]
    assert descriptors() == before[1]
    assert mappings() == before[2]


@pytest.fixture
def nothing_left():
    """The same for a whole test."""
    with leaving_nothing():
        yield


@pytest.fixture(scope="module")
def allow_trivial():
    """Lets workers find and use the trivial scorer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_BRIDGE_FACTORIES", "trivial_scorer")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield


@pytest.fixture(scope="module")
def shared(allow_trivial):
    """Two workers that a module's tests may share: nothing in them dies.

    Ids have special effects: 1001 raises an InputError, 1002 another error, 1003 runs out of
    memory, 1004 does so in batches of more than three, 1005 and 1006 come back with a reason.
    """
    settings = {
        "delay_s": 0.001,
        "hello": {"dataset": "sha"},
        "unscorable": [1005, 1006],
        "faults": [
            {"fault": "input_error", "query": 1001},
            {"fault": "raise", "query": 1002},
            {"fault": "out_of_memory", "query": 1003},
            {"fault": "out_of_memory", "query": 1004, "rows": 3},
        ],
    }
    options = {"workers": 2, "threads": 3, "slots": 2, "factory": "trivial_scorer:build"}
    with leaving_nothing(), Environment(settings, **options) as environment:
        yield environment
        assert environment.stats["restarts"] == 0


@pytest.fixture
def environment(allow_trivial, nothing_left):
    """Makes environments of trivial scorers, closed at the end of the test."""
    made = []

    def make(settings=None, **options):
        options = {"factory": "trivial_scorer:build", "backoff_s": 0.001} | options
        made.append(Environment(settings or {}, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def python_handles_ctrl_c():
    """Python's own handler of SIGINT, which a test run started in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
