"""Spreads batches of query groups over the local devices: each computes its share of the queries.

Parameters and embeddings lie whole on every device, and the gradient is summed over devices by
XLA. With one device there is no mesh (`None`).
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lever_jax.errors import InputError

MODES = ("auto", "off")
_AXIS = "queries"


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


def replicated(mesh: Mesh | None, tree: Any) -> Any:
    """The arrays of a tree, whole on every device.

    With one device they are committed to it all the same, as those of a checkpoint may be: a
    function is compiled anew for arrays that are not.
    """
    place = jax.local_devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.device_put(tree, place)


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
