"""What the blocks are made of: products with matrices, LayerNorm and Dropout, with gradients written by hand."""

import functools
import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax.parallel import can_split, on_one_device, per_device, split_axes, splits, target_device

INIT_STD = 0.02  # GPT-2's code, GPT-1 section 4.1

# In place of a Dense's `kernel`: the same matrix as [*out, *in].
TRANSPOSED = 'kernel_transposed'
# Beyond that many rows a plain product is as fast.
FEW_ROWS = 32


@jax.custom_vjp
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x @ kernel + bias: [..., in] @ [in, out] + [out]."""
    return x @ kernel + bias


def _affine_forward(x, kernel, bias):
    # Not by calling `affine`: policies of rematerialisation do not see the products inside of a nested custom gradient.
    return x @ kernel + bias, (x, kernel, bias)


def _affine_backward(residuals, dout):
    x, kernel, bias = residuals
    dkernel = contract_tokens(x, dout).astype(kernel.dtype)
    return jnp.einsum('...o,io->...i', dout, kernel), dkernel, sum_tokens(dout).astype(bias.dtype)


affine.defvjp(_affine_forward, _affine_backward)


@jax.custom_vjp
def affine_over_heads(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The same with several output dimensions, [..., in] @ [in, *out] + [*out], of which the mesh splits one.

    Flattened into one dimension they would lose their partition: the compiler would gather the gradient of the result.
    """
    return jnp.tensordot(x, kernel, 1) + bias


def _affine_over_heads_forward(x, kernel, bias):
    return jnp.tensordot(x, kernel, 1) + bias, (x, kernel, bias)


def _affine_over_heads_backward(residuals, dout):
    x, kernel, bias = residuals
    tokens, out = list(range(x.ndim - 1)), list(range(x.ndim - 1, dout.ndim))
    dx = jnp.tensordot(dout, kernel, (out, list(range(1, kernel.ndim))))
    dkernel = jnp.tensordot(x, dout, (tokens, tokens), preferred_element_type=jnp.float32)
    dbias = jnp.sum(dout, axis=tokens, dtype=jnp.float32)
    return dx, dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


affine_over_heads.defvjp(_affine_over_heads_forward, _affine_over_heads_backward)


def contract_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., m], [..., n] -> [m, n] in float32: the gradient of a matrix that every token went through."""
    if on_one_device():
        # With a single contracted dimension the CPU needs no transposed copies. Elsewhere the token dimensions are
        # sharded: left as they are, their partition stays visible to the compiler.
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return jnp.einsum('...m,...n->mn', x, y, preferred_element_type=jnp.float32)


def sum_tokens(x: jax.Array) -> jax.Array:
    """[..., d] -> [d] in float32."""
    if on_one_device():
        # A product with ones: 4 times as fast on CPU as the reduction.
        return contract_tokens(jnp.ones((*x.shape[:-1], 1), x.dtype), x)[0]
    return jnp.sum(x, axis=range(x.ndim - 1), dtype=jnp.float32)


class Dense(nn.Module):
    """`x @ kernel + bias`, contracting the last `contract` dimensions of x with the first of the kernel.

    Not `nn.DenseGeneral`: that one evaluates its initialisers at another rank, which breaks sharding constraints on
    them. Parameters: `kernel` of shape `shape`, and where `use_bias`, `bias` of the shape that is left after the
    contraction. In place of `kernel` apply takes a transposed one: see `transpose_kernels`.
    """

    shape: tuple[int, ...]
    contract: int = 1
    use_bias: bool = True
    std: float = INIT_STD
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *shape[:contract]] -> [..., *shape[contract:]], in `dtype`."""
        in_shape, out_shape = self.shape[: self.contract], self.shape[self.contract :]
        is_transposed = self.has_variable('params', TRANSPOSED)
        if is_transposed:
            kernel = self.get_variable('params', TRANSPOSED)
        else:
            kernel = self.param('kernel', nn.initializers.normal(self.std), self.shape, jnp.float32)
        # A constant zero costs nothing: the compiler leaves the addition out.
        zeros = nn.initializers.zeros
        bias = self.param('bias', zeros, out_shape, jnp.float32) if self.use_bias else jnp.zeros(out_shape)
        batch_shape = x.shape[: x.ndim - self.contract]
        x = x.astype(self.dtype).reshape(*batch_shape, math.prod(in_shape))
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        if len(out_shape) > 1 and not is_transposed and splits('heads'):
            return affine_over_heads(x, kernel, bias)
        # One plain matrix product: several output dimensions in the dot itself make slower code on CPU.
        bias = bias.reshape(-1)
        if is_transposed:
            y = matmul_transposed(x, kernel.reshape(bias.size, -1)) + bias
        else:
            y = affine(x, kernel.reshape(-1, bias.size), bias)
        return y.reshape(*batch_shape, *out_shape)


