"""Checkpoints: whole or not at all, and only into the tree they were saved from."""

import itertools
import json
import logging
import os
import pathlib
import shutil
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lever_jax import checkpoint
from lever_jax.errors import InputError


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array
    table: np.ndarray
    nothing: tuple = ()


METADATA = {"phase": "rce", "config": {"width": 8, "parts": [0, 8]}, "flags": ["--tau=1.0"]}


def make_state(width=8, dtype=jnp.float32, optimizer=None):
    values = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    params = {
        "encoder": {"kernel": jnp.asarray(values[:4]), "a/b": jnp.asarray(np.ones(3), dtype)},
        "heads": [jnp.asarray(values[4]), jnp.float32(0.5)],
        "empty": jnp.asarray(np.zeros((0, 3), np.float32)),
    }
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    table = np.array([[1, 2**60]], np.int64)
    return State(params, optimizer.init(params), jnp.int32(7), table)


def abstract(state):
    return jax.eval_shape(lambda: state)._replace(table=state.table)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "rce"


def test_a_state_comes_back(path, monkeypatch):
    state = make_state(dtype=jnp.bfloat16)
    assert not checkpoint.exists(path)
    assert checkpoint.save(path, state, METADATA) == path
    assert checkpoint.exists(path)
    for like in (abstract(state), state):
        restored, metadata = checkpoint.restore(path, like)
        assert_equal(restored, state)
        assert metadata == METADATA
    assert not restored.step.committed  # As it was; else jit would compile for it again.
    assert checkpoint.read_metadata(path) == METADATA
    monkeypatch.chdir(path.parent)
    assert checkpoint.read_metadata("rce") == METADATA
    donated = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    assert_equal(donated(restored.params), jax.tree.map(lambda x: x + 1, state.params))


def test_saving_again_replaces_all_of_it(path):
    checkpoint.save(path, make_state(), {"phase": "rce"})
    checkpoint.save(path, {"w": jnp.ones(2)}, {"phase": "grpo"})
    restored, metadata = checkpoint.restore(path, {"w": jnp.zeros(2)})
    assert_equal(restored, {"w": jnp.ones(2)})
    assert metadata == {"phase": "grpo"}
    assert os.listdir(path.parent) == ["rce"]


def test_a_small_state_is_saved_in_under_a_second(path):
    state = {f"layer_{i}": np.ones((128, 128), np.float32) for i in range(16)}  # 1 MB.
    checkpoint.save(path, state, {})
    start = time.process_time()  # Of this process, whatever else the machine does.
    checkpoint.save(path, state, {})
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, r"leaf params/encoder/kernel has shape \(4, 8\), wanted is \(4, 9\)"),
        ({"dtype": jnp.float16}, "leaf params/encoder/a/b is float32, wanted is float16"),
        ({"optimizer": optax.sgd(0.1)}, "has a leaf opt_state/1/0/count that is not wanted"),
        ({"optimizer": optax.adam(0.1)}, "has no leaf opt_state/0/count"),
    ],
)
def test_another_architecture_is_refused_by_its_first_leaf(path, change, message):
    checkpoint.save(path, make_state(), METADATA)
    with pytest.raises(InputError, match=message):
        checkpoint.restore(path, abstract(make_state(**change)))


