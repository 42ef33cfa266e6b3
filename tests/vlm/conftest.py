"""The embedded checkpoint in this process."""

import pytest
from worker_settings import SETTINGS

from qwen_bridge import workers


@pytest.fixture
def worker_settings():
    """The usual settings of a worker."""
    return dict(SETTINGS)


@pytest.fixture(scope="session")
def make_scorer():
    """Builds scorers from the usual settings with some changed; equal ones are shared."""
    built = {}

    def make(**changes):
        key = repr(sorted(changes.items()))
        if key not in built:
            built[key] = workers.build({**SETTINGS, **changes})[0]
        return built[key]

    return make
