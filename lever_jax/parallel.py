"""Spreads batches of query groups over the local devices: each computes its share of the queries.

Parameters and embeddings lie whole on every device, and the gradient is summed over devices by
XLA. With one device there is no mesh (`None`).
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lever_jax.errors import InputError

MODES = ("auto", "off")
_AXIS = "queries"
_AT_A_TIME = 8
_TABLES = 0.8  # of JAX's memory; the rest is for what is computed


def make_mesh(mode: str) -> Mesh | None:
    """The mesh of all local devices; None with `off`, or where there is only one.

    Raises:
      InputError: an unknown mode.
    """
    if mode not in MODES:
        raise InputError(f"--data_parallel={mode} is not one of {', '.join(MODES)}")
    devices = jax.local_devices()
    return Mesh(np.array(devices), (_AXIS,)) if mode == "auto" and len(devices) > 1 else None


def device_count(mesh: Mesh | None) -> int:
    """Rows of a batch must be a multiple of it."""
    return 1 if mesh is None else mesh.size


def used_devices(mesh: Mesh | None) -> list[jax.Device]:
    """The devices that compute: all of the mesh, or the first."""
    return [jax.local_devices()[0]] if mesh is None else list(mesh.devices.flat)


def replicated(mesh: Mesh | None, tree: Any) -> Any:
    """The arrays of a tree, whole on every device.

    With one device they are committed to it all the same, as those of a checkpoint may be: a
    function is compiled anew for arrays that are not.
    """
    place = jax.local_devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.device_put(tree, place)


def check_room(tables: Sequence[Any], devices: Sequence[jax.Device]) -> None:
    """Refuses tables that do not fit, before they are sent to the devices.

    Args:
      tables: trees of arrays that every device will hold.
      devices: where; one that does not tell its memory, as a CPU, is taken to have enough.

    Raises:
      InputError: they take more than four fifths of what JAX may use of a device.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(list(tables)))
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit and size > _TABLES * limit:
            raise InputError(
                f"the pools' embeddings take {size / 1e9:.1f} GB on {device}, of which JAX may use "
                f"{limit / 1e9:.1f} GB; lower --pool_size, --num_queries or --num_eval, or give "
                f"JAX more than {_share_of_memory()} of it (an environment variable) and the VLM "
                "less (--cache_mib)"
            )


def _share_of_memory() -> str:
    """The environment variable that says what JAX may use, and its value; never both names."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    name = next((each for each in names if each in os.environ), names[1])
    return f"{name}={os.environ.get(name, '0.75')}"


def shardings(mesh: Mesh | None, arguments: str, results: str) -> dict[str, Any]:
    """Options of `jax.jit` for a function over batches.

    Args:
      mesh: from `make_mesh`.
      arguments: a letter for each: `w` whole on every device, `s` split by its first axis.
      results: likewise; a single letter is that of all results.
    """
    if mesh is None:
        return {}
    kinds = {
        "w": NamedSharding(mesh, PartitionSpec()),
        "s": NamedSharding(mesh, PartitionSpec(_AXIS)),
    }
    whole = kinds[results] if len(results) == 1 else tuple(kinds[each] for each in results)
    return {"in_shardings": tuple(kinds[each] for each in arguments), "out_shardings": whole}


def over_queries(function: Callable, mesh: Mesh | None = None) -> Callable:
    """`jax.vmap` of a function of one query; on one CPU, of eight queries at a time.

    What is computed of a few stays in the processor's cache from one step to the next: 64 queries
    with pools of 64 take a quarter less time. A query's results are then the same to the bit in
    every batch, whatever its size: it is always one of eight.

    Args:
      function: of arrays of one query, or trees of them.
      mesh: devices that share the queries.
    """
    if mesh is not None or jax.default_backend() != "cpu":
        return jax.vmap(function)

    def some_at_a_time(*batch):
        count = len(jax.tree.leaves(batch)[0])
        missing = -count % _AT_A_TIME

        def cut(x):
            return jnp.concatenate([x, jnp.repeat(x[-1:], missing, 0)]).reshape(
                -1, _AT_A_TIME, *x.shape[1:]
            )

        done = jax.lax.map(lambda few: jax.vmap(function)(*few), jax.tree.map(cut, batch))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], done)

    return some_at_a_time
