"""Trees of arrays in a checkpoint: what is stored, whether it is what the caller expects, and reading it.

orbax casts dtypes silently and reports a wrong shape or a missing leaf in many lines, so every leaf is compared by name
before anything is read.
"""

import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from gpt_jax.errors import InputError

ORBAX_FOLDER = str(pathlib.Path(ocp.__file__).parent)


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not record.pathname.startswith(ORBAX_FOLDER)


# orbax logs dozens of lines a save on the logger that the verbs use too; only its own lines below ERROR are dropped
absl_logging.get_absl_logger().addFilter(_not_orbax_chatter)


def storable(tree: Any) -> Any:
    """`tree` with its Python numbers as arrays, as `jax.eval_shape` would describe them.

    Raises TypeError, naming the leaf, for what would come back changed: no number, or 64 bits while jax works in 32.
    """

    def leaf(path: tuple, value: Any) -> Any:
        if isinstance(value, jax.Array):
            if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                raise TypeError(f'{_name(path)} is a typed random key and cannot be saved: use jax.random.key_data')
            return value
        if type(value) in (bool, int, float):
            return jnp.asarray(value)
        array = np.asarray(value)
        numeric = jnp.issubdtype(array.dtype, np.number) or array.dtype == bool
        if not numeric or jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise TypeError(f'{_name(path)} is {array.dtype} and cannot be saved: make it a jax array')
        return array

    return jax.tree_util.tree_map_with_path(leaf, tree)


def stored(step_folder: pathlib.Path, item: str) -> Any:
    """What the checkpoint holds under `item`: jax.ShapeDtypeStruct in plain dicts and lists, without shardings.

    None where the checkpoint has no such item. Nothing but metadata is read; the files are not verified here.
    """
    if not (step_folder / item).is_dir():
        return None
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**{item: ocp.StandardCheckpointHandler()})) as checkpointer:
        metadata = checkpointer.metadata(step_folder).item_metadata[item].tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)


def check(step_folder: pathlib.Path, item: str, expected: Any) -> None:
    """Compare names, shapes and dtypes of the tree `expected` with what the checkpoint holds under `item`.

    Raises InputError in one line that names the first leaf that differs.
    """
    there, here = _by_name(stored(step_folder, item)), _by_name(expected)
    where = f'{item} of checkpoint {step_folder}'
    if here and not there:
        raise InputError(f'checkpoint {step_folder} holds no {item}: it can start a run but not resume one')
    for name in here:
        if name not in there:
            raise InputError(f'{where}: {name} is not in it: use the config it was saved with')
    for name, leaf in there.items():
        if name not in here:
            raise InputError(f'{where}: {name} has no place in this model: use the config it was saved with')
        for what, saved, wanted in (('shape', leaf.shape, here[name].shape), ('dtype', leaf.dtype, here[name].dtype)):
            if saved != wanted:
                raise InputError(
                    f'{where}: {name} has {what} {saved}, this model needs {wanted}: use the config it was saved with'
                )


def read(step_folder: pathlib.Path, **items: Any) -> dict[str, Any]:
    """Read whole items into trees of jax arrays with the structure and shardings of the given abstract trees.

    A leaf without a sharding goes to the default device. The trees must have passed `check`; all items or none return.
    """
    items = {item: jax.tree.map(_placed, tree) for item, tree in items.items()}
    filled = {item: tree for item, tree in items.items() if jax.tree.leaves(tree)}
    handlers = {item: ocp.StandardCheckpointHandler() for item in filled}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        arguments = {item: ocp.args.StandardRestore(tree) for item, tree in filled.items()}
        restored = checkpointer.restore(step_folder, args=ocp.args.Composite(**arguments))
    return {item: restored[item] if item in filled else tree for item, tree in items.items()}


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, 'sharding', None) or jax.sharding.SingleDeviceSharding(default_device())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def default_device() -> jax.Device:
    """The device on which jax puts a new array; `jax_default_device` may hold a device or a platform's name."""
    device = jax.config.jax_default_device
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def _by_name(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path: tuple) -> str:
    # a NamedTuple or a flax struct comes back from orbax as a dict: its fields are told apart by name alone
    return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)
