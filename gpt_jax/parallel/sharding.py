"""Which parameter is split along which axis: rules by path, each parameter matched by exactly one.

There is no catch-all: after a rename a catch-all would replicate silently; here the rename raises.
"""

import re
from typing import Any

import jax
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


def _check_divisible(mesh: Mesh, name: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(
                f'mesh.{axis}={mesh.shape[axis]} does not divide a dimension of {size} in {name} {shape}; '
                f'choose a mesh.{axis} that does'
            )
