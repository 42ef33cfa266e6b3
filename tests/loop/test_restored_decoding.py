"""A selector restored from its Orbax checkpoint in a new process picks as it did when saved."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from decode_all import decode_all
from small_world import World

from lever_jax import checkpoint
from lever_jax.decoding import DECODINGS, method_name

HERE = pathlib.Path(__file__).parent


def test_every_decoding_is_the_same_in_a_new_process(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    world = World(tmp_path / "ours")
    rng = np.random.default_rng()  # other parameters in every run of the test
    params = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), jax.device_get(world.params)
    )
    params = jax.tree.map(jax.numpy.asarray, params)
    checkpoint.save(tmp_path / "selector", params, {})
    script = [str(HERE / "decode_all.py"), str(tmp_path / "selector"), str(tmp_path / "theirs")]
    child = subprocess.Popen(
        [sys.executable, *script, str(tmp_path / "theirs.npz")],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ours = decode_all(world, params)
    world.store.close()
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    theirs = np.load(tmp_path / "theirs.npz")
    assert set(theirs) == set(ours)
    assert {f"{method_name('selector', decoding)} 0" for decoding in DECODINGS} < set(ours)
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        assert array.tobytes() == theirs[name].tobytes(), name
