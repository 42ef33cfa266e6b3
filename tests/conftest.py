"""The real data that some tests use, and a checkpoint with Qwen2.5-VL's real vocabulary.

Most of the suite's time would go into compiling small programs that run for milliseconds. So XLA
compiles without optimising, and processes that compile the same program share the result.
"""

import atexit
import importlib.util
import mmap
import os
import pathlib
import shutil
import signal
import tempfile

import pytest


def _known_to_xla(flag: str) -> bool:
    """Whether the installed jaxlib has a flag: XLA aborts at one that it does not know."""
    for library in pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent.glob("*.so"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content.find(flag.encode()) >= 0:
                return True
    return False


# Before anything loads torch: its threads that spin while they wait starve the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# All tests are of the CPU, where figures are exact, also on a machine with GPUs.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Before anything imports jax; the processes that tests start inherit it. Tests that hold what is
# compiled for users against a reference set XLA_FLAGS to nothing.
if "XLA_FLAGS" not in os.environ:
    _FAST = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "false"}
    os.environ["XLA_FLAGS"] = " ".join(f"--{k}={v}" for k, v in _FAST.items() if _known_to_xla(k))
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="lever_xla_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Files whose tests share the finished run of the main job: one process makes it for all of them.
_OF_ONE_RUN = ("loop/test_main_job.py", "loop/test_library.py")

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """As `--dist=loadfile`, but for the files of one run."""
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrRun(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "trained" if file.endswith(_OF_ONE_RUN) else file

    if config.getvalue("dist") == "loadfile":
        return ByFileOrRun(config, log)
    return None


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
