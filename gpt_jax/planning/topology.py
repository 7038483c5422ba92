"""Compiling a training step for devices that are not here, and reading what the compiler says of it.

Three compilers do so: the TPU's (libtpu brings it and needs no TPU), the GPU's (in JAX's CUDA plugin, without a GPU or
its driver) and the CPU's. What they answer of memory is no estimate: these are the buffers that the program would have.
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

EXAMPLES = 'v5e:4x4, v5p:8x8x8, v6e:4x4; a100:8, h100:8, h200:8, b200:8, h100:4x8 (4 hosts of 8); cpu:8'
# Read when libtpu is loaded: there is no TPU to ask, and others may have it loaded as well.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
MOST_DEVICES = 4096  # simulated ones take threads and memory of this machine
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}

HOST_GPUS = 8  # that NVLink joins in a DGX or HGX of each of these kinds

# What the GPU compiler must know of a device: a GpuTargetConfigProto in text form, of which it reads these.
GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_of_core}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""
# Of NVIDIA's data sheets and architecture papers of the A100, H100, H200 and B200 (SXM), and of CUDA's table of compute
# capabilities; `kind` is what jax calls the device, `memory` about what the driver reports.
_AMPERE = {'shared': 166912, 'shared_of_core': 167936, 'cores': 108, 'units': 64, 'clock': 1.41, 'major': 8}
_HOPPER = {'shared': 232448, 'shared_of_core': 233472, 'cores': 132, 'units': 128, 'clock': 1.98, 'major': 9}
_BLACKWELL = _HOPPER | {'cores': 148, 'clock': 1.965, 'major': 10}
GPU_TARGETS = {
    'a100': _AMPERE | {'kind': 'NVIDIA A100-SXM4-80GB', 'memory': 84987740160, 'cache': 40 * 2**20},
    'h100': _HOPPER | {'kind': 'NVIDIA H100 80GB HBM3', 'memory': 84942979072, 'cache': 50 * 2**20},
    'h200': _HOPPER | {'kind': 'NVIDIA H200', 'memory': 150754820096, 'cache': 50 * 2**20},
    'b200': _BLACKWELL | {'kind': 'NVIDIA B200', 'memory': 191512969216, 'cache': 126 * 2**20},
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
      text: the program, where there is one.
    """

    arguments: int | None
    outputs: int | None
    temporaries: int | None
    needed: int
    available: int | None = None
    text: str | None = dataclasses.field(default=None, repr=False)


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
        raise InputError(f'--topology={printable(name, 60)} is not a kind and a number of devices, such as {EXAMPLES}')
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


def gpu_hosts(name: str) -> tuple[int, int]:
    """Hosts, and GPUs of each, of a topology of GPUs.

    'h100:4' is one host of 4, 'h100:32' are 4 hosts of 8. Of two numbers an 8 is that of a host's GPUs, wherever it
    stands, since these hosts have 8: 'h100:4x8' and 'h100:8x4' are both 4 hosts of 8. Without an 8 the first is hosts.

    Raises:
      InputError: a host would have more than 8, or not a whole number of them.
    """
    numbers = [int(count) for count in name.partition(':')[2].split('x')]
    if len(numbers) == 1:
        (count,) = numbers
        if count > HOST_GPUS and count % HOST_GPUS:
            raise InputError(
                f'--topology={name}: {count} GPUs are not whole hosts of {HOST_GPUS}; take a multiple, or say how many '
                'hosts have how many, such as h100:3x4'
            )
        return max(1, count // HOST_GPUS), min(count, HOST_GPUS)
    hosts, gpus = numbers
    if hosts == HOST_GPUS:
        hosts, gpus = gpus, hosts
    if gpus > HOST_GPUS:
        raise InputError(
            f'--topology={name}: a host has at most {HOST_GPUS} GPUs; write hosts x GPUs, such as h100:4x8'
        )
    return hosts, gpus


def torus(name: str) -> tuple[int, ...]:
    """Of a TPU slice its chips along each axis: 'v5p:8x8x16' -> (8, 8, 16); of other topologies nothing."""
    sizes = re.fullmatch(r'\d+(x\d+)+', name.partition(':')[2])
    return tuple(int(size) for size in sizes[0].split('x')) if sizes and topology_compiler(name) == 'tpu' else ()


def describe(name: str, count: int) -> str:
    """A topology in words: '32 GPUs: 4 hosts of 8', '1,024 chips: a torus of 8 x 8 x 16'."""
    match topology_compiler(name):
        case 'gpu':
            hosts, gpus = gpu_hosts(name)
            return f'{count:,} GPUs: {hosts:,} hosts of {gpus}' if hosts > 1 else f'{count:,} GPUs of a host'
        case 'tpu':
            sizes = ' x '.join(map(str, torus(name)))
            return f'{count:,} chips: {sizes}' if sizes else f'{count:,} chips'
    return f'{count:,} simulated devices'


def _gpu_devices(kind: str, counts: str) -> Sequence[jax.Device]:
    hosts, gpus = gpu_hosts(f'{kind}:{counts}')
    target = GPU_TARGETS[kind]
    text = GPU_TARGET.format(bandwidth=int(DEVICES[target['kind']].memory_bandwidth), **target)
    try:
        with quiet():
            return topologies.get_topology_desc(
                topology_name='', platform='cuda', target_config=text, topology=f'1x{hosts}x{gpus}'
            ).devices
    except Exception as error:  # jax has no type of its own for a missing plugin
        reason = str(error).split('\n')[0]
        raise InputError(
            f"--topology={kind}:{counts} needs JAX's CUDA plugin, which brings the GPU compiler: "
            f"pip install -e '.[gpu-aot]' ({reason})"
        ) from None


def _tpu_devices(name: str) -> Sequence[jax.Device]:
    if not re.fullmatch(r'v\w{1,8}:[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}', name):
        raise InputError(f'--topology={printable(name, 60)} is not a kind and its devices, such as {EXAMPLES}')
    if importlib.util.find_spec('libtpu') is None:
        raise InputError("--topology needs libtpu, the TPU compiler: pip install -e '.[tpu-aot]'")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # A v4 chip is two cores, which jax runs as one device unless told otherwise; it names v5p's chips so by itself.
    settings = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}
    try:
        with quiet():
            return topologies.get_topology_desc(platform='tpu', topology_name=name, **settings).devices
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
        try:
            compiled = lower().compile()
            analysis, text = compiled.memory_analysis(), compiled.as_text()
        except RuntimeError as error:  # JaxRuntimeError of the compiler, or of jax, which looks for cuDNN as it traces
            if 'cuDNN not found' in str(error):
                raise InputError(
                    "--topology: this GPU's attention needs cuDNN: pip install -e '.[gpu-aot]', or plan with "
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
    return Compiled(*parts, needed=sum(parts), text=text)


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
