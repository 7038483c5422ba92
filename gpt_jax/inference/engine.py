"""The decode engine: weights laid out for decoding, and the two programs that all strategies are made of.

    engine = Engine(model, params)
    logits_BV, cache = engine.prefill(prompts, length=128)  # prompts of any lengths, as one batch
    logits_BV, cache = engine.step(cache, tokens_B)         # donates `cache`: use what it returns
    cache = take_rows(cache, order)                         # repeats or reorders the sequences of the batch

A cache is that of `models/cache.py`. `read` is `step` for several tokens a row, for use inside other compiled programs
as well. Compiled programs are shared by all engines of a model; arrays come in few sizes, so that they are few.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.models import GPT, unstack_layers
from gpt_jax.models.cache import Cache
from gpt_jax.models.config import COMPUTE_DTYPES
from gpt_jax.models.layers import transpose_kernels
from gpt_jax.parallel import activate, path_name, tree_shardings

# Steps of one compiled loop where nobody watches: between two of them Ctrl-C and stop strings are looked at.
STEPS_AT_A_TIME = 32
SMALLEST_LENGTH = 32
# Beyond this length powers of two would waste more time on padding than a program takes to compile.
FINE_FROM, STEPS_AN_OCTAVE = 256, 8
SMALLEST_STEP = 64
# Beside a model's parameters: which ids are no tokens.
NO_TOKEN = 'no_token_V'


def padded_length(length: int, most: int | None = None) -> int:
    """The least of 32, 64, 128, 256, 320, 384, ... 1024, 1152, ... that holds `length` tokens, or `most` if it is less.

    Above 256 the steps are 64, and from 1024 on an eighth of the last power of two: at most a fifth is padding.
    """
    size = SMALLEST_LENGTH
    while size < length:
        size += size if size < FINE_FROM else max(SMALLEST_STEP, (1 << (size.bit_length() - 1)) // STEPS_AN_OCTAVE)
    return size if most is None else min(size, most)


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def pack(texts: Sequence[Sequence[int]], width: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Texts padded at their end as one batch: tokens int32 [rows, width], lengths int32 [rows].

    Rows beyond the texts (`rows`: how many there are in all) hold one token, so that a model can read them.
    """
    rows = len(texts) if rows is None else rows
    tokens_BL, lengths_B = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    for row, text in enumerate(texts):
        tokens_BL[row, : len(text)] = text
        lengths_B[row] = len(text)
    return tokens_BL, lengths_B


