"""What a model does between its tokens and its logits: residual streams, attention, the logit lens.

Layer by layer, outside of the compiled model, from the same modules: nothing that trains or decodes knows of it.
Parameters may be stacked, or unstacked (`unstack_layers`), which spares taking them apart at each call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.models.attention import attention_weights, visible
from gpt_jax.models.config import GPTConfig
from gpt_jax.models.gpt import GPT, Block, TokenInfo, layer_trees
from gpt_jax.models.layers import LayerNorm
from gpt_jax.models.losses import masked_logits


def residual_streams(model: GPT, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """The residual stream before each layer and after the last: [n_layer + 1, batch, time, d_model].

    Args:
      model, params: a GPT and its parameters.
      tokens_BT: int token ids [batch, time]; time is at most block_size.
    """
    c = model.config
    x_BTD = params['wte'][tokens_BT].astype(c.dtype) + params['wpe'][: tokens_BT.shape[1]].astype(c.dtype)
    streams = [x_BTD]
    for layer, layer_params in enumerate(layer_trees(params['blocks'], c.n_layer)):
        streams.append(_block(c, c.band(layer), layer_params, streams[-1], layer))
    return jnp.stack(streams)


def attention_maps(model: GPT, params: Any, streams_LBTD: jax.Array, layer: int) -> jax.Array:
    """The attention probabilities of one layer, float32 [batch, heads, time, keys]; each row sums to 1.

    Args:
      model, params: a GPT and its parameters.
      streams_LBTD: from `residual_streams`.
      layer: from 0.
    """
    c = model.config
    layer_params = layer_trees(params['blocks'], c.n_layer)[layer]
    return _attention(c, c.band(layer), layer_params, streams_LBTD[layer], layer)


def lens_logits(model: GPT, params: Any, x_BTD: jax.Array) -> jax.Array:
    """Logits of a residual stream as if it were the last: the final LayerNorm, then the output head.

    float32 [..., time, vocab] of [..., time, d_model]; of the stream after the last layer these are the model's own.
    (nostalgebraist 2020, "interpreting GPT: the logit lens".)
    """
    head_VD = params['wte'] if model.config.tie_embeddings else params['lm_head']
    return _lens(model.config, params['ln_f'], head_VD, x_BTD)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(config: GPTConfig, band: int | None, layer_params: Any, x_BTD: jax.Array, layer: int) -> jax.Array:
    info = TokenInfo.of(x_BTD[..., 0], None, None)
    return Block(config, band).apply({'params': layer_params}, x_BTD, info, layer)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention(config: GPTConfig, band: int | None, layer_params: Any, x_BTD: jax.Array, layer: int) -> jax.Array:
    # The fast kernels never hold the probabilities: they are made here, from the projections that the layer makes.
    _, captured = Block(config, band).apply(
        {'params': layer_params},
        x_BTD,
        TokenInfo.of(x_BTD[..., 0], None, None),
        layer,
        mutable=['intermediates'],
        capture_intermediates=lambda module, _: module.name == 'qkv',
    )
    (qkv_BTCNK,) = captured['intermediates']['attention']['qkv']['__call__']
    q_BNTK, k_BNTK, _ = qkv_BTCNK.transpose(2, 0, 3, 1, 4)
    order_1T = jnp.arange(x_BTD.shape[1])[None]
    scale = config.scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else config.scale
    return attention_weights(q_BNTK, k_BNTK, visible(order_1T, order_1T, band), scale)


@functools.partial(jax.jit, static_argnums=0)
def _lens(config: GPTConfig, ln_f: Any, head_VD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    x_BTD = LayerNorm(config.layer_norm_epsilon, config.dtype).apply({'params': ln_f}, x_BTD)
    rows_BTD = x_BTD.reshape(-1, *x_BTD.shape[-2:])
    logits_BTV = masked_logits(rows_BTD, head_VD, config.vocab_size)[..., : config.vocab_size]
    return logits_BTV.reshape(*x_BTD.shape[:-1], config.vocab_size)
