"""Compiling a training step with the TPU compiler for devices that are not here, and reading what it says.

libtpu brings the compiler and needs no TPU for it. What it answers is no estimate: these are the buffers that the
program would have.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from gpt_jax.errors import InputError
from gpt_jax.parallel.devices import DEVICES, Device

EXAMPLES = 'v4:2x2x1, v5e:4x4, v5p:8x8x8, v6e:4x4'
# Read when libtpu is loaded: there is no TPU to ask, and others may have it loaded as well.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


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


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a topology such as 'v5p:8x8x8', none of which is here.

    Raises:
      InputError: libtpu is not installed, or knows no such topology.
    """
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
      jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    with quiet():
        lowered = lower()
        try:
            analysis = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
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
    """Silences libtpu, which writes to the process's standard error past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
