"""Attention where the tokens of a sequence are split over the devices of `mesh.context`: nobody gathers them.

Of a dense layer each device keeps its queries, and the keys and values travel round a ring: while a device works on
those it has, it sends them on and receives the next (Liu et al. 2023, "Ring Attention with Blockwise Transformers",
algorithm 1). What each part of the keys adds to the softmax is combined as FlashAttention does. In the backward pass
the gradients of keys and values travel with them, and are at home after a whole round.

With consecutive tokens the first device would soon be done, as its queries see hardly any keys. So attention alone
works in another order (Brandon et al. 2023, "Striped Attention", has the problem; the order in pairs of halves is that
of Dubey et al. 2024, "The Llama 3 Herd of Models", section 3.3.2): of 2c halves of a device's share, device j of c has
number j and number 2c - 1 - j. Then at every stop of the ring every device has two pairs of halves to work on of which
each query sees each key: its later queries with the earlier of the visiting halves, and besides, where the visitors are
from before, its earlier queries with the same, else its later queries with the later. Nothing masked is computed, and
no device waits for another. Everything outside of attention sees consecutive tokens: halves are exchanged before and
after.

A banded layer needs no ring: each device receives the last keys of the devices before it, as far as the band reaches.

Shapes inside of `per_device`: T is a device's share of the time, H half of it; the leading dimension of `halves` is the
two halves, and its second one queries, keys and values.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax.models.attention import (
    LOGSUMEXP_NAME,
    MASKED,
    MAX_BLOCKS,
    OUTPUT_NAME,
    QUERY_BLOCK,
    attend_gradients,
    attend_part,
    banded_gradients,
    banded_part,
    before,
    blocks_of,
    causal_gradients,
    output_dot_gradient,
)
from gpt_jax.parallel import can_split, current_mesh, per_device

AXIS = 'context'

# How the arrays lie on the mesh. Documents are whole on every device: a number for each token.
TOKENS, STATISTICS, DOCUMENTS = (
    ('batch', 'heads', 'time', 'head_dim'),
    ('batch', 'heads', 'time', None),
    ('batch', None),
)
HALVES, HALF_STATISTICS = (None, None, *TOKENS), (None, *STATISTICS)


def can_split_time(shape: tuple[int, ...]) -> bool:
    """Whether queries [batch, heads, time, head_dim] of this shape are attended to by the kernels of this page."""
    if not can_split(shape, *TOKENS):
        return False
    devices = current_mesh().shape[AXIS]
    return devices > 1 and shape[2] % (2 * devices) == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, documents_BT: jax.Array | None, scale: float
) -> jax.Array:
    """Causal softmax(scale q k) v over time that is split; arguments and result as of `blockwise_attention`."""
    return _ring_forward(q_BNTK, k_BNTK, v_BNTK, documents_BT, scale)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ring_banded_attention(
    q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, documents_BT: jax.Array | None, scale: float, band: int
) -> jax.Array:
    """`banded_attention` over time that is split."""
    return _banded_forward(q_BNTK, k_BNTK, v_BNTK, documents_BT, scale, band)[0]


# Who has which half.


def _here() -> tuple[jax.Array, int]:
    """Which device of the ring this is, and how many there are."""
    return jax.lax.axis_index(AXIS), current_mesh().shape[AXIS]


def _moves(devices: int) -> list[list[tuple[int, int]]]:
    """(from, to) of the first halves of consecutive tokens, number 2i of device i, and of the second, number 2i + 1."""

    def holder(half):
        return half if half < devices else 2 * devices - 1 - half

    return [[(i, holder(2 * i + second)) for i in range(devices)] for second in (0, 1)]


def _exchange(x: jax.Array) -> jax.Array:
    """Consecutive tokens [..., T, K] -> the halves j and 2c - 1 - j, [2, ..., H, K]."""
    j, devices = _here()
    # Every device receives a half of an even number and one of an odd number.
    first, second = _moves(devices)
    even, odd = jnp.split(x, 2, axis=-2)
    even, odd = jax.lax.ppermute(even, AXIS, first), jax.lax.ppermute(odd, AXIS, second)
    return jnp.where(j % 2 == 0, jnp.stack([even, odd]), jnp.stack([odd, even]))


def _exchange_back(halves: jax.Array) -> jax.Array:
    """The inverse of `_exchange`."""
    j, devices = _here()
    even, odd = jnp.where(j % 2 == 0, halves, halves[::-1])
    first, second = ([(to, i) for i, to in moves] for moves in _moves(devices))
    return jnp.concatenate([jax.lax.ppermute(even, AXIS, first), jax.lax.ppermute(odd, AXIS, second)], axis=-2)


def _send_on(x: jax.Array) -> jax.Array:
    """From every device to the next one of the ring."""
    devices = current_mesh().shape[AXIS]
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % devices) for i in range(devices)])


# A dense layer.


def _exchange_all(q_BNTK, k_BNTK, v_BNTK):
    """Queries, keys and values as halves, [2, 3, ...]."""
    return per_device(lambda *arrays: _exchange(jnp.stack(arrays)), [TOKENS] * 3, HALVES)(q_BNTK, k_BNTK, v_BNTK)


def _ring_forward(q_BNTK, k_BNTK, v_BNTK, documents_BT, scale):
    # By itself, so that rematerialisation which keeps the results below makes no more than this again.
    halves = _exchange_all(q_BNTK, k_BNTK, v_BNTK)
    attend = per_device(functools.partial(_attend_round, scale=scale), [HALVES, DOCUMENTS], [TOKENS, HALF_STATISTICS])
    out_BNTK, logsumexp = attend(halves, documents_BT)
    out_BNTK, logsumexp = checkpoint_name(out_BNTK, OUTPUT_NAME), checkpoint_name(logsumexp, LOGSUMEXP_NAME)
    return out_BNTK, (halves, documents_BT, out_BNTK, logsumexp)


def _ring_backward(scale, residuals, dout_BNTK):
    halves, documents_BT, out_BNTK, logsumexp = residuals
    delta_BNT1 = output_dot_gradient(dout_BNTK, out_BNTK)
    arrays = [HALVES, DOCUMENTS, HALF_STATISTICS, STATISTICS, TOKENS]
    gradients = per_device(functools.partial(_gradients_of_round, scale=scale), arrays, [TOKENS] * 3)
    return (*gradients(halves, documents_BT, logsumexp, delta_BNT1, dout_BNTK), None)


ring_attention.defvjp(_ring_forward, _ring_backward)


class _Documents:
    """Which documents the tokens of each half are of; None where rows are one document."""

    def __init__(self, documents_BT: jax.Array | None, half: int):
        self._documents_BT, self._half = documents_BT, half

    def of(self, *numbers: jax.Array) -> jax.Array | None:
        """Of the halves with these numbers, [halves, batch, 1, H, 1]."""
        if self._documents_BT is None:
            return None
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=self._half, axis=1)
        return jnp.stack([cut(self._documents_BT, number * self._half) for number in numbers])[:, :, None, :, None]


def _own_halves(halves, documents):
    """The arguments of causal attention within each half, both as rows of one batch: q, k, v and documents."""
    j, devices = _here()
    own = documents.of(j, 2 * devices - 1 - j)
    merged = [array.reshape(-1, *array.shape[2:]) for array in halves.swapaxes(0, 1)]
    return *merged, None if own is None else own.reshape(-1, own.shape[3])


def _pairs(q, kv, documents, step):
    """The pairs of halves that this device works on when its visitors have come `step` devices far.

    Returns:
      Whether the visitors are from before; queries, keys and values [2, ...], and the documents of queries and keys.
    """
    j, devices = _here()
    is_before, visitor = j >= step, (j - step) % devices
    early, late = j, 2 * devices - 1 - j
    queries = jnp.stack([q[1], jnp.where(is_before, q[0], q[1])])
    keys, values = (jnp.stack([x[0], jnp.where(is_before, x[0], x[1])]) for x in (kv[:, 0], kv[:, 1]))
    of_queries = documents.of(late, jnp.where(is_before, early, late))
    of_keys = documents.of(visitor, jnp.where(is_before, visitor, 2 * devices - 1 - visitor))
    return is_before, (queries, keys, values, of_queries, of_keys)


def _combine(one, other):
    """What two sets of keys add to a softmax, as `attend_part` gives it, together."""
    peak = jnp.maximum(one[1], other[1])
    factors = [jnp.exp(part[1] - peak) for part in (one, other)]
    out, total = (sum(part[i] * factor for part, factor in zip((one, other), factors, strict=True)) for i in (0, 2))
    return out, peak, total


def _attend_round(halves, documents_BT, scale):
    """Output, [B, N, T, K] of consecutive tokens, and log-sum-exp of the halves, of one device."""
    _, devices = _here()
    documents = _Documents(documents_BT, halves.shape[-2])
    q, kv = halves[:, 0], halves[:, 1:]
    visitors = _send_on(kv)
    *own, own_documents = _own_halves(halves, documents)
    blocks = (
        attend_part(*_causal_block(own, start, stop), before(own_documents, start, stop), scale)
        for start, stop in blocks_of(q.shape[-2])
    )
    parts = [jnp.concatenate(arrays, axis=2) for arrays in zip(*blocks, strict=True)]
    parts = [part.reshape(2, -1, *part.shape[1:]) for part in parts]
    j, _ = _here()
    within = (q[1:], kv[:1, 0], kv[:1, 1], documents.of(2 * devices - 1 - j), documents.of(j))
    late = _combine([part[1:] for part in parts], _attend_halves(*within, scale))
    parts = [jnp.concatenate([part[:1], of_late]) for part, of_late in zip(parts, late, strict=True)]

    def meet(parts, visitors, step):
        is_before, pairs = _pairs(q, visitors, documents, step)
        always, other = zip(*((part[0], part[1]) for part in _attend_halves(*pairs, scale)), strict=True)
        # Of a peak of MASKED nothing is added.
        to_early = (other[0], jnp.where(is_before, other[1], MASKED), other[2])
        to_late = _combine(always, (other[0], jnp.where(is_before, MASKED, other[1]), other[2]))
        return _combine(parts, [jnp.stack(arrays) for arrays in zip(to_early, to_late, strict=True)])

    def stop(carry, step):
        parts, visitors = carry
        following = _send_on(visitors)  # while these are worked on
        return (meet(parts, visitors, step), following), None

    if devices > 2:
        (parts, visitors), _ = jax.lax.scan(stop, (tuple(parts), visitors), jnp.arange(1, devices - 1))
    out, peak, total = meet(parts, visitors, devices - 1)
    return _exchange_back((out / total).astype(q.dtype)), peak + jnp.log(total)


def _gradients_of_round(halves, documents_BT, logsumexp, delta_BNT1, dout_BNTK, scale):
    """Gradients of queries, keys and values, [B, N, T, K] of consecutive tokens, of one device."""
    j, devices = _here()
    documents = _Documents(documents_BT, halves.shape[-2])
    q, kv = halves[:, 0], halves[:, 1:]
    delta, dout = _exchange(delta_BNT1), _exchange(dout_BNTK)
    of_queries = (logsumexp, delta, dout)
    visitors = _send_on(kv)
    merged = [array.reshape(-1, *array.shape[2:]) for array in of_queries]
    own = causal_gradients(*_own_halves(halves, documents), *merged, scale)
    dq, *own = (gradient.reshape(2, -1, *gradient.shape[1:]) for gradient in own)
    dkv = jnp.stack(own, axis=1)
    within = (q[1:], kv[:1, 0], kv[:1, 1], documents.of(2 * devices - 1 - j), documents.of(j))
    dlate, *dearly = _gradients_of_halves(*within, *(array[1:] for array in of_queries), scale)
    dq, dkv = dq.at[1].add(dlate[0]), dkv.at[0].add(jnp.concatenate(dearly))

    def meet(dq, dkv, visitors, step):
        arrived = _send_on(dkv)  # what was added where the visitors were before
        is_before, pairs = _pairs(q, visitors, documents, step)
        chosen = [jnp.stack([array[1], jnp.where(is_before, array[0], array[1])]) for array in of_queries]
        dqueries, *dvisitors = _gradients_of_halves(*pairs, *chosen, scale)
        (always, other), (dfirst, dother) = dqueries, jnp.stack(dvisitors, axis=1)
        dq = dq + jnp.stack([jnp.where(is_before, other, 0), always + jnp.where(is_before, 0, other)])
        dkv = arrived + jnp.stack([dfirst + jnp.where(is_before, dother, 0), jnp.where(is_before, 0, dother)])
        return dq, dkv

    def stop(carry, step):
        dq, dkv, visitors = carry
        following = _send_on(visitors)
        return (*meet(dq, dkv, visitors, step), following), None

    if devices > 2:
        (dq, dkv, visitors), _ = jax.lax.scan(stop, (dq, dkv, visitors), jnp.arange(1, devices - 1))
    dq, dkv = meet(dq, dkv, visitors, devices - 1)
    dkv = _send_on(dkv)  # home
    gradients = jnp.stack([dq, *dkv.swapaxes(0, 1)], axis=1).astype(q.dtype)
    return tuple(_exchange_back(gradients))


def _causal_block(own, start, stop):
    q, k, v = own
    return q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]


def _in_blocks(array, count):
    """[halves, batch, heads, H, ...] -> [count, halves, batch, heads, H / count, ...]."""
    blocks = array.reshape(*array.shape[:3], count, -1, *array.shape[4:])
    return jnp.moveaxis(blocks, 3, 0)


def _join_blocks(blocks):
    joined = jnp.moveaxis(blocks, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, *joined.shape[5:])


def _block_count(half: int) -> int:
    """Into how many equal blocks the queries of a half are cut."""
    wanted = -(-half // max(QUERY_BLOCK, half // MAX_BLOCKS))
    return next(count for count in range(wanted, half + 1) if half % count == 0)


def _seen(of_queries, of_keys):
    return None if of_queries is None else of_queries == of_keys.swapaxes(-1, -2)


def _attend_halves(q, k, v, of_queries, of_keys, scale):
    """`attend_part` of pairs of halves that see each other whole, or where their documents agree."""
    count = _block_count(q.shape[-2])

    def block(_, inputs):
        q, of_queries = inputs
        return None, attend_part(q, k, v, _seen(of_queries, of_keys), scale)

    inputs = jax.tree.map(functools.partial(_in_blocks, count=count), (q, of_queries))
    _, parts = jax.lax.scan(block, None, inputs)
    return jax.tree.map(_join_blocks, parts)


def _gradients_of_halves(q, k, v, of_queries, of_keys, logsumexp, delta, dout, scale):
    """Of the queries, keys and values of `_attend_halves`, in float32."""
    count = _block_count(q.shape[-2])

    def block(dkv, inputs):
        q, of_queries, *rest = inputs
        dq, *more = attend_gradients(q, k, v, _seen(of_queries, of_keys), scale, *rest)
        return jax.tree.map(jnp.add, dkv, tuple(more)), dq

    inputs = jax.tree.map(functools.partial(_in_blocks, count=count), (q, of_queries, logsumexp, delta, dout))
    zeros = jnp.zeros(k.shape, jnp.float32)
    dkv, dq = jax.lax.scan(block, (zeros, zeros), inputs)
    return _join_blocks(dq), *dkv


# A banded layer.


def _banded_forward(q_BNTK, k_BNTK, v_BNTK, documents_BT, scale, band):
    def attend(q_BNTK, k_BNTK, v_BNTK, documents_BT):
        keys, values = _with_neighbours(jnp.stack([k_BNTK, v_BNTK]), band)
        return banded_part(
            q_BNTK, keys, values, _banded_documents(documents_BT, q_BNTK, keys), scale, band, _start(q_BNTK)
        )

    attend = per_device(attend, [TOKENS] * 3 + [DOCUMENTS], [TOKENS, STATISTICS])
    out_BNTK, logsumexp_BNT1 = attend(q_BNTK, k_BNTK, v_BNTK, documents_BT)
    out_BNTK = checkpoint_name(out_BNTK, OUTPUT_NAME)
    logsumexp_BNT1 = checkpoint_name(logsumexp_BNT1, LOGSUMEXP_NAME)
    return out_BNTK, (q_BNTK, k_BNTK, v_BNTK, documents_BT, out_BNTK, logsumexp_BNT1)


def _banded_backward(scale, band, residuals, dout_BNTK):
    q_BNTK, k_BNTK, v_BNTK, documents_BT, out_BNTK, logsumexp_BNT1 = residuals

    def gradients(q_BNTK, k_BNTK, v_BNTK, documents_BT, *of_queries):
        keys, values = _with_neighbours(jnp.stack([k_BNTK, v_BNTK]), band)
        documents = _banded_documents(documents_BT, q_BNTK, keys)
        dq, *dkv = banded_gradients(q_BNTK, keys, values, documents, *of_queries, scale, band, _start(q_BNTK))
        dkv = _back_to_neighbours(jnp.stack(dkv), band, q_BNTK.shape[2])
        return tuple(gradient.astype(q_BNTK.dtype) for gradient in (dq, *dkv))

    names = [TOKENS] * 3 + [DOCUMENTS, STATISTICS, STATISTICS, TOKENS]
    arrays = (logsumexp_BNT1, output_dot_gradient(dout_BNTK, out_BNTK), dout_BNTK)
    return (*per_device(gradients, names, [TOKENS] * 3)(q_BNTK, k_BNTK, v_BNTK, documents_BT, *arrays), None)


ring_banded_attention.defvjp(_banded_forward, _banded_backward)


def _start(q_BNTK):
    return _here()[0] * q_BNTK.shape[2]


def _hops(time: int, band: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """What a device needs of those before it, the farthest first: how many of their last tokens, and who sends whom."""
    devices = current_mesh().shape[AXIS]
    needed = min(band - 1, (devices - 1) * time)
    hops = [(min(time, needed - back * time), back + 1) for back in range(-(-needed // time))]
    return [(count, [(i, i + hop) for i in range(devices - hop)]) for count, hop in reversed(hops)]


def _with_neighbours(x, band):
    """[..., T, K] after the last band - 1 tokens of what stands before; zeros where nothing does."""
    time = x.shape[-2]
    parts = [jax.lax.ppermute(x[..., time - count :, :], AXIS, move) for count, move in _hops(time, band)]
    return jnp.concatenate([*parts, x], axis=-2)


def _back_to_neighbours(gradient, band, time):
    """The transpose of `_with_neighbours`."""
    total, start = gradient[..., gradient.shape[-2] - time :, :], 0
    for count, move in _hops(time, band):
        part = jax.lax.ppermute(gradient[..., start : start + count, :], AXIS, [(to, i) for i, to in move])
        total, start = total.at[..., time - count :, :].add(part), start + count
    return total


def _banded_documents(documents_BT, q_BNTK, k_BNSK):
    """Of a device's queries, and of the keys that it has."""
    if documents_BT is None:
        return None
    time, keys, start = q_BNTK.shape[2], k_BNSK.shape[2], _start(q_BNTK)
    # What is before the first token is not seen, whatever document it is said to be of.
    padded = jnp.pad(documents_BT, ((0, 0), (keys - time, 0)))
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=1)
    return cut(documents_BT, start, slice_size=time), cut(padded, start, slice_size=keys)
