"""Causal self-attention, for whole sequences and for cached decoding."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax.models.blockwise import blockwise_attention
from gpt_jax.models.config import GPTConfig
from gpt_jax.models.layers import INIT_STD, Dense, Dropout
from gpt_jax.parallel import constrain

# Finite, so that a row which may see nothing (padding) gives numbers and not NaN.
MASKED = -1e30

# Position stored for a cache slot that nobody may see.
EMPTY = jnp.iinfo(jnp.int32).max

Cache = dict[str, Any]


def init_cache(config: GPTConfig, batch: int, length: int) -> Cache:
    """An empty key-value cache for `length` tokens of `batch` sequences.

    Returns:
      `key` and `value`, tuples of one [batch, heads, length, head_dim] array a layer in the compute dtype;
      `positions` [batch, length], the position each slot holds (EMPTY: none); `index`, the next slot to write.

    Raises:
      ValueError: `length` exceeds the model's block_size.
    """
    if length > config.block_size:
        raise ValueError(f'a cache of {length} tokens exceeds block_size={config.block_size}')
    shape = (batch, config.n_head, length, config.head_dim)
    return {
        'key': tuple(jnp.zeros(shape, config.dtype) for _ in range(config.n_layer)),
        'value': tuple(jnp.zeros(shape, config.dtype) for _ in range(config.n_layer)),
        'positions': jnp.full((batch, length), EMPTY, jnp.int32),
        'index': jnp.zeros((), jnp.int32),
    }


def attention_weights(q_BNTK: jax.Array, k_BNSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(head_dim)) over the keys a query may see, in float32: [batch, heads, time, keys]."""
    scale = 1.0 / math.sqrt(q_BNTK.shape[-1])
    scores_BNTS = jnp.einsum('BNTK,BNSK->BNTS', q_BNTK * scale, k_BNSK, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, MASKED), axis=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what stands before it (GPT-2; GPT-1, section 3.1)."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layer_cache: Cache | None = None, positions_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Attends over x itself, or over a cache that x is first written to.

        Args:
          x_BTD: normalised activations.
          layer_cache: this layer's `key` and `value`, with the `positions` (already holding x's) and the `index` at
            which x goes.
          positions_BT: position of each token of x; needed with a cache.

        Returns:
          Output [batch, time, d_model], and the updated `key` and `value` (None without a cache).
        """
        c = self.config
        residual_std = INIT_STD / math.sqrt(2 * c.n_layer)  # GPT-2, section 2.3
        qkv_BTCNK = Dense((c.d_model, 3, c.n_head, c.head_dim), dtype=c.dtype, name='qkv')(x_BTD)
        q_BNTK, k_BNTK, v_BNTK = (constrain(y, 'batch', 'heads', None, 'head_dim') for y in _split_heads(qkv_BTCNK))
        if layer_cache is None:
            y_BNTK, updated = self._causal(q_BNTK, k_BNTK, v_BNTK), None
        else:
            y_BNTK, updated = self._cached(q_BNTK, k_BNTK, v_BNTK, layer_cache, positions_BT)
        y_BTNK = y_BNTK.transpose(0, 2, 1, 3)
        out = Dense((c.n_head, c.head_dim, c.d_model), contract=2, std=residual_std, dtype=c.dtype, name='out')
        return Dropout(c.resid_dropout)(out(y_BTNK)), updated

    def _causal(self, q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array) -> jax.Array:
        c, time = self.config, q_BNTK.shape[2]
        if c.attention_dropout > 0 and self.has_rng('dropout'):
            # Fused kernels have no dropout on the probabilities: these are made in full.
            weights_BNTS = attention_weights(q_BNTK, k_BNTK, jnp.tril(jnp.ones((1, time, time), bool)))
            weights_BNTS = Dropout(c.attention_dropout)(weights_BNTS)
            return jnp.einsum('BNTS,BNSK->BNTK', weights_BNTS.astype(c.dtype), v_BNTK)
        if _cudnn_takes(q_BNTK):
            qkv_BTNK = (y.transpose(0, 2, 1, 3) for y in (q_BNTK, k_BNTK, v_BNTK))
            return jax.nn.dot_product_attention(*qkv_BTNK, is_causal=True, implementation='cudnn').transpose(0, 2, 1, 3)
        return blockwise_attention(q_BNTK, k_BNTK, v_BNTK)

    def _cached(self, q_BNTK, k_BNTK, v_BNTK, layer_cache, positions_BT) -> tuple[jax.Array, Cache]:
        start = (0, 0, layer_cache['index'], 0)
        k_BNSK = jax.lax.dynamic_update_slice(layer_cache['key'], k_BNTK, start)
        v_BNSK = jax.lax.dynamic_update_slice(layer_cache['value'], v_BNTK, start)
        visible_BTS = layer_cache['positions'][:, None, :] <= positions_BT[:, :, None]
        weights_BNTS = attention_weights(q_BNTK, k_BNSK, visible_BTS)
        y_BNTK = jnp.einsum('BNTS,BNSK->BNTK', weights_BNTS.astype(v_BNSK.dtype), v_BNSK)
        return y_BNTK, {'key': k_BNSK, 'value': v_BNSK}


def _split_heads(qkv_BTCNK: jax.Array) -> jax.Array:
    """[batch, time, 3, heads, head_dim] -> [3, batch, heads, time, head_dim]."""
    return qkv_BTCNK.transpose(2, 0, 3, 1, 4)


def _cudnn_takes(q_BNTK: jax.Array) -> bool:
    """Whether cuDNN's fused kernel has this case; it raises where it does not, and never falls back by itself."""
    head_dim = q_BNTK.shape[-1]
    return (
        jax.default_backend() == 'gpu'
        and q_BNTK.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
    )
