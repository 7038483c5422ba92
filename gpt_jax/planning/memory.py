"""How much memory a training step takes on each device, estimated without compiling it.

What the state holds is known exactly: every array of it, split as the sharding rules say. The rest is counted from the
model itself, traced with one device's rows of a micro-batch (see `liveness`):

    gradients   float32, split like the parameters; twice with accumulation: the sum and the newest
    kept        what the forward pass leaves for the backward pass, by layer: with `scan_layers` the residuals that one
                layer's derivative asks for; unrolled, by how much one layer more raises the peak, since the compiler
                then merges across layers what is made twice
    working     the larger of two moments: a layer's backward pass beside its own parameters, and the final norm, the
                chunk of logits and the gradient of the head

With scanned layers all of these are held at once: the gradients of all layers are one array from the start. Unrolled,
gradients come as kept activations go: what counts is the larger of both ends of the backward pass.

Left out: what the compiler reserves for itself, communication buffers, and padding to the layout of a TPU's registers.
Activations are not taken to be split along `tensor`, which makes the estimate too high there.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.models import GPTConfig
from gpt_jax.models.gpt import Block, TokenInfo, run_layers
from gpt_jax.models.layers import layer_norm
from gpt_jax.models.losses import linear_cross_entropy
from gpt_jax.planning.liveness import Liveness, array_bytes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment when it holds the most; see above."""

    parameters: int
    optimizer: int
    gradients: int
    kept: int
    working: int
    batch: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def sharded_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded ShapeDtypeStructs on one device."""
    shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * itemsize for shape, itemsize in shapes)


def training_memory(
    config: GPTConfig,
    params: Any,
    optimizer: Any,
    mesh: Mapping[str, int],
    batch_size: int,
    accumulation_steps: int,
    cpu: bool = False,
) -> Memory:
    """The estimate for one device.

    Args:
      config: the model.
      params: its parameters as sharded ShapeDtypeStructs.
      optimizer: the rest of the training state, likewise.
      mesh: devices along each axis.
      batch_size: sequences a step, over all devices.
      accumulation_steps: micro-batches a step.
      cpu: as XLA's CPU backend does it, which has no arithmetic of 16 bits.
    """
    split = mesh['data'] * mesh['fsdp']
    rows = max(1, batch_size // accumulation_steps // split)
    kept_rows, kept_weights, layer_working = _layers(config, rows, cpu, mesh['fsdp'] > 1)
    # Residuals made of parameters alone (copies in the compute dtype) are split like these.
    kept = config.n_layer * (kept_rows / mesh['context'] + kept_weights / (mesh['fsdp'] * mesh['tensor']))
    working = max(layer_working, _head(config, rows, cpu)) / mesh['context']
    gradients = sharded_bytes(params)
    before = gradients if accumulation_steps > 1 else 0  # the sum so far
    if config.scan_layers:
        held = (before + gradients, kept, working)
    else:
        held = max((before, kept, working), (before + gradients, 0, 0), key=sum)
    tokens = 2 * 4 * batch_size // split * config.block_size // mesh['context']
    return Memory(sharded_bytes(params), sharded_bytes(optimizer), *map(int, held), tokens)


@functools.cache
def _layers(config: GPTConfig, rows: int, cpu: bool, gathered: bool) -> tuple[float, float, int]:
    """Kept by a layer because of its activations and because of its parameters, and a layer's working memory."""
    # Linear in the rows; what is there whatever their number is made of parameters.
    if config.scan_layers:
        one, two = _kept_of_scanned(config, 1, cpu), _kept_of_scanned(config, 2, cpu)
        kept, weights = (two - one) * rows, max(0.0, 2 * one - two)
        working = _working_of_scanned(config, rows, cpu, gathered)
    else:
        (one, working), (two, _) = _unrolled(config, rows, cpu), _unrolled(config, 2 * rows, cpu)
        kept, weights = two - one, max(0.0, 2 * one - two)
    if (config.scan_layers or gathered) and (cpu or config.dtype == jnp.float32):
        # Its parameters, cut out of the stack or gathered; in another dtype they are counted where they are converted.
        working += array_bytes(_chain(config, rows, 1, scan=False)[1])
    return kept, weights, working


