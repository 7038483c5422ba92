"""What the makers' data sheets say of accelerators: peak arithmetic and memory, by jax's `device_kind`."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as jax counts them.

    Attributes:
      peak_flops: dense bf16 matrix arithmetic, FLOP/s.
      memory_bytes: of its fast memory.
    """

    peak_flops: float
    memory_bytes: int


DEVICES = {
    'NVIDIA A100-SXM4-40GB': Device(312e12, 40 * GIB),
    'NVIDIA A100-SXM4-80GB': Device(312e12, 80 * GIB),
    'NVIDIA H100 80GB HBM3': Device(989e12, 80 * GIB),
    'NVIDIA H200': Device(989e12, 141 * 10**9),
    'TPU v4': Device(275e12, 32 * GIB),
    'TPU v5 lite': Device(197e12, 16 * GIB),
    'TPU v5': Device(459e12, 95 * GIB),
    'TPU v5p': Device(459e12, 95 * GIB),
    'TPU v6 lite': Device(918e12, 32 * GIB),
}
