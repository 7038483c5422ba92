"""What a device can do and hold: by the makers' data sheets, under jax's `device_kind`, and as it says itself."""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as jax counts them.

    Attributes:
      peak_flops: dense bf16 matrix arithmetic, FLOP/s.
      memory_bytes: of its fast memory.
      memory_bandwidth: of that memory, bytes/s.
      link_bandwidth: bytes/s that a device sends: a TPU along one axis of its torus, both ways together; a GPU to the
        others of its host.
      per_host: GPUs that one NVLink switch joins; None: the slice of a TPU is one fabric.
      network_bandwidth: bytes/s that a GPU has of its host's network.
    """

    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    per_host: int | None = None
    network_bandwidth: float | None = None


# GPUs: NVIDIA's data sheets of the A100, H100, H200 and B200 (dense bf16; NVLink counts both directions, half of it is
# what one sends) and of DGX A100 (a 200 Gbit/s port a GPU), H100, H200 and B200 (400 Gbit/s).
# TPUs: cloud.google.com/tpu/docs, the pages of each version (bf16, HBM, its bandwidth); links as "How To Scale Your
# Model" (jax-ml.github.io/scaling-book, chapter 2) measured them: 45 GB/s a link and direction, v5p and v6e 90.
DEVICES = {
    'NVIDIA A100-SXM4-40GB': Device(312e12, 40 * GIB, 1.555e12, 300e9, 8, 25e9),
    'NVIDIA A100-SXM4-80GB': Device(312e12, 80 * GIB, 2.039e12, 300e9, 8, 25e9),
    'NVIDIA H100 80GB HBM3': Device(989e12, 80 * GIB, 3.35e12, 450e9, 8, 50e9),
    'NVIDIA H200': Device(989e12, 141 * 10**9, 4.8e12, 450e9, 8, 50e9),
    'NVIDIA B200': Device(2250e12, 180 * 10**9, 7.7e12, 900e9, 8, 50e9),
    'TPU v4': Device(275e12, 32 * GIB, 1.228e12, 90e9),
    'TPU v5 lite': Device(197e12, 16 * GIB, 0.819e12, 90e9),
    'TPU v5': Device(459e12, 95 * GIB, 2.765e12, 180e9),
    'TPU v5p': Device(459e12, 95 * GIB, 2.765e12, 180e9),
    'TPU v6 lite': Device(918e12, 32 * GIB, 1.64e12, 180e9),
}


def ring_bandwidth(device: Device, group: int, hosts: int, devices: int, torus: Sequence[int] = ()) -> float | None:
    """Bytes/s that each of `group` devices can send in a collective among them; None where it is not known.

    A TPU sends along as many axes of the torus as the group spans: all of them where it is the whole slice, fewer in
    proportion to the logarithm of its size. GPUs of one host have NVLink; a group of `hosts` has the network ports of
    those of its members that stand beside each other, at most as fast as NVLink.
    """
    if device.link_bandwidth is None:
        return None
    if hosts > 1:
        return min(device.link_bandwidth, group / hosts * device.network_bandwidth)
    if device.per_host is not None or group <= 1 or devices <= 1:
        return device.link_bandwidth
    axes = sum(size > 1 for size in torus) or 2
    return device.link_bandwidth * max(1, round(axes * math.log(group) / math.log(devices)))


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
