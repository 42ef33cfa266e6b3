"""Every test here must leave nothing behind, and says in the summary what it did.

`make test-faults` runs all of them; `make test` the quick half, which is the same with less.
"""

import os
import sys
import time
from pathlib import Path

import pytest
from leaks import leaving_nothing
from small_mine import RealJob

TESTS = Path(__file__).parents[1]
_LINES: list[str] = []


@pytest.fixture(autouse=True)
def story(request):
    """Words for the summary; the test appends its own, and leaks are looked for around it."""
    words: list[str] = []
    started = time.monotonic()
    with leaving_nothing():
        yield words
    seconds = time.monotonic() - started
    for word in words:
        _LINES.append(f"{request.node.name:<58} {word}; leaks 0 ({seconds:.0f} s)")


@pytest.fixture(scope="module", autouse=True)
def factories():
    """Workers and drivers find the factories of the tests."""
    places = (TESTS, TESTS / "bridge", TESTS / "faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_BRIDGE_FACTORIES", "trivial_scorer,faults.injection")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS.parent, *places))))
        patch.setattr(sys, "path", [str(place) for place in places] + sys.path)
        yield


@pytest.fixture(scope="session")
def real_job(tmp_path_factory):
    """The undisturbed run, made once."""
    return RealJob(tmp_path_factory.mktemp("undisturbed"))


def pytest_terminal_summary(terminalreporter):
    """What was injected, how often, and what came of it."""
    if _LINES:
        terminalreporter.section("faults")
        for line in _LINES:
            terminalreporter.write_line(line)
