"""The decode engine: a model made ready for generating, and the two programs that all strategies are made of.

    engine = Engine(model, params)
    logits_BV, seen = engine.prefill(prompts, room=64)      # prompts of any lengths, as one batch
    logits_BV, seen = engine.step(seen, tokens_B)           # donates `seen`: use what it returns
    seen = seen.rows(order)                                 # repeats or reorders the sequences of the batch

`read` is `step` for several tokens a row, for use inside other compiled programs as well (`decode.py`,
`speculative.py`). Compiled programs are shared by all engines of a model; their sizes come from `buckets.py`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.inference.buckets import batch_bucket, bucket
from gpt_jax.models import GPT, unstack_layers
from gpt_jax.models.cache import Cache, take_rows, truncate
from gpt_jax.models.config import COMPUTE_DTYPES
from gpt_jax.models.layers import transpose_kernels
from gpt_jax.parallel import activate, path_name, tree_shardings


@flax.struct.dataclass
class Seen:
    """What the model has read of each sequence of a batch.

    Attributes:
      cache: keys and values (models/cache.py).
      lengths_B: int32 [batch], tokens read so far: the position of the next one.
    """

    cache: Cache
    lengths_B: jax.Array

    def rows(self, order_B: jax.Array) -> 'Seen':
        """The sequences `order_B` of the batch: tiled for beams or samples, or reordered."""
        return Seen(take_rows(self.cache, order_B), self.lengths_B[order_B])

    def truncate(self, lengths_B: jax.Array) -> 'Seen':
        """As if no token at position `lengths_B` or later had been read; see `cache.truncate` for how far back."""
        return Seen(truncate(self.cache, lengths_B), jnp.minimum(self.lengths_B, lengths_B))


class Engine:
    """A model with its parameters laid out for decoding.

    The layers are unstacked and matrices are held in the compute dtype, once: a loop that cuts or casts them reads more
    memory for each token than the model has. On one device kernels are transposed as well (models/layers.py).

    Attributes:
      model, mesh, cache_dtype: as given.
      params: what the compiled programs take.
    """

    def __init__(
        self, model: GPT, params: Any, *, cache_dtype: jnp.dtype | str | None = None, mesh: Mesh | None = None
    ):
        """Prepares `params` of `model`.

        Args:
          model, params: a GPT and its parameters, stacked as a checkpoint has them.
          cache_dtype: of keys and values, as a dtype or one of 'f32', 'bf16' and 'fp16'; None: the compute dtype.
          mesh: splits rows over 'data' and 'fsdp' and parameters by the rules of training; None: one device.
        """
        self.model, self.mesh = model, mesh
        dtype = COMPUTE_DTYPES.get(cache_dtype, cache_dtype) if isinstance(cache_dtype, str) else cache_dtype
        self.cache_dtype = jnp.dtype(model.config.dtype if dtype is None else dtype)
        self.params = _prepare(model, mesh, params)

    def batch_size(self, rows: int) -> int:
        """The size of the batch in which `rows` sequences are decoded: a power of two that the mesh can split."""
        return batch_bucket(rows, 1 if self.mesh is None else self.mesh.shape['data'] * self.mesh.shape['fsdp'])

    def slots(self, tokens: int) -> int:
        """The length of a cache for `tokens` tokens of the longest sequence."""
        return bucket(tokens, self.model.config.block_size)

    def prefill(self, prompts: Sequence[Sequence[int]], room: int, undoable: int = 0) -> tuple[jax.Array, Seen]:
        """Reads prompts, padded at their end to one of few lengths.

        Args:
          prompts: token ids of each sequence, at least one and at most block_size; on a mesh as many as can be split.
          room: how many more tokens the cache is to hold; prompt and room may fill block_size.
          undoable: of those, how many `Seen.truncate` may take back at a time.

        Returns:
          Logits float32 [batch, vocab] of the token after each prompt; what was seen.
        """
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        longest, block_size = int(lengths_B.max()), self.model.config.block_size
        tokens_BT = np.zeros((len(prompts), bucket(longest, block_size)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        slots = bucket(longest + room + undoable, block_size + undoable)
        sizes = (slots, self.cache_dtype, undoable)
        return _prefill(self.model, self.mesh, self.params, self.place(tokens_BT), self.place(lengths_B), *sizes)

    def step(self, seen: Seen, tokens_B: jax.Array) -> tuple[jax.Array, Seen]:
        """Reads one more token of each sequence: logits float32 [batch, vocab] of the one after it; `seen` is donated.

        The cache must have room: its slots are those of the longest prompt and of every step.
        """
        logits_BTV, seen = _read(self.model, self.mesh, self.params, seen, jnp.asarray(tokens_B)[:, None])
        return logits_BTV[:, 0], seen

    def place(self, array: np.ndarray) -> jax.Array:
        """An array [batch, ...] on the device, or its rows split over the mesh."""
        if self.mesh is None:
            return jnp.array(array)  # a copy: what is donated must not be numpy's memory
        return jax.device_put(array.copy(), NamedSharding(self.mesh, PartitionSpec(('data', 'fsdp'))))


def read(
    model: GPT, params: Any, seen: Seen, tokens_BT: jax.Array, active_B: jax.Array | None = None
) -> tuple[jax.Array, Seen]:
    """Reads the next tokens of each sequence, to be traced in a compiled program.

    Args:
      model, params: of an engine.
      seen: what was read before.
      tokens_BT: int32 [batch, time].
      active_B: bool [batch], which sequences go on; tokens of the others are seen by nobody. None: all.

    Returns:
      Logits float32 [batch, time, vocab], and what is seen now.
    """
    time = tokens_BT.shape[1]
    positions_BT = seen.lengths_B[:, None] + jnp.arange(time)
    lengths_B = seen.lengths_B + time
    if active_B is not None:
        positions_BT = jnp.where(active_B[:, None], positions_BT, -1)
        lengths_B = jnp.where(active_B, lengths_B, seen.lengths_B)
    logits_BTV, cache = model.apply({'params': params}, tokens_BT, cache=seen.cache, positions=positions_BT)
    return logits_BTV, Seen(cache, lengths_B)


@functools.partial(jax.jit, static_argnames=('model', 'mesh', 'slots', 'dtype', 'undoable'))
def _prefill(model, mesh, params, tokens_BT, lengths_B, slots, dtype, undoable) -> tuple[jax.Array, Seen]:
    with activate(mesh):
        cache = model.init_cache(tokens_BT.shape[0], slots, dtype, undoable)
        logits_BV, cache = model.apply({'params': params}, tokens_BT, lengths_B, cache, method='prefill')
    return logits_BV, Seen(cache, lengths_B)


@functools.partial(jax.jit, static_argnames=('model', 'mesh'), donate_argnames='seen')
def _read(model, mesh, params, seen, tokens_BT) -> tuple[jax.Array, Seen]:
    with activate(mesh):
        return read(model, params, seen, tokens_BT)


@functools.partial(jax.jit, static_argnames=('model', 'mesh'))
def _prepare(model: GPT, mesh: Mesh | None, params: Any) -> Any:
    """Unstacked parameters, matrices in the compute dtype, on the mesh or transposed."""

    def cast(path, leaf):
        # What LayerNorm multiplies by stays float32, as the model has it.
        name = path_name(path)
        return leaf if '/ln_' in name or name.startswith('ln_f') else leaf.astype(model.config.dtype)

    unstacked = unstack_layers(jax.tree_util.tree_map_with_path(cast, params))
    if mesh is None:
        return unstacked | {'blocks': transpose_kernels(unstacked['blocks'])}
    shardings = tree_shardings(mesh, params, params)
    blocks = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), shardings['blocks'])
    shardings['blocks'] = (blocks,) * model.config.n_layer
    return jax.lax.with_sharding_constraint(unstacked, shardings)
