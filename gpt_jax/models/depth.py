"""Running the layers one after another: as one scan or unrolled, keeping all activations or making some again."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.models import attention
from gpt_jax.models.config import GPTConfig

Params = dict[str, Any]


def run_layers(config: GPTConfig, block: Callable, blocks: Params | tuple[Params, ...], x_BTD: jax.Array) -> jax.Array:
    """x after all layers.

    With `scan_layers` one scan runs over groups of layers of the pattern's period: a scan's body is one program, and
    dense and banded layers are not the same one. What does not fill a group runs after it.

    Args:
      config: says how the layers are run.
      block: (x, parameters of a layer, its index, its band) -> (x, None).
      blocks: parameters stacked over the layers, or a tuple of one tree a layer, which is never scanned.
      x_BTD: what goes into the first layer.
    """
    if not config.scan_layers or isinstance(blocks, tuple):
        one = _layer(config, block, prevent_cse=True)
        for layer, layer_params in enumerate(layer_trees(blocks, config.n_layer)):
            x_BTD = one(x_BTD, layer_params, layer, config.band(layer))
        return x_BTD
    period = 2 if config.has_bands else 1
    groups = config.n_layer // period
    one = _layer(config, block, prevent_cse=False)

    def group(x_BTD, inputs):
        group_params, first = inputs
        for offset, layer_params in enumerate(group_params):
            x_BTD = one(x_BTD, layer_params, first + offset, config.band(offset))
        return x_BTD, None

    # One tree for each place in a group. What the scan itself slices is there for the backward pass; a slice of such a
    # slice would be stored once more, for all layers.
    places = [slice(offset, groups * period, period) for offset in range(period)]
    grouped = tuple(blocks if period == 1 else jax.tree.map(operator.itemgetter(place), blocks) for place in places)
    x_BTD, _ = jax.lax.scan(group, x_BTD, (grouped, jnp.arange(groups) * period))
    if config.n_layer % period:
        last = config.n_layer - 1
        x_BTD = one(x_BTD, jax.tree.map(lambda a: a[last], blocks), last, config.band(last))
    return x_BTD


def _layer(config: GPTConfig, block: Callable, prevent_cse: bool) -> Callable:
    """`block` without its cache, under the policy of `config.remat`."""

    def one(x_BTD, layer_params, layer, band):
        def run(x_BTD, layer_params, layer):
            return block(x_BTD, layer_params, layer, band)[0]

        if config.remat != 'none':
            # In a scan the compiler cannot undo the work of rematerialisation, and need not be hindered from it.
            run = jax.checkpoint(run, policy=_policy(config.remat), prevent_cse=prevent_cse)
        return run(x_BTD, layer_params, layer)

    return one


def _policy(remat: str) -> Callable:
    policies = jax.checkpoint_policies
    return {
        'dots': policies.dots_with_no_batch_dims_saveable,
        'names': policies.save_only_these_names(*attention.SAVED_NAMES),
        'full': policies.nothing_saveable,
    }[remat]


def stack_layers(params: Params) -> Params:
    """The tree that is stored: `blocks` a tuple of one tree a layer -> one tree of arrays [n_layer, ...]."""
    return params | {'blocks': jax.tree.map(lambda *layers: jnp.stack(layers), *params['blocks'])}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`; `apply` takes both forms, and a decoding loop is faster on this one."""
    n_layer = jax.tree.leaves(params['blocks'])[0].shape[0]
    return params | {'blocks': layer_trees(params['blocks'], n_layer)}


def layer_trees(blocks: Params | tuple[Params, ...], count: int) -> tuple[Params, ...]:
    """One tree for each of `count` layers; a tuple of trees stays as it is."""
    if isinstance(blocks, tuple):
        return blocks
    arrays, treedef = jax.tree.flatten(blocks)
    columns = [_unstack_array(count)(array) for array in arrays]
    return tuple(jax.tree.unflatten(treedef, layer) for layer in zip(*columns, strict=True))


def _unstack_array(n_layer: int):
    """[n_layer, ...] -> tuple of [...], whose gradient is one stack instead of a sum of n_layer padded arrays."""

    @jax.custom_vjp
    def unstack(array):
        return tuple(array[i] for i in range(n_layer))

    unstack.defvjp(lambda array: (unstack(array), None), lambda _, gradients: (jnp.stack(gradients),))
    return unstack
