"""What known GPUs can do, from their data sheets: for plans and for shares of peak."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
      flops: peak of bfloat16 matrix products, dense (no sparsity), FLOP/s.
      memory: bytes.
      bandwidth: of its memory, bytes/s.
    """

    flops: float
    memory: float
    bandwidth: float


def _gpu(teraflops: float, gib: float, gigabytes: float) -> Device:
    return Device(teraflops * 1e12, gib * 2**30, gigabytes * 1e9)


DEVICES = {
    "b200": _gpu(2250, 180, 7700),
    "h200": _gpu(989, 141, 4800),
    "h100": _gpu(989, 80, 3350),
    "h100_pcie": _gpu(756, 80, 2000),
    "a100": _gpu(312, 80, 2039),
    "a100_40gb": _gpu(312, 40, 1555),
    "l40s": _gpu(362, 48, 864),
    "rtx6000_ada": _gpu(364, 48, 960),
    "a6000": _gpu(155, 48, 768),
    "rtx4090": _gpu(165, 24, 1008),
    "l4": _gpu(121, 24, 300),
    "cpu": _gpu(0.1, 16, 40),  # two server cores in float32; other CPUs differ widely
}
