"""The real data that some tests use, and a checkpoint with Qwen2.5-VL's real vocabulary.

Most of the suite's time would go into compiling small programs that run for milliseconds. So XLA
compiles without optimising, and processes that compile the same program share the result.
"""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile

import pytest

# Before anything imports jax; the processes that tests start inherit it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="lever_xla_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared():
    """The folder of real data, or a skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}, which are not part of the product")
    return SHARED


@pytest.fixture(scope="session")
def random_qwen(shared, tmp_path_factory):
    """A checkpoint folder as published, but small and with random weights."""
    from random_qwen import write_checkpoint  # Only here: it loads torch and transformers.

    folder = tmp_path_factory.mktemp("random_qwen")
    write_checkpoint(folder, shared / "qwen2_5_vl")
    return folder


@pytest.fixture(autouse=True)
def python_handles_ctrl_c():
    """Python's own handler of SIGINT, which a test run started in the background lacks.

    The processes that it starts would be deaf to Ctrl-C, too.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
