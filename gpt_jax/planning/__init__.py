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
    search_section,
)
from gpt_jax.planning.search import Candidate, next_smaller, search
from gpt_jax.planning.topology import (
    Compiled,
    compile_step,
    find_device,
    gpu_hosts,
    topology_compiler,
    topology_devices,
    torus,
)

__all__ = [
    'Candidate',
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
    'gpu_hosts',
    'memory_section',
    'model_section',
    'next_smaller',
    'render',
    'search',
    'search_section',
    'topology_compiler',
    'topology_devices',
    'torus',
    'training_memory',
]
