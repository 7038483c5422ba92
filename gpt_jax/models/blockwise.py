"""Causal attention in blocks of queries, each over only the keys it may see.

The full [time, keys] matrix is never held, in neither direction, and little of what is masked is computed: neither the
later half nor, in a banded layer, what lies before the band. The gradient is written by hand from the saved log-sum-exp
(Dao et al. 2022, "FlashAttention", section 3.1 and appendix B), which also spares the softmax's costly automatic
derivative.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Small enough to skip most of what is masked, large enough for the matrix units; measured on CPU.
QUERY_BLOCK = 128
# Each block of dense attention is code of its own: longer sequences get larger blocks instead of more of them.
MAX_BLOCKS = 16
SMALLEST_BAND_BLOCK = 8

# What attention keeps for its backward pass: see `attention.SAVED_NAMES`.
OUTPUT_NAME, LOGSUMEXP_NAME = 'attention', 'attention_logsumexp'

_f32_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blockwise_attention(q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, scale: float) -> jax.Array:
    """Causal softmax(scale q k) v.

    Args:
      q_BNTK: queries [batch, heads, time, head_dim]; keys and values of the same shape and dtype.
      scale: factor on the product of query and key.

    Returns:
      [batch, heads, time, head_dim] in the inputs' dtype; softmax in float32.
    """
    return _dense_forward(q_BNTK, k_BNTK, v_BNTK, scale)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def banded_attention(q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, scale: float, band: int) -> jax.Array:
    """Causal softmax(scale q k) v in which a query sees `band` keys: its own and the ones right before it.

    Time and memory are proportional to time x band (Child et al. 2019, "Sparse Transformer", section 4: local
    attention). Arguments and result as of `blockwise_attention`.
    """
    return _banded_forward(q_BNTK, k_BNTK, v_BNTK, scale, band)[0]


def _attend(q_QK, k_SK, v_SK, visible_QS, scale):
    """Attention of one block of queries, or of many at once (leading dimensions), and its log-sum-exp."""
    scores_QS = jnp.where(visible_QS, _f32_einsum('...QK,...SK->...QS', q_QK, k_SK) * scale, -jnp.inf)
    peak_Q1 = jnp.max(scores_QS, axis=-1, keepdims=True)
    weights_QS = jnp.exp(scores_QS - peak_Q1)
    total_Q1 = jnp.sum(weights_QS, axis=-1, keepdims=True)
    out_QK = _f32_einsum('...QS,...SK->...QK', weights_QS.astype(v_SK.dtype), v_SK)
    return (out_QK / total_Q1).astype(q_QK.dtype), peak_Q1 + jnp.log(total_Q1)


def _attend_gradients(q_QK, k_SK, v_SK, visible_QS, scale, logsumexp_Q1, delta_Q1, dout_QK):
    """Gradients of the queries, keys and values of `_attend`, in float32."""
    scores_QS = jnp.where(visible_QS, _f32_einsum('...QK,...SK->...QS', q_QK, k_SK) * scale, -jnp.inf)
    weights_QS = jnp.exp(scores_QS - logsumexp_Q1)
    dweights_QS = _f32_einsum('...QK,...SK->...QS', dout_QK, v_SK)
    dscores_QS = (weights_QS * (dweights_QS - delta_Q1) * scale).astype(q_QK.dtype)
    dq_QK = _f32_einsum('...QS,...SK->...QK', dscores_QS, k_SK)
    dk_SK = _f32_einsum('...QS,...QK->...SK', dscores_QS, q_QK)
    dv_SK = _f32_einsum('...QS,...QK->...SK', weights_QS.astype(q_QK.dtype), dout_QK)
    return dq_QK, dk_SK, dv_SK


def _residuals(q_BNTK, k_BNTK, v_BNTK, out_BNTK, logsumexp_BNT1):
    """What the backward pass needs; named, so that rematerialisation may keep the attention's own part."""
    out_BNTK = checkpoint_name(out_BNTK, OUTPUT_NAME)
    return out_BNTK, (q_BNTK, k_BNTK, v_BNTK, out_BNTK, checkpoint_name(logsumexp_BNT1, LOGSUMEXP_NAME))


def _delta(dout_BNTK, out_BNTK):
    return jnp.sum(dout_BNTK.astype(jnp.float32) * out_BNTK.astype(jnp.float32), axis=-1, keepdims=True)