def matmul_transposed(x: jax.Array, matrix_OI: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x @ matrix.T: [..., in], [out, in] -> [..., out]; `dtype` is that of the sums and the result, by default x's.

    Decoding is made of such products of few rows: there a token costs at least the time of reading every matrix once,
    and a plain `x @ kernel` of 2 to 32 rows reads them at about half the speed of this form on CPU
    (docs/PERFORMANCE.md).
    """
    rows = x.size // x.shape[-1]
    if rows > FEW_ROWS or target_device().platform != 'cpu' or not on_one_device():
        return jnp.einsum('...i,oi->...o', x, matrix_OI, preferred_element_type=dtype)
    # As a stack of one matrix: of a plain product with so few rows the compiler makes slow loops.
    y = jnp.einsum('ri,soi->sro', x.reshape(rows, -1), matrix_OI[None], preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], matrix_OI.shape[0])


def transpose_kernels(blocks: tuple[Any, ...]) -> tuple[Any, ...]:
    """Parameters of blocks (`unstack_layers`) with every kernel transposed, for decoding; `Dense` takes either form."""

    def convert(tree, name=''):
        if not isinstance(tree, dict):
            return tree
        tree = {key: convert(value, key) for key, value in tree.items()}
        if 'kernel' in tree:
            kernel = tree.pop('kernel')
            contracted = 2 if name == 'out' else 1  # attention's output contracts heads and head_dim
            axes = range(kernel.ndim)
            tree[TRANSPOSED] = kernel.transpose(*axes[contracted:], *axes[:contracted])
        return tree

    return tuple(convert(block) for block in blocks)


class Dropout(nn.Module):
    """Zeroes elements at `rate` where a 'dropout' rng is given to apply; the identity where none is.

    Each row of the global batch has a mask of its own, whatever devices or micro-batches the rows are spread over.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, rows_B: jax.Array) -> jax.Array:
        """x [batch, ...] of the rows `rows_B` -> the same shape, kept elements scaled by 1 / (1 - rate)."""
        if self.rate == 0.0 or not self.has_rng('dropout'):
            return x
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self.make_rng('dropout'), rows_B)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, x.shape[1:]))(keys_B)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; statistics in float32, result in `dtype`."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]."""
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return layer_norm(x, scale, bias, self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: jnp.dtype) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in `dtype`."""
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
    x_f32 = x.astype(jnp.float32)
    mean = jnp.mean(x_f32, axis=-1, keepdims=True)
    centred = x_f32 - mean
    inverse_std = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return (centred * inverse_std * scale + bias).astype(dtype), (x, scale, mean, inverse_std)


def _layer_norm_backward(epsilon, dtype, residuals, dout):
    x, scale, mean, inverse_std = residuals
    dout = dout.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse_std
    dnormal = dout * scale
    along = jnp.mean(dnormal * normal, axis=-1, keepdims=True)
    dx = (dnormal - jnp.mean(dnormal, axis=-1, keepdims=True) - normal * along) * inverse_std
    return dx.astype(x.dtype), sum_tokens(dout * normal), sum_tokens(dout)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@flax.struct.dataclass
class TokenTable:
    """The table of the vocabulary as training uses it, for the embedding, the output head, or both (see `copy_table`).

    A tied table is used twice, and its two gradients are best added on every device before anything is sent: so each
    device that has tokens of its own gets a copy, and the gradients of the copies are summed over the devices once.

    Attributes:
      rows: [copies, padded vocab, d_model] in the compute dtype; one copy where nothing is split.
      gradient: zeros of the same shape in float32. Its cotangent is the gradient of the table; `rows` passes none on,
        as that would be rounded to the compute dtype.
      is_split: whether the copies lie on the devices of a mesh.
    """

    rows: jax.Array
    gradient: jax.Array
    is_split: bool = flax.struct.field(pytree_node=False)

    def run(self, function, in_names, out_names):
        """`function` by every device on its part, or on the whole arrays where nothing is split."""
        return per_device(function, in_names, out_names) if self.is_split else function


TABLE_COPIES = ('copy', 'vocab', None)


def copy_table(table_VD: jax.Array, dtype: jnp.dtype, tokens_BT: jax.Array) -> TokenTable:
    """A parameter [padded vocab, d_model] in `dtype` on each device that has some of `tokens_BT`.

    Under 'tensor' a device has its part of the rows alone. Where the mesh does not divide the tokens evenly, there is
    one copy, and the compiler splits the work as it can.
    """
    is_split = can_split(tokens_BT.shape, 'batch', 'time') and can_split(table_VD.shape, 'vocab', 'embed_parameter')
    return TokenTable(*_copy(table_VD, jnp.dtype(dtype), table_VD.dtype, is_split), is_split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _copy(table_VD, dtype, parameter_dtype, is_split):
    def gather(part_VD):
        rows_VD = part_VD.astype(dtype)  # before it is sent: half the bytes in 16 bits
        for axis in split_axes('embed_parameter'):
            rows_VD = jax.lax.all_gather(rows_VD, axis, axis=1, tiled=True)
        return rows_VD[None], jnp.zeros((1, *rows_VD.shape), jnp.float32)

    names = ([('vocab', 'embed_parameter')], [TABLE_COPIES, TABLE_COPIES])
    return (per_device(gather, *names) if is_split else gather)(table_VD)


def _copy_forward(table_VD, dtype, parameter_dtype, is_split):
    return _copy(table_VD, dtype, parameter_dtype, is_split), None


def _copy_backward(dtype, parameter_dtype, is_split, _, cotangents):
    def reduce(dcopy_1VD):
        dtable_VD, axes = dcopy_1VD[0], split_axes('copy')
        if 'fsdp' in axes:
            dtable_VD = jax.lax.psum_scatter(dtable_VD, 'fsdp', scatter_dimension=1, tiled=True)
        if others := tuple(axis for axis in axes if axis != 'fsdp'):
            dtable_VD = jax.lax.psum(dtable_VD, others)
        return dtable_VD.astype(parameter_dtype)

    names = ([TABLE_COPIES], ('vocab', 'embed_parameter'))
    return ((per_device(reduce, *names) if is_split else reduce)(cotangents[1]),)


_copy.defvjp(_copy_forward, _copy_backward)


def add_positions(x_BTD: jax.Array, wpe_TD: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
    """x and the row of `wpe_TD` of each token's position, by default 0, 1, ...; in x's dtype."""
    if can_split(x_BTD.shape, 'batch', 'time', 'embed') and can_split(wpe_TD.shape, None, 'embed_parameter'):
        return _add_positions(x_BTD, wpe_TD, positions_BT)
    rows = wpe_TD[None, : x_BTD.shape[1]] if positions_BT is None else wpe_TD[positions_BT]
    return x_BTD + rows.astype(x_BTD.dtype)


@jax.custom_vjp
def _add_positions(x_BTD, wpe_TD, positions_BT):
    """On a mesh by hand: the compiler would gather what it looked up, and move activations to where the table is."""

    def look_up(x_BTD, part_TD, positions_BT):
        if positions_BT is None:
            part_TD = jax.lax.dynamic_slice_in_dim(part_TD, _first_time(x_BTD.shape[1]), x_BTD.shape[1])
        rows = part_TD.astype(x_BTD.dtype)
        for axis in split_axes('embed_parameter'):
            rows = jax.lax.all_gather(rows, axis, axis=1, tiled=True)
        return x_BTD + (rows if positions_BT is None else rows[positions_BT])

    names = [('batch', 'time', 'embed'), (None, 'embed_parameter'), ('batch', 'time')]
    return per_device(look_up, names, names[0])(x_BTD, wpe_TD, positions_BT)


def _add_positions_forward(x_BTD, wpe_TD, positions_BT):
    # Of the table its shape and dtype are needed.
    return _add_positions(x_BTD, wpe_TD, positions_BT), (wpe_TD, positions_BT)


def _add_positions_backward(residuals, dx_BTD):
    wpe_TD, positions_BT = residuals
    rows, dtype = wpe_TD.shape[0], wpe_TD.dtype

    def add_up(dx_BTD, positions_BT):
        dx_BTD, axes = dx_BTD.astype(jnp.float32), split_axes('copy')
        if positions_BT is None:
            dwpe_TD, summed = jnp.sum(dx_BTD, axis=0), split_axes('batch')
        else:
            dwpe_TD, summed = jnp.zeros((rows, dx_BTD.shape[2]), jnp.float32).at[positions_BT].add(dx_BTD), axes
        if 'fsdp' in axes:
            dwpe_TD = jax.lax.psum_scatter(dwpe_TD, 'fsdp', scatter_dimension=1, tiled=True)
        if others := tuple(axis for axis in summed if axis != 'fsdp'):
            dwpe_TD = jax.lax.psum(dwpe_TD, others)
        if positions_BT is None:  # each device has the gradient of its own stretch of time
            for axis in split_axes('time'):
                dwpe_TD = jax.lax.all_gather(dwpe_TD, axis, axis=0, tiled=True)
            dwpe_TD = jnp.pad(dwpe_TD, ((0, rows - dwpe_TD.shape[0]), (0, 0)))
        return dwpe_TD.astype(dtype)

    names = [('batch', 'time', 'embed'), ('batch', 'time')]
    return dx_BTD, per_device(add_up, names, (None, 'embed_parameter'))(dx_BTD, positions_BT), None


_add_positions.defvjp(_add_positions_forward, _add_positions_backward)


def _first_time(time: int) -> jax.Array | int:
    """The place in the sequence of the first of this device's `time` tokens."""
    return time * jax.lax.axis_index('context') if split_axes('time') else 0


