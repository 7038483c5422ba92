"""Compiling a training step for devices that are not here, and reading what the compiler says of its memory.

Three compilers do so: the TPU's (libtpu brings it and needs no TPU), the GPU's (in JAX's CUDA plugin, without a GPU or
its driver) and the CPU's. What they answer is no estimate: these are the buffers that the program would have.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from gpt_jax.errors import InputError, printable
from gpt_jax.parallel.devices import DEVICES, Device

EXAMPLES = 'v4:2x2x1, v5e:4x4, v5p:8x8x8, v6e:4x4; h100:8 or h100:4x8 (hosts x GPUs); cpu:8'
# Read when libtpu is loaded: there is no TPU to ask, and others may have it loaded as well.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
MOST_DEVICES = 4096  # simulated ones take threads and memory of this machine
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}

# What the GPU compiler must know of a device: a GpuTargetConfigProto in text form. Figures of NVIDIA's H100 SXM data
# sheet and of CUDA's table of compute capabilities; device_description_str is what jax calls the device.
GPU_TARGETS = {
    'h100': """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of the program, in bytes on each device.

    Attributes:
      arguments: what goes in: the state and the batch.
      outputs: what comes out and is not written over an argument.
      temporaries: what it holds in between.
      needed: all of it; where it does not fit, what the compiler says is required.
      available: where it does not fit, what the device has; None where it fits.
    """

    arguments: int | None
    outputs: int | None
    temporaries: int | None
    needed: int
    available: int | None = None


def find_device(kind: str | None, known: bool = True) -> Device | None:
    """What is known of a kind of device; None where none is named.

    Raises:
      InputError: nothing is known of this kind, and it must be `known`.
    """
    if kind is None or kind in DEVICES or not known:
        return DEVICES.get(kind)
    raise InputError(f'--device_kind={kind} is not one of {", ".join(DEVICES)}; leave it out and give --peak_tflops')


def topology_compiler(name: str) -> str:
    """Whose compiler a topology asks for: 'cpu', 'gpu' or 'tpu'."""
    kind = name.partition(':')[0]
    return 'cpu' if kind == 'cpu' else 'gpu' if kind in GPU_TARGETS else 'tpu'


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a topology such as 'v5p:8x8x8', 'h100:8' or 'cpu:8'; none need be here.

    Raises:
      InputError: the compiler is not installed, or knows no such topology.
    """
    compiler = topology_compiler(name)
    if compiler == 'tpu':
        return _tpu_devices(name)
    kind, _, counts = name.partition(':')
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)?', counts) or (compiler == 'cpu' and 'x' in counts):
        raise InputError(f'--topology={name} is not a kind and a number of devices, such as {EXAMPLES}')
    if math.prod(int(count[:9]) for count in counts.split('x')) > MOST_DEVICES:
        raise InputError(f'--topology={printable(name, 60)}: at most {MOST_DEVICES:,} devices can be compiled for here')
    if compiler == 'gpu':
        return _gpu_devices(kind, counts)
    with contextlib.suppress(RuntimeError):  # too late: what is here must do
        jax.config.update('jax_num_cpu_devices', int(counts))
    devices = jax.devices('cpu')
    if len(devices) < int(counts):
        raise InputError(f'--topology={name}: this process has {len(devices)} CPU devices; start another one')
    return devices[: int(counts)]


def _gpu_devices(kind: str, counts: str) -> Sequence[jax.Device]:
    hosts, _, gpus = counts.rpartition('x')
    try:
        with quiet():
            return topologies.get_topology_desc(
                topology_name='', platform='cuda', target_config=GPU_TARGETS[kind], topology=f'1x{hosts or 1}x{gpus}'
            ).devices
    except Exception as error:  # jax has no type of its own for a missing plugin
        reason = str(error).split('\n')[0]
        raise InputError(
            f"--topology={kind}:{counts} needs JAX's CUDA plugin, which brings the GPU compiler: "
            f"pip install -e '.[cuda12]' ({reason})"
        ) from None


def _tpu_devices(name: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec('libtpu') is None:
        raise InputError("--topology needs libtpu, the TPU compiler: pip install -e '.[tpu-aot]'")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        with quiet():
            return topologies.get_topology_desc(platform='tpu', topology_name=name).devices
    except Exception as error:  # libtpu has no type of its own for a bad name
        reason = str(error).split('\n')[0].removeprefix('INVALID_ARGUMENT: ')
        raise InputError(f'--topology={name} is not one of the TPU compiler (such as {EXAMPLES}): {reason}') from None


def compile_step(lower: Callable[[], Any]) -> Compiled:
    """Compiles what `lower` lowers.

    Raises:
      InputError: the GPU compiler lacks cuDNN.
      jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    with quiet():
        lowered = lower()
        try:
            analysis = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if 'cuDNN not found' in str(error):
                raise InputError(
                    "--topology: this GPU's attention needs cuDNN: pip install -e '.[cuda12]', or plan with "
                    '--config.precision.compute=f32'
                ) from None
            refused = parse_refusal(str(error))
            if refused is None:
                raise
            return refused
    parts = (
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
    )
    return Compiled(*parts, needed=sum(parts))


def parse_refusal(message: str) -> Compiled | None:
    """The sizes in the compiler's error about memory; None where it is about something else."""
    found = re.search(
        r'memory required.*?\((\d[\d.]*)([KMGT]?)\) exceeds available HBM \((\d[\d.]*)([KMGT]?)\)', message
    )
    if not found:
        found = re.search(r'Used (\d[\d.]*)([KMGT]?) of (\d[\d.]*)([KMGT]?) hbm', message)
    if not found:
        return None
    needed, available = (int(float(found[i]) * UNITS[found[i + 1]]) for i in (1, 3))
    temporaries = needed if 'HLO temporaries' in message else None
    return Compiled(None, None, temporaries, needed, available)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the compilers, which write to the process's standard error past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
