"""The embedded checkpoint in this process."""

import pytest
from worker_settings import SETTINGS

from qwen_bridge import workers


@pytest.fixture
def worker_settings():
    """The usual settings of a worker."""
    return dict(SETTINGS)


@pytest.fixture(scope="module")
def make_scorer():
    """Builds scorers from the usual settings with some changed; equal ones are shared.

    By the tests of one file: what a scorer has generated helps it to certify answers later.
    """
    built = {}

    def make(**changes):
        key = repr(sorted(changes.items()))
        if key not in built:
            built[key] = workers.build({**SETTINGS, **changes})[0]
        return built[key]

    return make
