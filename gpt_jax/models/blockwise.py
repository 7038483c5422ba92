"""Causal attention in blocks of queries, each over only the keys it may see.

The full [time, keys] matrix is never held, in neither direction, and the masked half is never computed: the gradient
is written by hand from the saved log-sum-exp (Dao et al. 2022, "FlashAttention", section 3.1 and appendix B), which
also spares the softmax's costly automatic derivative.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Small enough to skip most of the masked half, large enough for the matrix units; measured on CPU.
QUERY_BLOCK = 128
# Each block is code of its own: longer sequences get larger blocks instead of more of them.
MAX_BLOCKS = 16

_f32_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def blockwise_attention(q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array) -> jax.Array:
    """Causal softmax(q k / sqrt(head_dim)) v.

    Args:
      q_BNTK: queries [batch, heads, time, head_dim]; keys and values of the same shape and dtype.

    Returns:
      [batch, heads, time, head_dim] in the inputs' dtype; softmax in float32.
    """
    return _forward(q_BNTK, k_BNTK, v_BNTK)[0]


def _blocks(time: int) -> list[tuple[int, int]]:
    size = max(QUERY_BLOCK, -(-time // MAX_BLOCKS))
    return [(start, min(start + size, time)) for start in range(0, time, size)]


def _scores(q_BNQK, k_BNSK, start):
    """Scaled scores of the queries from `start` on against the keys up to the last of them, masked."""
    scores_BNQS = _f32_einsum('BNQK,BNSK->BNQS', q_BNQK, k_BNSK) * (1.0 / math.sqrt(q_BNQK.shape[-1]))
    queries, keys = scores_BNQS.shape[-2:]
    visible_QS = jnp.arange(keys) <= jnp.arange(start, start + queries)[:, None]
    return jnp.where(visible_QS, scores_BNQS, -jnp.inf)


def _forward(q_BNTK, k_BNTK, v_BNTK):
    outputs, logsumexps = [], []
    for start, stop in _blocks(q_BNTK.shape[2]):
        scores_BNQS = _scores(q_BNTK[:, :, start:stop], k_BNTK[:, :, :stop], start)
        peak_BNQ1 = jnp.max(scores_BNQS, axis=-1, keepdims=True)
        weights_BNQS = jnp.exp(scores_BNQS - peak_BNQ1)
        total_BNQ1 = jnp.sum(weights_BNQS, axis=-1, keepdims=True)
        out_BNQK = _f32_einsum('BNQS,BNSK->BNQK', weights_BNQS.astype(v_BNTK.dtype), v_BNTK[:, :, :stop])
        outputs.append((out_BNQK / total_BNQ1).astype(q_BNTK.dtype))
        logsumexps.append(peak_BNQ1 + jnp.log(total_BNQ1))
    out_BNTK, logsumexp_BNT1 = jnp.concatenate(outputs, axis=2), jnp.concatenate(logsumexps, axis=2)
    return out_BNTK, (q_BNTK, k_BNTK, v_BNTK, out_BNTK, logsumexp_BNT1)


def _backward(residuals, dout_BNTK):
    q_BNTK, k_BNTK, v_BNTK, out_BNTK, logsumexp_BNT1 = residuals
    dtype, scale = q_BNTK.dtype, 1.0 / math.sqrt(q_BNTK.shape[-1])
    delta_BNT1 = jnp.sum(dout_BNTK.astype(jnp.float32) * out_BNTK.astype(jnp.float32), axis=-1, keepdims=True)
    dq_blocks = []
    dk_BNTK = jnp.zeros(k_BNTK.shape, jnp.float32)
    dv_BNTK = jnp.zeros(v_BNTK.shape, jnp.float32)
    for start, stop in _blocks(q_BNTK.shape[2]):
        q_BNQK, dout_BNQK = q_BNTK[:, :, start:stop], dout_BNTK[:, :, start:stop]
        k_BNSK, v_BNSK = k_BNTK[:, :, :stop], v_BNTK[:, :, :stop]
        weights_BNQS = jnp.exp(_scores(q_BNQK, k_BNSK, start) - logsumexp_BNT1[:, :, start:stop])
        dweights_BNQS = _f32_einsum('BNQK,BNSK->BNQS', dout_BNQK, v_BNSK)
        dscores_BNQS = (weights_BNQS * (dweights_BNQS - delta_BNT1[:, :, start:stop]) * scale).astype(dtype)
        dq_blocks.append(_f32_einsum('BNQS,BNSK->BNQK', dscores_BNQS, k_BNSK))
        dk_BNTK = dk_BNTK.at[:, :, :stop].add(_f32_einsum('BNQS,BNQK->BNSK', dscores_BNQS, q_BNQK))
        dv_BNTK = dv_BNTK.at[:, :, :stop].add(_f32_einsum('BNQS,BNQK->BNSK', weights_BNQS.astype(dtype), dout_BNQK))
    return jnp.concatenate(dq_blocks, axis=2).astype(dtype), dk_BNTK.astype(dtype), dv_BNTK.astype(dtype)


blockwise_attention.defvjp(_forward, _backward)
