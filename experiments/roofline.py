"""The least time that a machine needs for a computation, whatever program does it.

Williams, Waterman & Patterson, Roofline, 2009: no program is faster than its arithmetic at the
machine's rate, nor than what it must read and write at the memory's. Counted are the products of
matrices, which no library saves, and the arguments and results, each moved once. What a rival
needs at present, divided by the least time, is the most that any program with these products could
win against it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import torch

from lever_jax.errors import InputError
from qwen_bridge.benchmark import clock

_COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes; far beyond any cache
_REPEATS = 5


class Machine(NamedTuple):
    """What bounds every program.

    Attributes:
      flops: FLOP/s of a large float32 product of matrices, by PyTorch.
      bandwidth: bytes/s read and written by a large copy, by PyTorch.
    """

    flops: float
    bandwidth: float


class Work(NamedTuple):
    """What a computation cannot do without: FLOPs of its products, bytes of its arrays."""

    flops: int
    bytes: int

    def least_seconds(self, machine: Machine) -> float:
        """max(FLOPs / FLOP rate, bytes / bandwidth)."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


def figures(work: Work | None, device: torch.device, seconds: np.ndarray) -> dict[str, object]:
    """What a benchmark says of a cell; the device is measured now, as fast as it is at present.

    Args:
      work: of the cell; None where nothing bounds it, and the figures are None.
      device: that did it.
      seconds: [rounds] that ours took.

    Returns:
      `machine`, its rates; `least_seconds`, that no program can do without; `share_of_roofline`,
      the median over rounds of the least seconds by ours.
    """
    machine = measure(device)
    least = work and work.least_seconds(machine)
    share = least and float(np.median(least / seconds))
    return {"machine": machine._asdict(), "least_seconds": least, "share_of_roofline": share}


def measure(device: torch.device) -> Machine:
    """The rates of a device, the best of a few trials each; on a CPU of one thread."""
    source = torch.zeros(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copied = min(clock.seconds(device, lambda: target.copy_(source)) for _ in range(_REPEATS))
    return Machine(clock.peak_flops(device, torch.float32), 2 * _COPIED[device.type] / copied)


def work_of(function: Callable, *arguments) -> Work:
    """What a function that JAX traces has to do for these arguments.

    Products are counted in what is traced, before a compiler sees it; each of M x K by K x N has
    2 M K N FLOPs. What several callers compute alike counts as often as they do.

    Raises:
      InputError: a product stands in a loop whose length is not known beforehand.
    """
    traced = jax.make_jaxpr(function)(*arguments)
    moved = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    return Work(_products(traced.jaxpr), sum(x.size * x.dtype.itemsize for x in moved))


def _products(jaxpr) -> int:
    return sum(_products_of(equation) for equation in jaxpr.eqns)


def _products_of(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * inner * math.prod(equation.outvars[0].aval.shape)
    parts = [_products(each) for value in params.values() for each in _programs(value)]
    if name == "scan":
        return params["length"] * sum(parts)
    if name == "cond":
        return max(parts)
    if name == "while" and any(parts):
        raise InputError("products in a loop of unknown length cannot be counted")
    return sum(parts)


def _programs(value) -> list:
    """The traced programs in a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [program for each in value for program in _programs(each)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []
