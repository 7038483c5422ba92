"""What devices can do: peak arithmetic and memory, from the makers' data sheets and from the devices themselves."""

import contextlib
import dataclasses
import os
import pathlib

import jax

GIB = 2**30

# What a container may have, in the two versions of Linux's control groups.
CGROUP_LIMITS = tuple(pathlib.Path('/sys/fs/cgroup', name) for name in ('memory.max', 'memory/memory.limit_in_bytes'))


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


def memory_bytes(device: jax.Device) -> int | None:
    """What a device has for programs and arrays; None where nothing says so.

    CPU devices share the memory of their host, or what its container may have: each counts with its part.
    """
    if device.platform != 'cpu':
        reported = (device.memory_stats() or {}).get('bytes_limit')
        known = DEVICES.get(device.device_kind)
        return reported or (known and known.memory_bytes)
    try:
        host = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (ValueError, OSError):
        return None
    for limit in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # another version of cgroups, or 'max': no limit
            host = min(host, int(limit.read_text()))
    return host // jax.local_device_count()
