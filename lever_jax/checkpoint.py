"""Saves and restores a training state: arrays by Orbax, and beside them what they are.

A checkpoint is a folder with the Orbax checkpoint in `arrays/` and `metadata.json`, which lists
every leaf (name, shape, dtype, digest) and every file (size, digest). Restoring compares first
and reads later, so that a checkpoint of another architecture, a cut file or an edited one is
refused with the reason; Orbax alone would cast a wrong dtype without a word.

    save("runs/digits/grpo", state, {"phase": "grpo", "flags": flags})
    state, metadata = restore("runs/digits/grpo", jax.eval_shape(make_state))
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lever_jax.errors import InputError

FORMAT = "lever_checkpoint"
VERSION = 1
_MAX_METADATA = 1 << 26  # Bytes; a metadata.json beyond this is not one of ours.


def save(path: str | os.PathLike, tree: Any, metadata: dict) -> Path:
    """Writes a checkpoint, replacing whatever was at `path` by the new one as a whole.

    It is built beside its place and moved there, all of it on disk by then, so that after a kill
    or a power cut at any moment `restore` finds the old one or the new one and never a mixture.
    One process writes.

    Args:
      path: a folder, made with its parents.
      tree: any pytree of NumPy or JAX arrays; NamedTuples and empty nodes are fine.
      metadata: JSON; config of the architecture, phase, flags, code version, data fingerprint.

    Returns:
      The absolute path.
    """
    path = Path(os.path.abspath(path))
    partial, previous = _beside(path)
    _check_replaceable(path)
    arrays = {name: _array(name, leaf) for name, leaf in _named_leaves(tree).items()}
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        # Orbax refuses arrays without elements; their shape in the metadata says it all.
        full = {name: array for name, array in arrays.items() if array.size}
        if full:
            _save_arrays(partial / "arrays", full)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "metadata": metadata,
            "leaves": {
                name: {
                    "shape": list(array.shape),
                    "dtype": array.dtype.name,
                    "digest": _digest(np.ascontiguousarray(array).tobytes()),
                }
                for name, array in arrays.items()
            },
            "files": {
                file.relative_to(partial).as_posix(): {
                    "size": file.stat().st_size,
                    "digest": _digest(file.read_bytes()),
                }
                for file in sorted(partial.rglob("*"))
                if file.is_file()
            },
        }
        content["digest"] = _digest(_canonical(content))
        with open(partial / "metadata.json", "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
        for place in (partial, *partial.rglob("*")):
            _sync(place)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        partial.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise InputError(f"cannot write the checkpoint {path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
    return path


def save_if_best(
    path: str | os.PathLike, tree: Any, metadata: dict, *, figure: str, value: float
) -> bool:
    """Keeps the best state of a run, beside the last one, which `save` keeps.

    Saves where `value` is above that of the checkpoint at `path`. One of another recipe
    (`metadata["recipe"]`) or by another figure is no rival, and is replaced.

    Args:
      path: a folder of its own.
      tree: as for `save`. Mind that it is the state that `value` was measured on.
      metadata: as for `save`; `best_by` is added to it: the figure's name and value.
      figure: what the states are compared by, more being better, say "validation_accuracy".
      value: of this state; NaN, nothing having been measured, is never best.

    Returns:
      Whether it was saved.

    Raises:
      InputError: as `save` and `read_metadata`; a damaged checkpoint is not replaced unseen.
    """
    if np.isnan(value):
        return False
    if exists(path):
        kept = read_metadata(path)
        best = kept.get("best_by", {})
        rival = best.get("figure") == figure and kept.get("recipe") == metadata.get("recipe")
        if rival and best["value"] >= value:
            return False
    save(path, tree, {**metadata, "best_by": {"figure": figure, "value": float(value)}})
    return True


def restore(path: str | os.PathLike, abstract_tree: Any) -> tuple[Any, dict]:
    """Reads a checkpoint into a tree of the given structure, or refuses it.

    Args:
      path: the folder.
      abstract_tree: the tree that is wanted, with arrays or `jax.ShapeDtypeStruct` as leaves. A
        leaf that is a NumPy array is restored as one; any other becomes a JAX array, on the
        leaf's sharding if it has one.

    Returns:
      The tree, and the metadata it was saved with.

    Raises:
      InputError: there is no checkpoint, it is cut or edited, or it holds another tree; names
        the file or the first leaf that differs.
    """
    folder, content = _read(path)
    stored = content["leaves"]
    wanted = _named_leaves(abstract_tree)
    _compare(folder, stored, wanted)
    for name, note in content["files"].items():
        _check_file(folder, name, note)
    full = {
        name: np.empty(note["shape"], _dtype(note["dtype"]))
        for name, note in stored.items()
        if 0 not in note["shape"]
    }
    arrays = {}
    if full:
        arrays = _load_arrays(folder / "arrays", full)
    leaves = []
    for name, leaf in wanted.items():
        note = stored[name]
        empty = np.empty(note["shape"], _dtype(note["dtype"]))
        array = np.ascontiguousarray(arrays.get(name, empty)).reshape(note["shape"])
        if array.dtype != empty.dtype or _digest(array.tobytes()) != note["digest"]:
            raise InputError(f"{folder}: leaf {name} is not what was saved; the files are damaged")
        leaves.append(_like(leaf, array, f"{folder}: leaf {name}"))
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), leaves), content["metadata"]


def read_metadata(path: str | os.PathLike) -> dict:
    """The metadata of a checkpoint, without its arrays; raises InputError like `restore`."""
    return _read(path)[1]["metadata"]


def exists(path: str | os.PathLike) -> bool:
    """Whether there is something at `path` for `restore` to read."""
    path = Path(os.path.abspath(path))
    return any((place / "metadata.json").is_file() for place in (path, _beside(path)[1]))


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where a checkpoint is built, and where the one before it waits until it is replaced."""
    return path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.previous")