def test_every_cut_or_changed_file_is_refused(path, tmp_path):
    state = make_state()
    checkpoint.save(path, state, METADATA)
    files = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    assert len(files) > 5
    rng = np.random.default_rng(0)
    copy = tmp_path / "copy"
    for file in files:
        whole = (path / file).read_bytes()
        changed = bytearray(whole)
        if whole:
            changed[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        for damaged in (whole[: len(whole) // 2], bytes(changed), None):
            if damaged == whole:
                continue
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(path, copy)
            if damaged is None:
                (copy / file).unlink()
            else:
                (copy / file).write_bytes(damaged)
            with pytest.raises(InputError, match=str(file)):
                checkpoint.restore(copy, abstract(state))


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_no_damage_restores_wrong_parameters(path, how):
    """Three hundred random places over all files; what is left in them is restored, or refused."""
    state = make_state(dtype=jnp.bfloat16)
    checkpoint.save(path, state, METADATA)
    like = abstract(state)
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    rng = np.random.default_rng(3)
    for number in range(300):
        file = files[number % len(files)]
        whole = file.read_bytes()
        at = int(rng.integers(len(whole)))
        damaged = bytearray(whole)
        if how == "cut":
            del damaged[at:]
        else:
            damaged[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=str(file)):
            checkpoint.restore(path, like)
        file.write_bytes(whole)
    assert_equal(checkpoint.restore(path, like)[0], state)


def test_the_best_of_a_run_is_kept(path):
    def offer(weight, value, recipe="a", figure="reward"):
        tree, metadata = {"w": jnp.full(2, weight)}, {"recipe": recipe, "round": int(weight)}
        return checkpoint.save_if_best(path, tree, metadata, figure=figure, value=value)

    def kept():
        tree, metadata = checkpoint.restore(path, {"w": jnp.zeros(2)})
        return float(tree["w"][0]), metadata

    assert not offer(1.0, np.nan)
    assert not checkpoint.exists(path)
    assert [offer(2.0, 0.5), offer(3.0, 0.5), offer(4.0, 0.4), offer(5.0, np.nan)] == [
        True, False, False, False,
    ]  # fmt: skip
    best_by = {"figure": "reward", "value": 0.5}
    assert kept() == (2.0, {"recipe": "a", "round": 2, "best_by": best_by})
    assert offer(6.0, np.float32(0.75))
    assert kept()[1]["best_by"]["value"] == 0.75
    assert offer(7.0, 0.1, recipe="b")  # Another run: its first state is its best so far.
    assert offer(8.0, 0.0, recipe="b", figure="accuracy")
    assert kept()[0] == 8.0
    (path / "metadata.json").write_text("{}")
    with pytest.raises(InputError, match="cut or edited"):
        offer(9.0, 1.0, recipe="b", figure="accuracy")


def test_edited_metadata_is_refused(path):
    checkpoint.save(path, {"w": jnp.ones(2)}, {"phase": "rce"})
    file = path / "metadata.json"
    content = json.loads(file.read_text())
    content["metadata"]["phase"] = "grpo"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="was edited"):
        checkpoint.read_metadata(path)
    del content["digest"]
    content["version"] = 2
    content["digest"] = checkpoint._digest(checkpoint._canonical(content))
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="format version 2"):
        checkpoint.read_metadata(path)
    for text in ("[]", "{}", '{"digest": 1', "[" * 10**5):
        file.write_text(text)
        with pytest.raises(InputError, match="cut or edited"):
            checkpoint.restore(path, {"w": jnp.ones(2)})
    os.truncate(file, 2**26 + 1)  # It is not even read.
    with pytest.raises(InputError, match="cut or edited: too long"):
        checkpoint.read_metadata(path)


def test_arrays_that_orbax_reads_differently_are_refused(path, monkeypatch):
    checkpoint.save(path, {"w": jnp.ones(2)}, {})
    for wrong in (np.array([1, 2], np.float32), np.ones(2, np.float16)):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.ocp, "load", lambda *_, wrong=wrong: {"w": wrong})
            with pytest.raises(InputError, match="leaf w is not what was saved"):
                checkpoint.restore(path, {"w": jnp.zeros(2)})


def test_a_kill_between_the_two_renames_loses_nothing(path):
    checkpoint.save(path, {"w": jnp.ones(2)}, {"phase": "old"})
    partial, previous = checkpoint._beside(path)
    path.rename(previous)
    (partial / "arrays").mkdir(parents=True)
    assert checkpoint.exists(path)
    assert checkpoint.restore(path, {"w": jnp.zeros(2)})[1] == {"phase": "old"}
    checkpoint.save(path, {"w": jnp.zeros(2)}, {"phase": "new"})
    assert checkpoint.read_metadata(path) == {"phase": "new"}
    assert os.listdir(path.parent) == ["rce"]


