"""What the blocks are made of: products with matrices, LayerNorm and Dropout, with gradients written by hand."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax.parallel import on_one_device, target_device

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
        # One plain matrix product: several output dimensions in the dot itself make slower code on CPU.
        x = x.astype(self.dtype).reshape(*batch_shape, math.prod(in_shape))
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype).reshape(-1)
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
