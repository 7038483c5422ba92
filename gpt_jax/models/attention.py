"""Causal self-attention, dense or locally banded, for whole sequences and for cached decoding."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax.models import blockwise, cache
from gpt_jax.models.config import GPTConfig
from gpt_jax.models.layers import INIT_STD, Dense, Dropout
from gpt_jax.models.token_info import TokenInfo
from gpt_jax.parallel import constrain

# Finite, so that a row which may see nothing (padding) gives numbers and not NaN.
MASKED = -1e30

QKV_NAME, MLP_NAME = 'qkv', 'mlp_up'
# The activations that remat='names' keeps: with them no matrix product of width 3 d_model or d_mlp is made again in the
# backward pass, nor is attention.
SAVED_NAMES = (QKV_NAME, blockwise.OUTPUT_NAME, blockwise.LOGSUMEXP_NAME, MLP_NAME)


def masked_scores(q_BNTK: jax.Array, k_BNSK: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
    """scale q k where a query may see a key, in float32: [batch, heads, time, keys]."""
    scores_BNTS = jnp.einsum('BNTK,BNSK->BNTS', q_BNTK * scale, k_BNSK, preferred_element_type=jnp.float32)
    return jnp.where(mask_BTS[:, None], scores_BNTS, MASKED)


def attention_weights(q_BNTK: jax.Array, k_BNSK: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
    """softmax(scale q k) over the keys a query may see, in float32: [batch, heads, time, keys]."""
    return jax.nn.softmax(masked_scores(q_BNTK, k_BNSK, mask_BTS, scale), axis=-1)


def visible(queries_BT: jax.Array, keys_BS: jax.Array, band: int | None) -> jax.Array:
    """Which keys a query sees, [batch, time, keys], by the positions of both; `band` counts the query itself."""
    queries_BT1, keys_B1S = queries_BT[:, :, None], keys_BS[:, None, :]
    seen_BTS = keys_B1S <= queries_BT1
    return seen_BTS if band is None else seen_BTS & (keys_B1S > queries_BT1 - band)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what stands before it (GPT-2; GPT-1, section 3.1).

    With a `band` it sees no more than that many tokens, itself among them (GPT-3, section 2.1: "locally banded"). Where
    `info` tells documents apart, it sees none of another one.
    """

    config: GPTConfig
    band: int | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, info: TokenInfo, layer_cache: tuple | None = None, places: cache.Cache | None = None
    ) -> tuple[jax.Array, tuple | None]:
        """Attends over x itself, or over a cache that x is first added to.

        Args:
          x_BTD: normalised activations.
          info: what is known of the tokens; their positions are needed with a cache.
          layer_cache: this layer's keys and values.
          places: where x goes in the cache (see `cache.advance`).

        Returns:
          Output [batch, time, d_model], and the layer's keys and values with x in them (None without a cache).
        """
        c = self.config
        residual_std = INIT_STD / math.sqrt(2 * c.n_layer)  # GPT-2, section 2.3
        qkv = Dense((c.d_model, 3, c.n_head, c.head_dim), use_bias=c.qkv_bias, dtype=c.dtype, name='qkv')
        qkv_BTCNK = checkpoint_name(qkv(x_BTD), QKV_NAME)
        q_BNTK, k_BNTK, v_BNTK = (constrain(y, 'batch', 'heads', None, 'head_dim') for y in _split_heads(qkv_BTCNK))
        if layer_cache is None or places['empty']:
            # Prompts are padded at their end, so that no token of an empty cache has anything but tokens before it.
            y_BNTK = self._causal(q_BNTK, k_BNTK, v_BNTK, info)
        else:
            y_BNTK = self._cached(q_BNTK, k_BNTK, v_BNTK, layer_cache, places, info)
            k_BNTK, v_BNTK = _after(y_BNTK, k_BNTK), _after(y_BNTK, v_BNTK)
        if layer_cache is not None:
            layer_cache = cache.store(*layer_cache, k_BNTK, v_BNTK, places, self.band is not None)
        y_BTNK = y_BNTK.transpose(0, 2, 1, 3)
        out = Dense((c.n_head, c.head_dim, c.d_model), contract=2, std=residual_std, dtype=c.dtype, name='out')
        return Dropout(c.resid_dropout)(out(y_BTNK), info.rows_B), layer_cache

    def _causal(self, q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, info: TokenInfo) -> jax.Array:
        c, time = self.config, q_BNTK.shape[2]
        band = self.band if self.band is not None and self.band < time else None
        documents_BT = None if info.documents_BT is None else constrain(info.documents_BT, 'batch', None)
        if c.attention_dropout > 0 and self.has_rng('dropout'):
            # Fused kernels have no dropout on the probabilities: these are made in full.
            order_1T = jnp.arange(time)[None]
            mask_BTS = visible(order_1T, order_1T, band)
            if documents_BT is not None:
                mask_BTS = mask_BTS & (documents_BT[:, :, None] == documents_BT[:, None, :])
            weights_BNTS = attention_weights(q_BNTK, k_BNTK, mask_BTS, c.scale)
            weights_BNTS = Dropout(c.attention_dropout)(weights_BNTS, info.rows_B)
            return jnp.einsum('BNTS,BNSK->BNTK', weights_BNTS.astype(c.dtype), v_BNTK)
        # cuDNN would take documents only as a whole [time, keys] matrix for each row, added to the scores.
        if documents_BT is None and _cudnn_takes(q_BNTK):
            qkv_BTNK = (y.transpose(0, 2, 1, 3) for y in (q_BNTK, k_BNTK, v_BNTK))
            # cuDNN's window does not count the query itself.
            window = None if band is None else (band - 1, 0)
            settings = {'scale': c.scale, 'is_causal': True, 'local_window_size': window, 'implementation': 'cudnn'}
            return jax.nn.dot_product_attention(*qkv_BTNK, **settings).transpose(0, 2, 1, 3)
        if band is None:
            return blockwise.blockwise_attention(q_BNTK, k_BNTK, v_BNTK, documents_BT, c.scale)
        return blockwise.banded_attention(q_BNTK, k_BNTK, v_BNTK, documents_BT, c.scale, band)

    def _cached(self, q_BNTK, k_BNTK, v_BNTK, layer_cache: tuple, places: cache.Cache, info: TokenInfo) -> jax.Array:
        """Attention over the cache as it was, and over the new tokens.

        Not over the cache as it will be: of several new tokens the first still see what gives way in a band to the
        last.
        """
        before_BS = places['before' if self.band is None else 'band_before']
        parts = (*layer_cache, before_BS), (k_BNTK, v_BNTK, places['shown'])
        scores = [
            masked_scores(q_BNTK, k_BNSK, visible(info.positions_BT, positions_BS, self.band), self.config.scale)
            for k_BNSK, _, positions_BS in parts
        ]
        weights_BNTS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
        y_BNTK = 0.0
        for (_, v_BNSK, _), of_part_BNTS in zip(parts, jnp.split(weights_BNTS, [before_BS.shape[1]], -1), strict=True):
            # The cache may be narrower than what is computed in.
            of_part_BNTS = of_part_BNTS.astype(v_BNSK.dtype)
            y_BNTK += jnp.einsum('BNTS,BNSK->BNTK', of_part_BNTS, v_BNSK, preferred_element_type=jnp.float32)
        return y_BNTK.astype(q_BNTK.dtype)


def _after(y: jax.Array, x: jax.Array) -> jax.Array:
    """x, which the compiler cannot have before y: the cache is then written to in place, when all have looked at it.

    Without the order between the two the CPU's compiler copies the whole cache for each token.
    """
    return x + 0.0 * y.astype(x.dtype)


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
