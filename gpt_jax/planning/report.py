"""What a plan says, as nested dicts of numbers whose names carry the unit."""

import dataclasses
from typing import Any

from gpt_jax.models.config import causal_flops_per_token, parameters_by_part, training_flops_per_token
from gpt_jax.planning.cost import cache_bytes, training_cost
from gpt_jax.planning.memory import Memory
from gpt_jax.planning.setup import Setup
from gpt_jax.planning.topology import Compiled


def model_section(setup: Setup, tokens: int | None) -> dict[str, Any]:
    """Counts of parameters and of arithmetic."""
    config = setup.config
    parts = parameters_by_part(config)
    embeddings = parts['token embedding'] + parts['position embedding']
    flops = training_flops_per_token(config)
    return {
        'parameters': {
            'total': config.num_parameters,
            'non_embedding': config.num_parameters - embeddings,
            'parts': parts,
        },
        'training_flops': {
            'per_token': flops,
            'per_token_causal': causal_flops_per_token(config),
            'tokens': tokens,
            'total': None if tokens is None else flops * tokens,
        },
    }


def memory_section(setup: Setup, memory: Memory, limit: int | None) -> dict[str, Any]:
    """Bytes on one device."""
    return {
        'devices': setup.devices,
        'mesh': {axis: getattr(setup.mesh, axis) for axis in ('data', 'fsdp', 'tensor', 'context')},
        'rows_per_device': setup.rows,
        'accumulation_steps': setup.accumulation_steps,
        'remat': setup.config.remat,
        'compute': setup.config.compute_dtype,
        'parameters_bytes': memory.parameters,
        'optimizer_bytes': memory.optimizer,
        'gradients_bytes': memory.gradients,
        'kept_activations_bytes': memory.kept,
        'working_bytes': memory.working,
        'batch_bytes': memory.batch,
        'total_bytes': memory.total,
        'device_bytes': limit,
    }


def cache_section(setup: Setup, batch: int, length: int) -> dict[str, Any]:
    """Bytes of the key-value cache in decoding."""
    banded, dense = cache_bytes(setup.config, batch, length)
    return {'batch': batch, 'length': length, 'bytes': banded, 'dense_bytes': dense}


def cost_section(
    setup: Setup, flops: float | None, peak_flops: float | None, mfu: float, dollars_per_hour: float | None
) -> dict[str, Any] | None:
    """Time and money; None where the arithmetic or the devices' peak is not known."""
    if flops is None or peak_flops is None:
        return None
    cost = training_cost(flops, setup.devices, peak_flops, mfu, dollars_per_hour)
    given = {'peak_flops_per_second': peak_flops, 'mfu': mfu, 'dollars_per_device_hour': dollars_per_hour}
    return dataclasses.asdict(cost) | given


def compiled_section(topology: str, compiled: Compiled) -> dict[str, Any]:
    """What the compiler said, in bytes on each device."""
    sizes = {f'{name}_bytes': size for name, size in dataclasses.asdict(compiled).items()}
    return {'topology': topology, 'fits': compiled.available is None} | sizes


def advice_section(setup: Setup, found: list[tuple[Setup, Memory]], fits: bool) -> dict[str, Any]:
    """Changes that would make it fit by the estimate, or the smallest that they can make it."""
    changes = [
        {'flags': changed.flags(setup), 'total_bytes': memory.total, 'rows_per_device': changed.rows}
        for changed, memory in found
    ]
    return {'fits': fits, 'changes': changes}