def first_row(rows_VD: jax.Array) -> jax.Array | int:
    """Which row of the whole table this device's part begins with."""
    return rows_VD.shape[0] * jax.lax.axis_index('tensor') if split_axes('vocab') else 0


@jax.custom_vjp
def embed_tokens(table: TokenTable, tokens_BT: jax.Array) -> jax.Array:
    """The row of each token: [batch, time] -> [batch, time, d_model], in the compute dtype."""

    def look_up(rows_1VD, tokens_BT):
        rows_VD = rows_1VD[0]
        if not (axes := split_axes('vocab')):
            return rows_VD[tokens_BT]
        # One device has the row, the others add zeros: nothing of the table is sent.
        tokens_BT = tokens_BT - first_row(rows_VD)
        is_here_BT = (tokens_BT >= 0) & (tokens_BT < rows_VD.shape[0])
        return jax.lax.psum(jnp.where(is_here_BT[..., None], rows_VD[tokens_BT], 0), axes)

    names = ([TABLE_COPIES, ('batch', 'time')], ('batch', 'time', 'embed'))
    return table.run(look_up, *names)(table.rows, tokens_BT)


def _embed_forward(table, tokens_BT):
    return embed_tokens(table, tokens_BT), (table.replace(gradient=None), tokens_BT)


def _embed_backward(residuals, dx_BTD):
    table, tokens_BT = residuals

    def add_up(rows_1VD, tokens_BT, dx_BTD):
        rows_VD, start = rows_1VD[0], first_row(rows_1VD[0])
        # A token of another device's part goes to a row that does not exist, and is dropped.
        rows_BT = tokens_BT - start
        if split_axes('vocab'):
            rows_BT = jnp.where(rows_BT < 0, rows_VD.shape[0], rows_BT)
        return jnp.zeros(rows_VD.shape, jnp.float32).at[rows_BT].add(dx_BTD.astype(jnp.float32), mode='drop')[None]

    names = ([TABLE_COPIES, ('batch', 'time'), ('batch', 'time', 'embed')], TABLE_COPIES)
    dtable = table.run(add_up, *names)(table.rows, tokens_BT, dx_BTD)
    return table.replace(rows=None, gradient=dtable), None


embed_tokens.defvjp(_embed_forward, _embed_backward)
