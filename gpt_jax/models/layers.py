"""The matrices of a block, each held in its true shape."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

INIT_STD = 0.02  # GPT-2's code, GPT-1 section 4.1


class Dense(nn.Module):
    """`x @ kernel + bias`, contracting the last `contract` dimensions of x with the first of the kernel.

    Not `nn.DenseGeneral`: that one evaluates its initialisers at another rank, which breaks sharding constraints on
    them. Parameters: `kernel` of shape `shape`, `bias` of the shape that is left after the contraction.
    """

    shape: tuple[int, ...]
    contract: int = 1
    std: float = INIT_STD
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *shape[:contract]] -> [..., *shape[contract:]], in `dtype`."""
        out_shape = self.shape[self.contract :]
        kernel = self.param('kernel', nn.initializers.normal(self.std), self.shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, out_shape, jnp.float32)
        batch_shape = x.shape[: x.ndim - self.contract]
        # One plain matrix product: several output dimensions in the dot itself make slower code on CPU.
        x = x.astype(self.dtype).reshape(*batch_shape, math.prod(self.shape[: self.contract]))
        kernel = kernel.astype(self.dtype).reshape(-1, math.prod(out_shape))
        return (x @ kernel).reshape(*batch_shape, *out_shape) + bias.astype(self.dtype)


class Dropout(nn.Module):
    """Zeroes elements at `rate` where a 'dropout' rng is given to apply; the identity where none is."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x of any shape -> the same shape, kept elements scaled by 1 / (1 - rate)."""
        return nn.Dropout(self.rate)(x, deterministic=not self.has_rng('dropout'))


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; statistics in float32, result in `dtype`."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]."""
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)