def _blocks(time: int) -> list[tuple[int, int]]:
    size = max(QUERY_BLOCK, -(-time // MAX_BLOCKS))
    return [(start, min(start + size, time)) for start in range(0, time, size)]


def _before(start: int, stop: int) -> jax.Array:
    """Which keys up to the last of them the queries from `start` to `stop` see."""
    return jnp.arange(stop) <= jnp.arange(start, stop)[:, None]


def _dense_forward(q_BNTK, k_BNTK, v_BNTK, scale):
    outputs, logsumexps = [], []
    for start, stop in _blocks(q_BNTK.shape[2]):
        block = (q_BNTK[:, :, start:stop], k_BNTK[:, :, :stop], v_BNTK[:, :, :stop])
        out_BNQK, logsumexp_BNQ1 = _attend(*block, _before(start, stop), scale)
        outputs.append(out_BNQK)
        logsumexps.append(logsumexp_BNQ1)
    out_BNTK, logsumexp_BNT1 = jnp.concatenate(outputs, axis=2), jnp.concatenate(logsumexps, axis=2)
    return _residuals(q_BNTK, k_BNTK, v_BNTK, out_BNTK, logsumexp_BNT1)


def _dense_backward(scale, residuals, dout_BNTK):
    q_BNTK, k_BNTK, v_BNTK, out_BNTK, logsumexp_BNT1 = residuals
    delta_BNT1 = _delta(dout_BNTK, out_BNTK)
    dq_blocks = []
    dk_BNTK = jnp.zeros(k_BNTK.shape, jnp.float32)
    dv_BNTK = jnp.zeros(v_BNTK.shape, jnp.float32)
    for start, stop in _blocks(q_BNTK.shape[2]):
        block = (q_BNTK[:, :, start:stop], k_BNTK[:, :, :stop], v_BNTK[:, :, :stop], _before(start, stop), scale)
        of_queries = (array[:, :, start:stop] for array in (logsumexp_BNT1, delta_BNT1, dout_BNTK))
        dq_BNQK, dk_BNSK, dv_BNSK = _attend_gradients(*block, *of_queries)
        dq_blocks.append(dq_BNQK)
        dk_BNTK = dk_BNTK.at[:, :, :stop].add(dk_BNSK)
        dv_BNTK = dv_BNTK.at[:, :, :stop].add(dv_BNSK)
    gradients = (jnp.concatenate(dq_blocks, axis=2), dk_BNTK, dv_BNTK)
    return tuple(gradient.astype(q_BNTK.dtype) for gradient in gradients)


blockwise_attention.defvjp(_dense_forward, _dense_backward)


def _band_blocks(time: int, band: int) -> tuple[int, int, int]:
    """(queries in a block, blocks, blocks before its own that a block sees)."""
    size = min(QUERY_BLOCK, max(SMALLEST_BAND_BLOCK, band))
    return size, -(-time // size), -(-(band - 1) // size)


def _query_blocks(x_BNTK, size: int, count: int):
    """[batch, heads, time, ...] -> [batch, heads, count, size, ...], padded at the end with zeros."""
    batch, heads, time, width = x_BNTK.shape
    padded = jnp.pad(x_BNTK, ((0, 0), (0, 0), (0, count * size - time), (0, 0)))
    return padded.reshape(batch, heads, count, size, width)


def _key_windows(x_BNTK, size: int, count: int, back: int):
    """The keys of each block: those of the `back` blocks before it and its own."""
    blocks = _query_blocks(x_BNTK, size, count)
    padded = jnp.pad(blocks, ((0, 0), (0, 0), (back, 0), (0, 0), (0, 0)))
    return jnp.concatenate([padded[:, :, i : i + count] for i in range(back + 1)], axis=3)


def _sum_windows(dwindows, size: int, count: int, back: int):
    """The transpose of `_key_windows`, without its cut to the true length."""
    batch, heads, _, _, width = dwindows.shape
    total = jnp.zeros((batch, heads, back + count, size, width), dwindows.dtype)
    for i in range(back + 1):
        total = total.at[:, :, i : i + count].add(dwindows[:, :, :, i * size : (i + 1) * size])
    return total[:, :, back:].reshape(batch, heads, count * size, width)


def _in_band(size: int, count: int, back: int, band: int) -> jax.Array:
    """[count, size, (back + 1) size]: which keys of its window a query sees."""
    offset_QS = jnp.arange((back + 1) * size) - back * size - jnp.arange(size)[:, None]
    key_CS = (jnp.arange(count)[:, None] - back) * size + jnp.arange((back + 1) * size)
    return ((offset_QS <= 0) & (offset_QS > -band)) & (key_CS >= 0)[:, None]


def _banded_forward(q_BNTK, k_BNTK, v_BNTK, scale, band):
    batch, heads, time, width = q_BNTK.shape
    size, count, back = _band_blocks(time, band)
    windows = (_key_windows(array, size, count, back) for array in (k_BNTK, v_BNTK))
    visible = _in_band(size, count, back, band)
    out, logsumexp = _attend(_query_blocks(q_BNTK, size, count), *windows, visible, scale)
    out_BNTK = out.reshape(batch, heads, count * size, width)[:, :, :time]
    logsumexp_BNT1 = logsumexp.reshape(batch, heads, count * size, 1)[:, :, :time]
    return _residuals(q_BNTK, k_BNTK, v_BNTK, out_BNTK, logsumexp_BNT1)


def _banded_backward(scale, band, residuals, dout_BNTK):
    q_BNTK, k_BNTK, v_BNTK, out_BNTK, logsumexp_BNT1 = residuals
    batch, heads, time, width = q_BNTK.shape
    size, count, back = _band_blocks(time, band)
    windows = (_key_windows(array, size, count, back) for array in (k_BNTK, v_BNTK))
    of_queries = (logsumexp_BNT1, _delta(dout_BNTK, out_BNTK), dout_BNTK)
    blocks = (_query_blocks(array, size, count) for array in of_queries)
    queries = _query_blocks(q_BNTK, size, count)
    visible = _in_band(size, count, back, band)
    dq, dk, dv = _attend_gradients(queries, *windows, visible, scale, *blocks)
    dq_BNTK = dq.reshape(batch, heads, count * size, width)
    gradients = (dq_BNTK, _sum_windows(dk, size, count, back), _sum_windows(dv, size, count, back))
    return tuple(gradient[:, :, :time].astype(q_BNTK.dtype) for gradient in gradients)


banded_attention.defvjp(_banded_forward, _banded_backward)