@pytest.mark.parametrize("step", [0, 1])
def test_a_save_that_ends_at_a_rename_leaves_the_old_checkpoint(path, monkeypatch, step):
    checkpoint.save(path, {"w": jnp.ones(2)}, {"phase": "old"})
    rename, calls = pathlib.Path.rename, itertools.count()

    def stop(self, target):
        if next(calls) == step:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, {"w": jnp.zeros(2)}, {"phase": "new"})
    assert next(calls) == step + 1
    restored, metadata = checkpoint.restore(path, {"w": jnp.zeros(2)})
    assert_equal(restored, {"w": jnp.ones(2)})
    assert metadata == {"phase": "old"}


def test_all_is_on_disk_before_it_takes_its_place(path, monkeypatch):
    rename, fsync, steps = pathlib.Path.rename, os.fsync, []

    def moved(self, target):
        if self.name.endswith(".partial"):
            steps.append({str(p) for p in (self, *self.rglob("*"))})
        return rename(self, target)

    def synced(fd):
        steps.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(pathlib.Path, "rename", moved)
    monkeypatch.setattr(os, "fsync", synced)
    checkpoint.save(path, {"w": jnp.ones(2)}, {})
    (at,) = (i for i, step in enumerate(steps) if isinstance(step, set))
    assert len(steps[at]) > 5
    assert steps[at] <= set(steps[:at])
    assert str(path.parent) in steps[at + 1 :]


def test_a_failed_save_leaves_the_old_checkpoint(path, monkeypatch):
    checkpoint.save(path, {"w": jnp.ones(2)}, {"phase": "old"})
    with pytest.raises(TypeError, match="not JSON"):
        checkpoint.save(path, {"w": jnp.ones(3)}, {"phase": object()})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save", full)
    with pytest.raises(InputError, match="No space left"):
        checkpoint.save(path, {"w": jnp.ones(3)}, {})
    assert checkpoint.restore(path, {"w": jnp.zeros(2)})[1] == {"phase": "old"}
    assert os.listdir(path.parent) == ["rce"]


def test_only_checkpoints_are_replaced(path):
    path.mkdir(parents=True)
    checkpoint.save(path, {"w": jnp.ones(2)}, {})
    with pytest.raises(InputError, match="is not a checkpoint; name another place"):
        checkpoint.save(path.parent, {"w": jnp.ones(2)}, {})
    (path.parent / "file").write_text("text")
    with pytest.raises(InputError, match="is not a checkpoint"):
        checkpoint.save(path.parent / "file", {"w": jnp.ones(2)}, {})
    for absent in (path.parent, path.parent / "file", path.parent / "none"):
        with pytest.raises(InputError, match="not a checkpoint"):
            checkpoint.restore(absent, {"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (3, "leaf step is a int; wrap it"),
        ("x", "leaf step is a str"),
        (jax.random.key(0), "save jax.random.key_data"),
        (np.array([None]), "array of Python objects"),
    ],
)
def test_leaves_that_are_not_arrays(path, leaf, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save(path, {"step": leaf}, {})
    assert not path.exists()


def test_names_of_leaves_must_differ_and_donated_leaves_are_told(path):
    with pytest.raises(ValueError, match="two leaves of the tree are called a/b"):
        checkpoint.save(path, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {})
    gone = jnp.ones(1)
    gone.delete()
    with pytest.raises(ValueError, match="leaf w cannot be read"):
        checkpoint.save(path, {"w": gone}, {})


def test_a_width_that_jax_would_cut_is_refused(path):
    checkpoint.save(path, {"w": np.ones(2)}, {})
    assert checkpoint.restore(path, {"w": np.zeros(2)})[0]["w"].dtype == np.float64
    with pytest.raises(InputError, match="needs JAX_ENABLE_X64"):
        checkpoint.restore(path, {"w": jax.ShapeDtypeStruct((2,), np.float64)})


def test_bare_and_empty_trees(path):
    checkpoint.save(path, jnp.ones(2), {})
    assert_equal(checkpoint.restore(path, jnp.zeros(2))[0], jnp.ones(2))
    checkpoint.save(path, {"none": None}, {})
    assert checkpoint.restore(path, {"none": None})[0] == {"none": None}


def test_orbax_is_silent_and_we_are_not(path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    checkpoint.save(path, {"w": jnp.ones(2)}, {})
    checkpoint.restore(path, {"w": jnp.ones(2)})
    logging.getLogger("absl").info("ours")
    assert [record.message for record in caplog.records] == ["ours"]
