"""Causal attention: kernels as pure functions of q, k, v, and the one function that chooses among them.

None but `full_attention` ever holds the [time, keys] matrix of scores, in neither direction, and little of what is
masked is computed: neither the later half nor, in a banded layer, what lies before the band. The gradients are written
by hand from the saved log-sum-exp (Dao et al. 2022, "FlashAttention", section 3.1 and appendix B), which also spares
the softmax's costly automatic derivative.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax.parallel import constrain, on_one_device, per_device

# Finite, so that a row which may see nothing (padding) gives numbers and not NaN.
MASKED = -1e30

# Small enough to skip most of what is masked, large enough for the matrix units; measured on CPU.
QUERY_BLOCK = 128
# Each block of dense attention is code of its own: longer sequences get larger blocks instead of more of them.
MAX_BLOCKS = 16
SMALLEST_BAND_BLOCK = 8
# Scores of a banded layer alive at once: more would only leave the CPU's caches.
SCORE_ELEMENTS = 2**20

# Lanes of a TPU's vector unit: the splash kernel cuts time into whole multiples of them.
TPU_LANES = 128
# The kernel's own choice would be 128, which leaves the matrix units waiting; 512 fits the vector memory of v4 to v6e
# in float32 with heads of 256 as well, 1024 does not.
SPLASH_BLOCKS = (512, 256, 128)

# What attention keeps for its backward pass, by name: see `gpt.SAVED_NAMES`.
OUTPUT_NAME, LOGSUMEXP_NAME = 'attention', 'attention_logsumexp'


def choose_kernel(
    device: jax.Device,
    dtype: jnp.dtype,
    head_dim: int,
    *,
    band: int | None = None,
    dropout: bool = False,
    documents: bool = False,
    time: int | None = None,
    divides: bool = True,
    time_is_split: bool = False,
) -> str:
    """The kernel for whole sequences on a device like `device`.

    'full', 'cudnn', 'splash', 'banded' or 'blockwise'; where time is split over devices 'full', 'ring' or
    'ring_banded'.

    Args:
      device: one that the program is compiled for, which need not be here (`parallel.target_device`).
      dtype, head_dim: of queries, keys and values.
      band: of the layer; None where it is dense.
      dropout: whether probabilities are dropped.
      documents: whether rows hold several documents that do not see each other.
      time: tokens of a sequence; None where it is not known.
      divides: whether the mesh divides batch and heads evenly, so that each device can have some of them to itself.
      time_is_split: whether each device has a part of the time (`ring.can_split_time`).
    """
    if dropout:
        return 'full'  # no fused kernel has dropout on the probabilities
    if time_is_split:
        return 'ring' if band is None else 'ring_banded'
    # cuDNN would take documents only as a whole [time, keys] matrix for each row, added to the scores.
    if not documents and _cudnn_takes(device, dtype, head_dim):
        return 'cudnn'
    if divides and _splash_takes(device, dtype, head_dim, time):
        return 'splash'
    return 'blockwise' if band is None else 'banded'


def _cudnn_takes(device: jax.Device, dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether cuDNN's fused kernel has this case: it raises where it does not, and never falls back by itself."""
    if device.platform not in ('gpu', 'cuda'):
        return False
    try:
        # '9.0' with CUDA; ROCm's devices have names there, such as 'gfx90a'.
        capability = tuple(int(part) for part in device.compute_capability.split('.'))
    except (AttributeError, ValueError):
        return False
    # None before Ampere (8.0), and wider heads from Hopper (9.0) on.
    widest = 256 if capability >= (9, 0) else 128 if capability >= (8, 0) else 0
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= widest


def _splash_takes(device: jax.Device, dtype: jnp.dtype, head_dim: int, time: int | None) -> bool:
    """Whether the TPU's splash kernel has this case: it raises where it does not, or Mosaic, which compiles it."""
    # float16 is no type of Mosaic's; wider heads than 256 are nobody's and were not tried.
    takes = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) and head_dim <= 256
    return device.platform == 'tpu' and takes and time is not None and time % TPU_LANES == 0


def visible(queries_BT: jax.Array, keys_BS: jax.Array, band: int | None) -> jax.Array:
    """Which keys a query sees, [batch, time, keys], by the positions of both; `band` counts the query itself."""
    queries_BT1, keys_B1S = queries_BT[:, :, None], keys_BS[:, None, :]
    seen_BTS = keys_B1S <= queries_BT1
    return seen_BTS if band is None else seen_BTS & (keys_B1S > queries_BT1 - band)