class Engine:
    """A model with its parameters laid out for decoding.

    The layers are unstacked and matrices are held in the compute dtype, once: a loop that cuts or casts them reads more
    memory for each token than the model has. On one device kernels are transposed as well (`models/layers.py`).

    A model may have ids that no token has: those that fill its head up, or holes. Their logits are -inf here, where all
    logits come from, so that no strategy takes one, and probabilities are those among tokens.

    Attributes:
      model, mesh, cache_dtype: as given.
      params: what the compiled programs take.
    """

    def __init__(
        self,
        model: GPT,
        params: Any,
        *,
        tokenizer: Tokenizer | None = None,
        cache_dtype: jnp.dtype | str | None = None,
        mesh: Mesh | None = None,
        weights: Literal['copy', 'take', 'share'] = 'copy',
    ):
        """Lays out `params` of `model`.

        Args:
          model, params: a GPT and its parameters, stacked as a checkpoint has them.
          tokenizer: its tokens alone are written; None: every id of the model is one.
          cache_dtype: of keys and values, as a dtype or one of 'f32', 'bf16' and 'fp16'; None: the compute dtype.
          mesh: splits rows over 'data' and 'fsdp' and parameters by the rules of training; None: one device.
          weights: what becomes of `params`. 'copy': they stay, beside what is laid out for decoding. 'take': they are
            deleted, so that the weights are held once. 'share': they are decoded from as they are, slower and without
            a copy; for a few texts in the middle of training.
        """
        if mesh is not None and mesh.shape['context'] > 1:
            raise InputError(f'mesh.context={mesh.shape["context"]} must be 1: decoding splits no text over devices')
        self.model, self.mesh = model, mesh
        dtype = COMPUTE_DTYPES.get(cache_dtype, cache_dtype) if isinstance(cache_dtype, str) else cache_dtype
        self.cache_dtype = jnp.dtype(model.config.dtype if dtype is None else dtype)
        self.params = params if weights == 'share' else _lay_out(model, mesh, params)
        no_token_V = np.zeros(0, bool) if tokenizer is None else ~tokenizer.is_token(model.config.vocab_size)
        if no_token_V.any():  # an array less, and the programs of before, where all are tokens
            place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
            self.params = self.params | {NO_TOKEN: jax.device_put(no_token_V, place)}
        if weights == 'take':
            # What the layout leaves as it was is passed on by jax, not copied.
            kept = {id(leaf) for leaf in jax.tree.leaves(self.params)}
            for leaf in jax.tree.leaves(params):
                if id(leaf) not in kept and isinstance(leaf, jax.Array):
                    leaf.delete()

    def batch_size(self, rows: int) -> int:
        """The size of the batch in which `rows` sequences are decoded: one of few, which the mesh can split.

        A power of two times the devices that split the batch.
        """
        devices = 1 if self.mesh is None else self.mesh.shape['data'] * self.mesh.shape['fsdp']
        return devices * power_of_two(-(-rows // devices))

    def prefill(self, prompts: Sequence[Sequence[int]], length: int, undoable: int = 0) -> tuple[jax.Array, Cache]:
        """Reads prompts, padded at their end to one of few lengths.

        Args:
          prompts: token ids of each sequence, at least one and at most block_size; on a mesh as many as can be split.
          length: how many tokens of a sequence the cache is to hold, its prompt among them; at most block_size.
          undoable: how many tokens `truncate` may take back at a time.

        Returns:
          Logits float32 [batch, vocab] of the token after each prompt; the cache.

        Raises:
          InputError: the logits are not finite.
        """
        block_size = self.model.config.block_size
        arrays = pack(prompts, padded_length(max(map(len, prompts)), block_size))
        slots = padded_length(length + undoable, block_size + undoable)
        tokens_BT, lengths_B = map(self.place, arrays)
        sizes = (slots, self.cache_dtype, undoable)
        logits_BV, cache = _prefill(self.model, self.mesh, self.params, tokens_BT, lengths_B, *sizes)
        check_finite(logits_BV)
        return logits_BV, cache

    def step(self, cache: Cache, tokens_B: jax.Array) -> tuple[jax.Array, Cache]:
        """Reads one more token of each sequence: logits float32 [batch, vocab] of the one after it; `cache` is donated.

        The cache must have room for it.
        """
        logits_BTV, cache = _read(self.model, self.mesh, self.params, cache, jnp.asarray(tokens_B)[:, None])
        return logits_BTV[:, 0], cache

    def place(self, array: np.ndarray) -> jax.Array:
        """An array [batch, ...] on the device, or its rows split over the mesh."""
        if self.mesh is None:
            return jnp.array(array)  # a copy: what is donated must not be numpy's memory
        return jax.device_put(array.copy(), NamedSharding(self.mesh, PartitionSpec(('data', 'fsdp'))))


def read(
    model: GPT, params: Any, cache: Cache, tokens_BT: jax.Array, active_B: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Reads the next tokens of each sequence, to be traced in a compiled program.

    Args:
      model, params: of an engine.
      cache: what was read before.
      tokens_BT: int32 [batch, time].
      active_B: bool [batch], which sequences go on; tokens of the others are not read. None: all.

    Returns:
      Logits float32 [batch, time, vocab], and the cache with the tokens in it.
    """
    positions_BT = cache['lengths'][:, None] + jnp.arange(tokens_BT.shape[1])
    if active_B is not None:
        positions_BT = jnp.where(active_B[:, None], positions_BT, -1)
    logits_BTV, cache = model.apply({'params': params}, tokens_BT, cache=cache, positions=positions_BT)
    return of_tokens(params, logits_BTV), cache


def of_tokens(params: Any, logits_V: jax.Array) -> jax.Array:
    """Logits [..., vocab] of a model with an engine's `params`: -inf where the engine knows of no token."""
    return jnp.where(params[NO_TOKEN], -jnp.inf, logits_V) if NO_TOKEN in params else logits_V


def check_finite(logits: jax.Array | np.ndarray) -> None:
    """Raises InputError where logits hold a NaN or +infinity: any strategy would write nothing of it, or token 0."""
    if not np.isfinite(logits.max()):
        raise InputError(
            "the model's logits are not finite: its weights are too large for its compute dtype, or of a run that "
            'diverged; take another checkpoint or --step'
        )


def run_steps(step: Callable, goes_on: Callable, most: jax.Array | int, state: Any) -> Any:
    """`step` of `state`, again and again while it `goes_on`, but at most `most` times; to be traced."""

    def has_more(counted):
        count, state = counted
        return (count < most) & goes_on(state)

    def one(counted):
        count, state = counted
        return count + 1, step(state)

    return jax.lax.while_loop(has_more, one, (jnp.zeros((), jnp.int32), state))[1]


@functools.partial(jax.jit, static_argnames=('model', 'mesh', 'slots', 'dtype', 'undoable'))
def _prefill(model, mesh, params, tokens_BT, lengths_B, slots, dtype, undoable) -> tuple[jax.Array, Cache]:
    with activate(mesh):
        cache = model.init_cache(tokens_BT.shape[0], slots, dtype, undoable)
        logits_BV, cache = model.apply({'params': params}, tokens_BT, lengths_B, cache, method='prefill')
        return of_tokens(params, logits_BV), cache


@functools.partial(jax.jit, static_argnames=('model', 'mesh'), donate_argnames='cache')
def _read(model, mesh, params, cache, tokens_BT) -> tuple[jax.Array, Cache]:
    with activate(mesh):
        return read(model, params, cache, tokens_BT)


@functools.partial(jax.jit, static_argnames=('model', 'mesh'))
def _lay_out(model: GPT, mesh: Mesh | None, params: Any) -> Any:
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
