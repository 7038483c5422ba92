"""What a run's first state is read from: a checkpoint of its own or of another run, or the weights of another model."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh

from gpt_jax.checkpoints import PretrainedWeights, fingerprint, load
from gpt_jax.checkpoints.loading import check_tree, read_items, stored_shapes
from gpt_jax.errors import InputError
from gpt_jax.parallel import replicated, tree_shardings
from gpt_jax.training.optimizer import as_f32
from gpt_jax.training.step import TrainState


def restore_state(
    folder: pathlib.Path, abstract: TrainState, mesh: Mesh, read: Callable[[Any, Any], tuple[Any, Any]]
) -> TrainState:
    """The state of a checkpoint, which `recover` or `find_run` has verified, on the devices of a mesh.

    What the checkpoint does not hold, since it is older or a key was unset then, begins here.

    Args:
      folder: of the step.
      abstract: the state as `step.abstract_state` describes it.
      mesh: its devices.
      read: fills the trees of the parameters and of the optimizer: `(params, optimizer)`.

    Raises:
      InputError: structure, a shape or a dtype differs, or a file cannot be read.
    """
    wanted = abstract.optimizer
    stored, fresh = stored_shapes(folder, 'optimizer') or {}, {}
    for name in ('skipped_in_a_row', 'spikes', 'loss_scale'):
        if name not in stored:
            fresh[name] = wanted.pop(name)
        elif _layout(stored[name]) != _layout(wanted[name]):
            # What has another size now is read, since a checkpoint is read whole, and left.
            fresh[name] = wanted[name]
            wanted[name] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), stored[name]
            )
    params, optimizer = read(abstract.params, wanted)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    begun = {'loss_scale': DynamicScale()} if fresh.get('loss_scale') else {}
    optimizer |= jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fresh) | begun,
        out_shardings=shardings,
    )()
    ema = None
    if abstract.ema is not None and stored_shapes(folder, 'ema') is not None:
        check_tree(folder, 'ema', abstract.ema)
        ema = read_items(folder, ema=abstract.ema)['ema']
    elif abstract.ema is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.ema)
        ema = jax.jit(lambda params: jax.tree.map(jnp.copy, as_f32(params)), out_shardings=shardings)(params)
    return TrainState.join(params, optimizer, ema)


def _layout(tree: Any) -> list[tuple]:
    """Shapes and types of a tree's arrays, whatever classes hold them."""
    return sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree))


def initial_params(weights: PretrainedWeights, mesh: Mesh, block_size: int) -> tuple[Any, dict[str, Any], str]:
    """The parameters that `train.init_from` names, on the devices of a mesh, with the first `block_size` positions.

    Returns:
      The parameters; what checkpoints record of them; what they are, in a few words.

    Raises:
      InputError: a file is missing or damaged.
    """
    try:
        loaded = load(weights.found, sharding=lambda tree: tree_shardings(mesh, tree, tree))
    except InputError as error:
        raise InputError(f'train.init_from={weights.path}: {error}') from None
    from_huggingface = weights.found.huggingface
    record = {
        'path': weights.path,
        'step': None if from_huggingface else loaded.step,
        'model': dataclasses.asdict(weights.model),
        'sha256': fingerprint(loaded),
    }
    what = 'a Hugging Face directory' if from_huggingface else f'step {loaded.step}'
    params, positions = loaded.params, len(loaded.params['wpe'])
    if block_size < positions:
        what += f', the first {block_size} of its {positions} positions'
        cut = jax.jit(lambda wpe_TD: wpe_TD[:block_size], out_shardings=params['wpe'].sharding)
        params['wpe'] = cut(params['wpe'])
    return params, record, what
