"""What a device can do and hold: by the makers' data sheets, under jax's `device_kind`, and as it says itself."""

import contextlib
import dataclasses
import os
import pathlib

import jax

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

# Where Linux says how much memory the processes of a container may take.
CONTAINER_LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')


def memory_of(devices: list[jax.Device]) -> int:
    """Bytes that the devices have together: as they say, else by their data sheets; of CPU devices, the host's once."""
    if devices[0].platform == 'cpu':
        return host_memory()
    stated = [(device.memory_stats() or {}).get('bytes_limit') for device in devices]
    sheets = [DEVICES[device.device_kind].memory_bytes if device.device_kind in DEVICES else None for device in devices]
    return sum(stated or sheet or host_memory() for stated, sheet in zip(stated, sheets, strict=True))


def host_memory() -> int:
    """Bytes of the machine, or that the container may take of them."""
    found = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    for name in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not in a container, or "max": no limit
            found.append(int(pathlib.Path(name).read_text(encoding='ascii')))
    return min(found)