def _read(path: str | os.PathLike) -> tuple[Path, dict]:
    """The folder that holds the checkpoint and the verified content of its metadata.json."""
    folder = Path(os.path.abspath(path))
    previous = _beside(folder)[1]
    if not folder.exists() and previous.exists():
        folder = previous  # A save was killed between its two renames.
    file = folder / "metadata.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a checkpoint (no metadata.json); check the path")
    try:
        if file.stat().st_size > _MAX_METADATA:
            raise ValueError("too long")
        content = json.loads(file.read_text(encoding="utf-8"))
        digest = content.pop("digest")
        known = (content["format"], content["version"])
        right = digest == _digest(_canonical(content))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{file} was cut or edited: {_one_line(error)}") from error
    if known[0] == FORMAT and known[1] != VERSION:
        raise InputError(f"{folder} has format version {known[1]}, this code reads {VERSION}")
    if not right:
        raise InputError(f"{file} was edited: its digest does not match its content")
    return folder, content


def _compare(folder: Path, stored: dict[str, dict], wanted: dict[str, Any]) -> None:
    """Refuses a checkpoint whose leaves are not those wanted, naming the first difference."""
    hint = "it was saved by another architecture or optimizer; use the flags it was trained with"
    for name, leaf in wanted.items():
        if name not in stored:
            raise InputError(f"{folder} has no leaf {name}; {hint}")
        has, want = tuple(stored[name]["shape"]), tuple(leaf.shape)
        if has != want:
            raise InputError(f"{folder}: leaf {name} has shape {has}, wanted is {want}; {hint}")
        has, want = stored[name]["dtype"], np.dtype(leaf.dtype).name
        if has != want:
            raise InputError(f"{folder}: leaf {name} is {has}, wanted is {want}; {hint}")
    for name in stored:
        if name not in wanted:
            raise InputError(f"{folder} has a leaf {name} that is not wanted; {hint}")


def _check_file(folder: Path, name: str, note: dict) -> None:
    """Refuses a file that is not byte for byte what `save` wrote."""
    file = folder / name
    try:
        size = file.stat().st_size
        if size != note["size"]:
            raise InputError(f"{file} has {size} of {note['size']} bytes; the checkpoint was cut")
        if _digest(file.read_bytes()) != note["digest"]:
            raise InputError(f"{file} was edited or damaged: its digest does not match")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, such as `params/encoder/kernel`, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "tree"
        if name in named:
            raise ValueError(f"two leaves of the tree are called {name}; rename one")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"leaf {name} is a {type(leaf).__name__}; wrap it in jnp.asarray")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"leaf {name} is a {leaf.dtype}; save jax.random.key_data of it")
        named[name] = leaf
    return named


def _array(name: str, leaf: Any) -> np.ndarray:
    """A leaf on the host."""
    try:
        array = np.asarray(leaf)
    except RuntimeError as error:  # Donated, or spread over other processes.
        raise ValueError(f"leaf {name} cannot be read: {_one_line(error)}") from error
    if array.dtype == object:
        raise TypeError(f"leaf {name} is an array of Python objects")
    return array


def _like(leaf: Any, array: np.ndarray, place: str) -> Any:
    """A restored array as the kind of array that the abstract leaf asks for."""
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise InputError(f"{place} is {array.dtype}, which needs JAX_ENABLE_X64=1")
    # An uncommitted array must come back uncommitted, or jit would compile again for it.
    committed = getattr(leaf, "committed", True)
    return jax.device_put(array, getattr(leaf, "sharding", None) if committed else None)


def _save_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        with _quiet():
            ocp.save(folder, arrays)
    except Exception as error:  # Orbax and TensorStore raise whatever they meet.
        raise InputError(f"cannot write the checkpoint {folder}: {_one_line(error)}") from error


def _load_arrays(folder: Path, abstract: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        with _quiet():
            return ocp.load(folder, abstract)
    except Exception as error:
        raise InputError(f"{folder}: Orbax cannot read it: {_one_line(error)}") from error


def _check_replaceable(path: Path) -> None:
    """Refuses to replace anything but a checkpoint or an empty folder."""
    if path.is_dir() and ((path / "metadata.json").is_file() or not any(path.iterdir())):
        return
    if os.path.lexists(path):
        raise InputError(f"{path} exists and is not a checkpoint; name another place to save to")


def _dtype(name: str) -> np.dtype:
    return np.dtype(jax.numpy.dtype(name))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's progress notes and deprecation warnings out of the user's terminal.

    They come through absl's logger, which our entry points use too, so records are told apart by
    the file that wrote them. Warnings from Orbax (WARNING and above) still get through.
    """

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        with warnings.catch_warnings():
            # A user's -W error must not turn Orbax's own deprecations into a failed save.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", module=r"orbax\.")
            yield
    finally:
        logger.removeFilter(keep)
