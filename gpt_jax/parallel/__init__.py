"""The ground floor: the device mesh, what is sharded along which axis, and constraints on activations."""

from gpt_jax.config import MeshConfig
from gpt_jax.parallel.mesh import (
    AXES,
    activate,
    axis_sizes,
    can_split,
    constrain,
    current_mesh,
    make_abstract_mesh,
    make_mesh,
    on_one_device,
    parse_mesh,
    per_device,
    split_axes,
    splits,
    target_device,
)
from gpt_jax.parallel.sharding import (
    batch_sharding,
    global_batch,
    parameter_spec,
    path_name,
    replicated,
    tree_shardings,
)

__all__ = [
    'AXES',
    'MeshConfig',
    'activate',
    'axis_sizes',
    'batch_sharding',
    'can_split',
    'constrain',
    'current_mesh',
    'global_batch',
    'make_abstract_mesh',
    'make_mesh',
    'on_one_device',
    'parameter_spec',
    'parse_mesh',
    'path_name',
    'per_device',
    'replicated',
    'split_axes',
    'splits',
    'target_device',
    'tree_shardings',
]