@functools.cache
def _kept_of_scanned(config: GPTConfig, rows: int, cpu: bool) -> float:
    """Bytes that one scanned layer keeps: the residuals of the scan."""
    count = _period(config)
    chain, params, x_BTD = _chain(config, rows, count, scan=True)
    residuals = jax.make_jaxpr(lambda p, x: jax.tree.leaves(jax.vjp(chain, p, x)[1]))(params, x_BTD)
    return Liveness(residuals, cpu).results() / count


def _working_of_scanned(config: GPTConfig, rows: int, cpu: bool, gathered: bool) -> int:
    """Bytes that the backward pass of one scanned layer works with, besides what was kept for it."""
    # Gathered gradients are handed on, split again, layer by layer; others stay until their group is done.
    chain, layers, x_BTD = _chain(config, rows, 1 if gathered else _period(config), scan=False)
    pull = jax.eval_shape(lambda p, x: jax.vjp(chain, p, x)[1], layers, x_BTD)
    return Liveness(jax.make_jaxpr(lambda pull, dx: pull(dx))(pull, x_BTD), cpu).peak()


def _unrolled(config: GPTConfig, rows: int, cpu: bool) -> tuple[float, int]:
    """Bytes that one unrolled layer keeps, and those that the first one needs besides."""

    def peak(count: int) -> int:
        chain, layers, x_BTD = _chain(config, rows, count, scan=False)
        both = jax.make_jaxpr(lambda p, x, dx: jax.vjp(chain, p, x)[1](dx))(layers, x_BTD, x_BTD)
        return Liveness(both, cpu).peak()

    period = _period(config)
    one, two = peak(period), peak(2 * period)
    return (two - one) / period, max(0, 2 * one - two)


def _period(config: GPTConfig) -> int:
    return 2 if config.has_bands else 1


def _chain(config: GPTConfig, rows: int, count: int, scan: bool):
    """`count` layers as a function of their parameters and x; abstract parameters, stacked for a scan; abstract x."""
    few = dataclasses.replace(config, n_layer=count, scan_layers=scan)
    info = TokenInfo.of(jnp.zeros((rows, 1), jnp.int32), None, None)

    def block(x_BTD, layer_params, layer, band):
        rngs = {'dropout': jax.random.fold_in(jax.random.key(0), layer)}
        return Block(config, band, parent=None).apply({'params': layer_params}, x_BTD, info, rngs=rngs)

    first = functools.partial(Block(config, parent=None).init, jax.random.key(0))
    one = jax.eval_shape(first, jnp.zeros((rows, 1, config.d_model)), info)['params']
    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), one)
    x_BTD = jax.ShapeDtypeStruct((rows, config.block_size, config.d_model), config.dtype)
    return (lambda params, x: run_layers(few, block, params, x)), stacked if scan else (one,) * count, x_BTD


@functools.cache
def _head(config: GPTConfig, rows: int, cpu: bool) -> int:
    """Working memory of the final norm and the loss, forward and backward."""

    def loss(scale, bias, head_VD, x_BTD, targets_BT):
        normal = layer_norm(x_BTD, scale, bias, config.layer_norm_epsilon, config.dtype)
        return jnp.sum(linear_cross_entropy(normal, head_VD, targets_BT, config.vocab_size))

    width = jax.ShapeDtypeStruct((config.d_model,), jnp.float32)
    head_VD = jax.ShapeDtypeStruct((config.padded_vocab_size, config.d_model), jnp.float32)
    x_BTD = jax.ShapeDtypeStruct((rows, config.block_size, config.d_model), config.dtype)
    targets_BT = jax.ShapeDtypeStruct((rows, config.block_size), jnp.int32)
    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(width, width, head_VD, x_BTD, targets_BT)
    return Liveness(traced, cpu).peak()
