"""Which parameter is split along which axis: rules by path, each parameter matched by exactly one.

There is no catch-all: after a rename a catch-all would replicate silently; here the rename raises.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.errors import InputError

# Paths as in the parameter tree, '/' between names. The leading dimension of every block parameter is the layer.
# 'fsdp' takes a model dimension of every matrix; 'tensor' takes heads, the MLP's width and the vocabulary.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r'wte', PartitionSpec('tensor', 'fsdp')),  # [vocab, d_model]
    (r'wpe', PartitionSpec(None, 'fsdp')),  # [time, d_model]
    (r'lm_head', PartitionSpec('tensor', 'fsdp')),  # [vocab, d_model]
    (r'ln_f/(scale|bias)', PartitionSpec(None)),  # [d_model]
    (r'blocks/ln_[12]/(scale|bias)', PartitionSpec(None, None)),  # [layer, d_model]
    (r'blocks/attention/qkv/kernel', PartitionSpec(None, 'fsdp', None, 'tensor', None)),  # [layer, d_model, 3, N, K]
    (r'blocks/attention/qkv/bias', PartitionSpec(None, None, 'tensor', None)),  # [layer, 3, N, K]
    (r'blocks/attention/out/kernel', PartitionSpec(None, 'tensor', None, 'fsdp')),  # [layer, N, K, d_model]
    (r'blocks/attention/out/bias', PartitionSpec(None, None)),  # [layer, d_model]
    (r'blocks/mlp/up/kernel', PartitionSpec(None, 'fsdp', 'tensor')),  # [layer, d_model, mlp]
    (r'blocks/mlp/up/bias', PartitionSpec(None, 'tensor')),  # [layer, mlp]
    (r'blocks/mlp/down/kernel', PartitionSpec(None, 'tensor', 'fsdp')),  # [layer, mlp, d_model]
    (r'blocks/mlp/down/bias', PartitionSpec(None, None)),  # [layer, d_model]
)


def path_name(path: tuple[Any, ...]) -> str:
    """`jax.tree_util` key path -> 'blocks/mlp/up/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def parameter_spec(name: str) -> PartitionSpec:
    """The partition of the parameter called `name`.

    Raises:
      ValueError: no rule matches the name, or more than one.
    """
    found = [spec for pattern, spec in PARAMETER_RULES if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise ValueError(f'parameter {name!r} is matched by {len(found)} sharding rules, not by exactly one')
    return found[0]


def tree_shardings(mesh: Mesh, params: Any, tree: Any) -> Any:
    """A NamedSharding for each leaf of `tree`, whose leaves are arrays or ShapeDtypeStructs.

    Optimizer state holds whole copies of the parameter tree (Adam's moments): a leaf whose path ends in a parameter's
    path, with its shape, is split like that parameter; every other leaf (counters, scales) is replicated.

    Raises:
      InputError: a dimension cannot be divided by its mesh axes.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    specs = {name: parameter_spec(name) for name in shapes}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = path_name(path).split('/')
        for start in range(len(names)):
            name = '/'.join(names[start:])
            if shapes.get(name) == leaf.shape:
                _check_divisible(mesh, name, leaf.shape, specs[name])
                return NamedSharding(mesh, specs[name])
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of token arrays [batch, time]: rows over the data axes, time over 'context'."""
    return NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), 'context'))


def global_batch(
    rows: Callable[[int, int], dict[str, np.ndarray]], shape: tuple[int, int], mesh: Mesh
) -> dict[str, jax.Array]:
    """A batch over all devices of `mesh`, of which every process makes the rows that its own devices hold.

    Devices of several processes hold the same rows where 'tensor' or 'context' spans processes. Each asks for them by
    their number in the whole batch, so that they are the same whatever process holds which device.

    Args:
      rows: (start, stop) -> named arrays [stop - start, time], the rows [start, stop) of the whole batch.
      shape: [batch, time] of the whole batch.
      mesh: the devices; `batch_sharding` says what each holds.
    """
    sharding = batch_sharding(mesh)
    parts = sharding.addressable_devices_indices_map(shape).values()
    spans = {rows_of_part.indices(shape[0])[:2] for rows_of_part, _ in parts}
    made = {span: rows(*span) for span in sorted(spans)}  # once, however many devices here hold them

    def array(name: str) -> jax.Array:
        return jax.make_array_from_callback(
            shape, sharding, lambda part: made[part[0].indices(shape[0])[:2]][name][:, part[1]]
        )

    return {name: array(name) for name in next(iter(made.values()))}


def _check_divisible(mesh: Mesh, name: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(
                f'mesh.{axis}={mesh.shape[axis]} does not divide a dimension of {size} in {name} {shape}; '
                f'choose a mesh.{axis} that does'
            )
