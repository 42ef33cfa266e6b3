"""kill -9 while checkpoints are being saved: what is restored is whole, and the last one."""

import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from lever_jax import checkpoint

SEED = 29
SAVER = """
    import itertools, sys
    import numpy as np
    from lever_jax import checkpoint
    start = checkpoint.read_metadata(sys.argv[1])["round"] if checkpoint.exists(sys.argv[1]) else 0
    for n in itertools.count(start + 1):
        tree = {name: np.full((50, 40), n, np.float32) for name in "abc"}
        checkpoint.save(sys.argv[1], tree, {"round": n})
        print(n, flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory):
    """Orbax opens descriptors of its own at its first restore, and keeps them."""
    path, tree = tmp_path_factory.mktemp("first") / "state", {"a": np.zeros(3, np.float32)}
    checkpoint.save(path, tree, {})
    checkpoint.restore(path, tree)


@pytest.mark.parametrize("kills", [1, pytest.param(40, marks=pytest.mark.faults)])
def test_kills_while_saving(tmp_path, story, kills):
    rng, path, saved = random.Random(SEED), tmp_path / "state", 0
    command = [sys.executable, "-c", textwrap.dedent(SAVER), str(path)]
    like = {name: np.zeros((50, 40), np.float32) for name in "abc"}
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            saved = int(saver.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.5))
            saver.kill()
            saved = int((saver.stdout.read().split() or [saved])[-1])
            assert saver.wait() == -signal.SIGKILL
        tree, metadata = checkpoint.restore(path, like)
        assert metadata["round"] in (saved, saved + 1)  # It was killed before it could say so.
        assert all((array == metadata["round"]).all() for array in tree.values())
    story.append(f"{kills} kills in {saved} saves (seed {SEED}): every state whole")
