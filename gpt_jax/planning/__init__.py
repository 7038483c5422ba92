"""What a training would need, found out before it is started: memory, arithmetic, time, money."""

from gpt_jax.planning.memory import Memory, Placement, advice, training_memory
from gpt_jax.planning.report import (
    advice_section,
    cache_section,
    compiled_section,
    cost_section,
    memory_section,
    model_section,
    render,
)
from gpt_jax.planning.topology import Compiled, compile_step, find_device, topology_compiler, topology_devices

__all__ = [
    'Compiled',
    'Memory',
    'Placement',
    'advice',
    'advice_section',
    'cache_section',
    'compile_step',
    'compiled_section',
    'cost_section',
    'find_device',
    'memory_section',
    'model_section',
    'render',
    'topology_compiler',
    'topology_devices',
    'training_memory',
]