def masked_scores(q_BNTK: jax.Array, k_BNSK: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
    """scale q k where a query may see a key, in float32: [batch, heads, time, keys]."""
    scores_BNTS = jnp.einsum('BNTK,BNSK->BNTS', q_BNTK * scale, k_BNSK, preferred_element_type=jnp.float32)
    return jnp.where(mask_BTS[:, None], scores_BNTS, MASKED)


def attention_weights(q_BNTK: jax.Array, k_BNSK: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
    """softmax(scale q k) over the keys a query may see, in float32: [batch, heads, time, keys]."""
    return jax.nn.softmax(masked_scores(q_BNTK, k_BNSK, mask_BTS, scale), axis=-1)


def full_attention(
    q_BNTK: jax.Array,
    k_BNTK: jax.Array,
    v_BNTK: jax.Array,
    documents_BT: jax.Array | None,
    scale: float,
    band: int | None,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Attention by all its probabilities, [batch, heads, time, time] in float32, which `drop` is applied to.

    Where time is split over devices each has the probabilities of its own queries, and all keys and values.
    """
    whole = {'called': 'keys and values of attention with dropout, each'}
    k_BNTK, v_BNTK = (constrain(y_BNTK, 'batch', 'heads', None, 'head_dim', **whole) for y_BNTK in (k_BNTK, v_BNTK))
    order_1T = jnp.arange(q_BNTK.shape[2])[None]
    mask_BTS = visible(order_1T, order_1T, band)
    if documents_BT is not None:
        mask_BTS = mask_BTS & (documents_BT[:, :, None] == documents_BT[:, None, :])
    weights_BNTS = drop(attention_weights(q_BNTK, k_BNTK, mask_BTS, scale))
    weights_BNTS = constrain(weights_BNTS, 'batch', 'heads', 'time', None, called='attention probabilities')
    return jnp.einsum('BNTS,BNSK->BNTK', weights_BNTS.astype(q_BNTK.dtype), v_BNTK)


def cudnn_attention(
    q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, scale: float, band: int | None
) -> jax.Array:
    """cuDNN's fused kernel, which raises in every case that `choose_kernel` does not give it."""
    qkv_BTNK = (y.transpose(0, 2, 1, 3) for y in (q_BNTK, k_BNTK, v_BNTK))
    # cuDNN's window does not count the query itself.
    window = None if band is None else (band - 1, 0)
    settings = {'scale': scale, 'is_causal': True, 'local_window_size': window, 'implementation': 'cudnn'}
    return jax.nn.dot_product_attention(*qkv_BTNK, **settings).transpose(0, 2, 1, 3)


def splash_attention(
    q_BNTK: jax.Array,
    k_BNTK: jax.Array,
    v_BNTK: jax.Array,
    documents_BT: jax.Array | None,
    scale: float,
    band: int | None,
    interpret: bool = False,
) -> jax.Array:
    """The TPU's fused kernel, which skips the blocks that a mask hides wholly, forward and backward.

    The compiler cannot split it: each device of the mesh runs it on its own rows and heads. Arguments and result as of
    `blockwise_attention`; `interpret` runs it without a TPU, slowly.
    """
    # Imported here: Pallas takes a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def attend(q_BNTK, k_BNTK, v_BNTK, documents_BT):
        heads, time = q_BNTK.shape[1:3]
        # Its window does not count the query itself.
        mask = splash.CausalMask((time, time)) if band is None else splash.LocalMask((time, time), (band - 1, 0), 0)
        largest = next(size for size in SPLASH_BLOCKS if time % size == 0)
        # Of a banded layer's blocks all keys of the window are computed: not much wider than the band.
        size = largest if band is None else min(largest, max(TPU_LANES, 2 ** (band - 1).bit_length()))
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(*[size] * 8),
            # Under one name both its output and its log-sum-exp: see `gpt.SAVED_NAMES`.
            residual_checkpoint_name=OUTPUT_NAME,
            interpret=interpret,
        )
        if documents_BT is None:
            return jax.vmap(kernel)(q_BNTK, k_BNTK, v_BNTK)
        return jax.vmap(kernel)(q_BNTK, k_BNTK, v_BNTK, splash.SegmentIds(documents_BT, documents_BT))

    arrays = ((q_BNTK * scale).astype(q_BNTK.dtype), k_BNTK, v_BNTK, documents_BT)
    if on_one_device():
        return attend(*arrays)
    by_head = ('batch', 'heads', None, 'head_dim')
    return per_device(attend, [by_head, by_head, by_head, ('batch', None)], by_head)(*arrays)


def cached_attention(
    q_BNTK: jax.Array,
    positions_BT: jax.Array,
    parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    scale: float,
    band: int | None,
) -> jax.Array:
    """Attention over keys and values in several parts, such as those of a cache and those of the new tokens.

    Args:
      q_BNTK: queries, at `positions_BT`.
      parts: keys [batch, heads, slots, head_dim], values of the same shape, and the position that each slot holds.
      scale, band: as of the other kernels.
    """
    scores = [
        masked_scores(q_BNTK, k_BNSK, visible(positions_BT, positions_BS, band), scale)
        for k_BNSK, _, positions_BS in parts
    ]
    weights_BNTS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    y_BNTK, start = 0.0, 0
    for _, v_BNSK, positions_BS in parts:
        stop = start + positions_BS.shape[1]
        # The cache may be narrower than what is computed in.
        of_part_BNTS = weights_BNTS[..., start:stop].astype(v_BNSK.dtype)
        y_BNTK += jnp.einsum('BNTS,BNSK->BNTK', of_part_BNTS, v_BNSK, preferred_element_type=jnp.float32)
        start = stop
    return y_BNTK.astype(q_BNTK.dtype)


_f32_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, documents_BT: jax.Array | None, scale: float
) -> jax.Array:
    """Causal softmax(scale q k) v.

    Args:
      q_BNTK: queries [batch, heads, time, head_dim]; keys and values of the same shape and dtype.
      documents_BT: int [batch, time]: a query sees keys of its own document alone; None: all are of one.
      scale: factor on the product of query and key.

    Returns:
      [batch, heads, time, head_dim] in the inputs' dtype; softmax in float32.
    """
    return _dense_forward(q_BNTK, k_BNTK, v_BNTK, documents_BT, scale)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def banded_attention(
    q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, documents_BT: jax.Array | None, scale: float, band: int
) -> jax.Array:
    """Causal softmax(scale q k) v in which a query sees `band` keys: its own and the ones right before it.

    Time and memory are proportional to time x band (Child et al. 2019, "Sparse Transformer", section 4: local
    attention). Arguments and result as of `blockwise_attention`.
    """
    return _banded_forward(q_BNTK, k_BNTK, v_BNTK, documents_BT, scale, band)[0]


def _attend(q_QK, k_SK, v_SK, visible_QS, scale):
    """Attention of one block of queries, or of many at once (leading dimensions), and its log-sum-exp."""
    out_QK, peak_Q1, total_Q1 = attend_part(q_QK, k_SK, v_SK, visible_QS, scale)
    return (out_QK / total_Q1).astype(q_QK.dtype), peak_Q1 + jnp.log(total_Q1)


def attend_part(q_QK, k_SK, v_SK, visible_QS, scale):
    """What some of the keys add to the softmax of a block of queries, in float32; None: all of them are visible.

    Returns:
      Values weighted by exp(score - peak), the peak, and the sum of the weights; all zeros beside a finite peak where a
      query sees none of these keys.
    """
    scores_QS = _scores(q_QK, k_SK, visible_QS, scale)
    peak_Q1 = jnp.max(scores_QS, axis=-1, keepdims=True, initial=MASKED)
    weights_QS = jnp.exp(scores_QS - peak_Q1)
    total_Q1 = jnp.sum(weights_QS, axis=-1, keepdims=True)
    return _f32_einsum('...QS,...SK->...QK', weights_QS.astype(v_SK.dtype), v_SK), peak_Q1, total_Q1


def _scores(q_QK, k_SK, visible_QS, scale):
    scores_QS = _f32_einsum('...QK,...SK->...QS', q_QK, k_SK) * scale
    return scores_QS if visible_QS is None else jnp.where(visible_QS, scores_QS, -jnp.inf)


def attend_gradients(q_QK, k_SK, v_SK, visible_QS, scale, logsumexp_Q1, delta_Q1, dout_QK):
    """Gradients of queries, and what these queries add to those of some of their keys and values, in float32.

    `logsumexp_Q1` and `delta_Q1` (of `output_dot_gradient`) are over all keys that a query sees, these among them.
    """
    scores_QS = _scores(q_QK, k_SK, visible_QS, scale)
    weights_QS = jnp.exp(scores_QS - logsumexp_Q1)
    dweights_QS = _f32_einsum('...QK,...SK->...QS', dout_QK, v_SK)
    dscores_QS = (weights_QS * (dweights_QS - delta_Q1) * scale).astype(q_QK.dtype)
    dq_QK = _f32_einsum('...QS,...SK->...QK', dscores_QS, k_SK)
    dk_SK = _f32_einsum('...QS,...QK->...SK', dscores_QS, q_QK)
    dv_SK = _f32_einsum('...QS,...QK->...SK', weights_QS.astype(q_QK.dtype), dout_QK)
    return dq_QK, dk_SK, dv_SK


def _residuals(q_BNTK, k_BNTK, v_BNTK, documents_BT, out_BNTK, logsumexp_BNT1):
    """What the backward pass needs; named, so that rematerialisation may keep the attention's own part."""
    out_BNTK = checkpoint_name(out_BNTK, OUTPUT_NAME)
    logsumexp_BNT1 = checkpoint_name(logsumexp_BNT1, LOGSUMEXP_NAME)
    return out_BNTK, (q_BNTK, k_BNTK, v_BNTK, documents_BT, out_BNTK, logsumexp_BNT1)


def output_dot_gradient(dout_BNTK, out_BNTK):
    """sum(dout out), float32 [..., 1]: the gradient of the log-sum-exp, which every score of a query shares."""
    return jnp.sum(dout_BNTK.astype(jnp.float32) * out_BNTK.astype(jnp.float32), axis=-1, keepdims=True)


def blocks_of(time: int) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of queries of dense attention."""
    size = max(QUERY_BLOCK, -(-time // MAX_BLOCKS))
    return [(start, min(start + size, time)) for start in range(0, time, size)]


def before(documents_BT: jax.Array | None, start: int, stop: int) -> jax.Array:
    """Which keys up to the last of them the queries from `start` to `stop` see: [Q, S], or [B, 1, Q, S]."""
    visible_QS = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
    if documents_BT is None:
        return visible_QS
    return visible_QS & (documents_BT[:, None, start:stop, None] == documents_BT[:, None, None, :stop])


def _dense_forward(q_BNTK, k_BNTK, v_BNTK, documents_BT, scale):
    outputs, logsumexps = [], []
    for start, stop in blocks_of(q_BNTK.shape[2]):
        block = (q_BNTK[:, :, start:stop], k_BNTK[:, :, :stop], v_BNTK[:, :, :stop])
        out_BNQK, logsumexp_BNQ1 = _attend(*block, before(documents_BT, start, stop), scale)
        outputs.append(out_BNQK)
        logsumexps.append(logsumexp_BNQ1)
    out_BNTK, logsumexp_BNT1 = jnp.concatenate(outputs, axis=2), jnp.concatenate(logsumexps, axis=2)
    return _residuals(q_BNTK, k_BNTK, v_BNTK, documents_BT, out_BNTK, logsumexp_BNT1)


def _dense_backward(scale, residuals, dout_BNTK):
    *arrays, out_BNTK, logsumexp_BNT1 = residuals
    delta_BNT1 = output_dot_gradient(dout_BNTK, out_BNTK)
    gradients = causal_gradients(*arrays, logsumexp_BNT1, delta_BNT1, dout_BNTK, scale)
    return (*(gradient.astype(dout_BNTK.dtype) for gradient in gradients), None)


def causal_gradients(q_BNTK, k_BNTK, v_BNTK, documents_BT, logsumexp_BNT1, delta_BNT1, dout_BNTK, scale):
    """Of queries, keys and values of causal attention, in float32, a block of queries at a time."""
    dq_blocks = []
    dk_BNTK = jnp.zeros(k_BNTK.shape, jnp.float32)
    dv_BNTK = jnp.zeros(v_BNTK.shape, jnp.float32)
    for start, stop in blocks_of(q_BNTK.shape[2]):
        block = (q_BNTK[:, :, start:stop], k_BNTK[:, :, :stop], v_BNTK[:, :, :stop])
        of_queries = (array[:, :, start:stop] for array in (logsumexp_BNT1, delta_BNT1, dout_BNTK))
        visible = before(documents_BT, start, stop)
        dq_BNQK, dk_BNSK, dv_BNSK = attend_gradients(*block, visible, scale, *of_queries)
        dq_blocks.append(dq_BNQK)
        dk_BNTK = dk_BNTK.at[:, :, :stop].add(dk_BNSK)
        dv_BNTK = dv_BNTK.at[:, :, :stop].add(dv_BNSK)
    return jnp.concatenate(dq_blocks, axis=2), dk_BNTK, dv_BNTK


blockwise_attention.defvjp(_dense_forward, _dense_backward)


@dataclasses.dataclass(frozen=True)
class _Band:
    """How a banded layer's queries are cut: in blocks of `size`, each of which also sees the `back` blocks before it.

    `group` blocks are worked on at once, `steps` times; time is padded to a whole number of groups.
    """

    band: int
    size: int
    back: int
    group: int
    steps: int

    @classmethod
    def of(cls, shape: tuple[int, ...], band: int) -> '_Band':
        batch, heads, time, _ = shape
        size = min(QUERY_BLOCK, max(SMALLEST_BAND_BLOCK, band))
        back = -(-(band - 1) // size)
        blocks = -(-time // size)
        at_once = max(1, SCORE_ELEMENTS // (batch * heads * size * (back + 1) * size))
        steps = -(-blocks // at_once)
        return cls(band, size, back, -(-blocks // steps), steps)

    def padded(self, x_BNTK: jax.Array, time: int, is_key: bool = False) -> jax.Array:
        """The last `time` of x and what stands before them, with zeros up to a whole number of groups after it.

        Of keys also with as many before it as make `back` blocks of what precedes the queries.
        """
        before = self.back * self.size - (x_BNTK.shape[2] - time) if is_key else 0
        after = self.steps * self.group * self.size - time
        return jnp.pad(x_BNTK, ((0, 0), (0, 0), (before, after), (0, 0)))

    def blocks(self, x_BNTK: jax.Array, step: jax.Array, extra: int = 0) -> jax.Array:
        """[batch, heads, group + extra, size, ...]: the blocks of one step."""
        count = self.group + extra
        part = jax.lax.dynamic_slice_in_dim(x_BNTK, step * self.group * self.size, count * self.size, axis=2)
        return part.reshape(*part.shape[:2], count, self.size, part.shape[3])

    def windows(self, x_BNTK: jax.Array, step: jax.Array) -> jax.Array:
        """The keys that each block of one step sees: those of the blocks before it and its own."""
        blocks = self.blocks(x_BNTK, step, self.back)
        return jnp.concatenate([blocks[:, :, i : i + self.group] for i in range(self.back + 1)], axis=3)

    def add_windows(self, total_BNTK: jax.Array, windows: jax.Array, step: jax.Array) -> jax.Array:
        """The transpose of `windows`: adds what each window holds to where it is from."""
        part = self.blocks(total_BNTK, step, self.back)
        for i in range(self.back + 1):
            part = part.at[:, :, i : i + self.group].add(windows[:, :, :, i * self.size : (i + 1) * self.size])
        part = part.reshape(*part.shape[:2], -1, part.shape[-1])
        return jax.lax.dynamic_update_slice_in_dim(total_BNTK, part, step * self.group * self.size, axis=2)

    def visible(
        self, step: jax.Array, documents: tuple[jax.Array, jax.Array] | None, start: jax.Array | int
    ) -> jax.Array:
        """[group, size, (back + 1) size], or [batch, 1, ...]: which keys of its window a query sees.

        `documents`, of queries and of keys, are padded; `start` is the place of the first query in its sequence.
        """
        width = (self.back + 1) * self.size
        offset_QS = jnp.arange(width) - self.back * self.size - jnp.arange(self.size)[:, None]
        first_G1 = (step * self.group + jnp.arange(self.group)[:, None] - self.back) * self.size + start
        visible_GQS = ((offset_QS <= 0) & (offset_QS > -self.band)) & (first_G1 + jnp.arange(width) >= 0)[:, None]
        if documents is None:
            return visible_GQS
        of_queries, of_keys = self.blocks(documents[0], step), self.windows(documents[1], step)
        return visible_GQS & (of_queries == of_keys.swapaxes(-1, -2))


def _join_steps(parts: jax.Array, time: int) -> jax.Array:
    """[steps, batch, heads, group, size, ...] -> [batch, heads, time, ...]."""
    parts = jnp.moveaxis(parts, 0, 2)
    return parts.reshape(*parts.shape[:2], -1, parts.shape[-1])[:, :, :time]


def banded_part(q_BNTK, k_BNSK, v_BNSK, documents, scale, band, start=0):
    """Attention in a band, and its log-sum-exp, of queries that may be a part of their sequence.

    Args:
      q_BNTK: consecutive queries.
      k_BNSK, v_BNSK: those of the queries, after as many of what stands before them as there are or as the band needs.
      documents: int arrays of the queries and of the keys, [batch, time] and [batch, keys], or None.
      scale, band: as of the other kernels.
      start: the place of the first query in its sequence.
    """
    time, cut = q_BNTK.shape[2], _Band.of(q_BNTK.shape, band)
    queries, keys, values, documents = _padded(cut, q_BNTK, k_BNSK, v_BNSK, documents)

    def attend(_, step):
        windows = (cut.windows(keys, step), cut.windows(values, step))
        return None, _attend(cut.blocks(queries, step), *windows, cut.visible(step, documents, start), scale)

    _, parts = jax.lax.scan(attend, None, jnp.arange(cut.steps))
    return tuple(_join_steps(part, time) for part in parts)


def banded_gradients(q_BNTK, k_BNSK, v_BNSK, documents, logsumexp_BNT1, delta_BNT1, dout_BNTK, scale, band, start=0):
    """Of the queries, keys and values of `banded_part`, in float32."""
    time, cut = q_BNTK.shape[2], _Band.of(q_BNTK.shape, band)
    queries, keys, values, documents = _padded(cut, q_BNTK, k_BNSK, v_BNSK, documents)
    of_queries = [queries, *(cut.padded(array, time) for array in (logsumexp_BNT1, delta_BNT1, dout_BNTK))]

    def gradients(carry, step):
        queries, *blocks = (cut.blocks(array, step) for array in of_queries)
        windows = (cut.windows(keys, step), cut.windows(values, step))
        dq, *dwindows = attend_gradients(queries, *windows, cut.visible(step, documents, start), scale, *blocks)
        return tuple(cut.add_windows(total, dw, step) for total, dw in zip(carry, dwindows, strict=True)), dq

    zeros = jnp.zeros(keys.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(gradients, (zeros, zeros), jnp.arange(cut.steps))
    stop = cut.back * cut.size + time
    first = stop - k_BNSK.shape[2]
    return _join_steps(dq, time), dk[:, :, first:stop], dv[:, :, first:stop]


def _padded(cut, q_BNTK, k_BNSK, v_BNSK, documents):
    time = q_BNTK.shape[2]
    keys, values = (cut.padded(array, time, is_key=True) for array in (k_BNSK, v_BNSK))
    if documents is not None:
        of_queries, of_keys = (array[:, None, :, None] for array in documents)
        documents = cut.padded(of_queries, time), cut.padded(of_keys, time, is_key=True)
    return cut.padded(q_BNTK, time), keys, values, documents


def _banded_forward(q_BNTK, k_BNTK, v_BNTK, documents_BT, scale, band):
    documents = None if documents_BT is None else (documents_BT, documents_BT)
    parts = banded_part(q_BNTK, k_BNTK, v_BNTK, documents, scale, band)
    return _residuals(q_BNTK, k_BNTK, v_BNTK, documents_BT, *parts)


def _banded_backward(scale, band, residuals, dout_BNTK):
    q_BNTK, k_BNTK, v_BNTK, documents_BT, out_BNTK, logsumexp_BNT1 = residuals
    documents = None if documents_BT is None else (documents_BT, documents_BT)
    arrays = (logsumexp_BNT1, output_dot_gradient(dout_BNTK, out_BNTK), dout_BNTK)
    gradients = banded_gradients(q_BNTK, k_BNTK, v_BNTK, documents, *arrays, scale, band)
    return (*(gradient.astype(q_BNTK.dtype) for gradient in gradients), None)


banded_attention.defvjp(_banded_forward, _banded_backward)
