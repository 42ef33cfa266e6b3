"""Environments with the trivial scorer, and the check that they leave nothing behind."""

import os
from pathlib import Path

import pytest
from leaks import leaving_nothing

from qwen_bridge.client import Environment


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
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent))))
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
