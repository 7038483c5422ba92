"""Cross-entropy of the next token, without ever holding the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp

from gpt_jax.models.layers import TABLE_COPIES, TokenTable, contract_tokens, first_row, matmul_transposed
from gpt_jax.parallel import constrain, split_axes, target_device

# Logits alive at once on a device, in elements per chunk of time. On CPU 32 MB of float32, which its caches profit
# from. On an accelerator 1.6 GB: each chunk reads the head, and reads and writes the head's gradient in float32, which
# with small chunks costs more time than the products do.
CHUNK_ELEMENTS = {'cpu': 8 * 1024 * 1024, 'accelerator': 400_000_000}

X_NAMES, TOKEN_NAMES, LOGITS_NAMES = ('batch', 'time', 'embed'), ('batch', 'time'), ('batch', 'time', 'vocab')


def masked_logits(x_BTD: jax.Array, head_VD: jax.Array, vocab_size: int, start: jax.Array | int = 0) -> jax.Array:
    """x @ head.T in float32, with the padding of the vocabulary at -inf: [batch, time, padded vocab].

    `start` is the token that the head's first row stands for, where it is a part of the whole.
    """
    head_VD = head_VD.astype(x_BTD.dtype)
    logits_BTV = matmul_transposed(x_BTD, head_VD, jnp.float32)
    logits_BTV = constrain(logits_BTV, 'batch', None, 'vocab', called='logits, a chunk at a time')
    if isinstance(start, int) and start + head_VD.shape[0] <= vocab_size:
        return logits_BTV
    return jnp.where(start + jnp.arange(head_VD.shape[0]) < vocab_size, logits_BTV, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_cross_entropy(x_BTD: jax.Array, table: TokenTable, targets_BT: jax.Array, vocab_size: int) -> jax.Array:
    """-log softmax(x @ head.T)[target] for each token.

    Time is cut in chunks: each one's logits are made, reduced and dropped, and made again in the backward pass. Logits
    that fit in one chunk are kept instead.

    On a mesh each device cuts its own tokens, and adds up the head's gradient by itself: no chunk waits for another
    device. Under 'tensor' a device has a part of the vocabulary, whose sums are combined after the last chunk
    (Shoeybi et al. 2019, "Megatron-LM", section 3: no logits are sent).

    Args:
      x_BTD: final activations, in the compute dtype.
      table: output head, from `layers.copy_table`.
      targets_BT: token ids below `vocab_size`.
      vocab_size: rows of the head that are tokens; the rest is padding and gets no probability.

    Returns:
      Losses in nats, float32 [batch, time].
    """
    return _forward(x_BTD, table, targets_BT, vocab_size)[0]


def _chunks(x_BTD, head_VD) -> int:
    """The number of equal chunks of time whose logits fit in CHUNK_ELEMENTS (a divisor of time)."""
    batch, time, _ = x_BTD.shape
    fit = CHUNK_ELEMENTS['cpu' if target_device().platform == 'cpu' else 'accelerator']
    wanted = min(time, -(-batch * time * head_VD.shape[0] // fit))
    return next(count for count in range(max(1, wanted), time + 1) if time % count == 0)


def _split_time(array, count):
    """[batch, time, ...] -> [count, batch, time / count, ...]."""
    batch, time = array.shape[:2]
    return jnp.moveaxis(array.reshape(batch, count, time // count, *array.shape[2:]), 1, 0)


def _join_time(array):
    """[count, batch, time / count, ...] -> [batch, time, ...]."""
    count, batch, time = array.shape[:3]
    return jnp.moveaxis(array, 0, 1).reshape(batch, count * time, *array.shape[3:])


def _forward(x_BTD, table, targets_BT, vocab_size):
    def local_losses(x_BTD, rows_1VD, targets_BT):
        head_VD = rows_1VD[0]
        start, count = first_row(head_VD), _chunks(x_BTD, head_VD)

        def chunk(_, inputs):
            x, targets = inputs
            logits = masked_logits(x, head_VD, vocab_size, start)
            # Of a target in another device's part any column is taken here, and not used below.
            columns = jnp.clip(targets - start, 0, head_VD.shape[0] - 1) if axes else targets
            target_logits = jnp.take_along_axis(logits, columns[..., None], axis=-1)[..., 0]
            return None, (jax.nn.logsumexp(logits, axis=-1), target_logits, logits if count == 1 else None)

        axes = split_axes('vocab')
        _, parts = jax.lax.scan(chunk, None, (_split_time(x_BTD, count), _split_time(targets_BT, count)))
        logsumexp_BT, target_logits_BT, logits_BTV = jax.tree.map(_join_time, parts)
        if axes:
            peak_BT = jax.lax.pmax(logsumexp_BT, axes)
            is_here_BT = (targets_BT >= start) & (targets_BT < start + head_VD.shape[0])
            sums = (jnp.exp(logsumexp_BT - peak_BT), jnp.where(is_here_BT, target_logits_BT, 0.0))
            total_BT, target_logits_BT = jax.lax.psum(sums, axes)
            logsumexp_BT = peak_BT + jnp.log(total_BT)
        return logsumexp_BT - target_logits_BT, logsumexp_BT, logits_BTV

    names = ([X_NAMES, TABLE_COPIES, TOKEN_NAMES], [TOKEN_NAMES, TOKEN_NAMES, LOGITS_NAMES])
    losses_BT, *kept = table.run(local_losses, *names)(x_BTD, table.rows, targets_BT)
    return losses_BT, (x_BTD, table.replace(gradient=None), targets_BT, *kept)


def _backward(vocab_size, residuals, dlosses_BT):
    x_BTD, table, targets_BT, logsumexp_BT, logits_BTV = residuals

    def local_gradients(x_BTD, rows_1VD, targets_BT, logsumexp_BT, dlosses_BT, logits_BTV):
        head_VD = rows_1VD[0]
        start, count = first_row(head_VD), _chunks(x_BTD, head_VD)

        def chunk(dhead_VD, inputs):
            x, targets, logsumexp, dlosses, logits = inputs
            if logits is None:
                logits = masked_logits(x, head_VD, vocab_size, start)
            probabilities = jnp.exp(logits - logsumexp[..., None])
            one_hot = start + jnp.arange(head_VD.shape[0]) == targets[..., None]
            dlogits = ((probabilities - one_hot) * dlosses[..., None]).astype(x.dtype)
            dx = jnp.einsum('BTV,VD->BTD', dlogits, head_VD)
            return dhead_VD + contract_tokens(dlogits, x), dx

        arrays = (x_BTD, targets_BT, logsumexp_BT, dlosses_BT, logits_BTV)
        inputs = jax.tree.map(lambda array: _split_time(array, count), arrays)
        dhead_VD, dx = jax.lax.scan(chunk, jnp.zeros(head_VD.shape, jnp.float32), inputs)
        dx_BTD, axes = _join_time(dx), split_axes('vocab')
        return jax.lax.psum(dx_BTD, axes) if axes else dx_BTD, dhead_VD[None]

    names = [X_NAMES, TABLE_COPIES, TOKEN_NAMES, TOKEN_NAMES, TOKEN_NAMES, LOGITS_NAMES], [X_NAMES, TABLE_COPIES]
    arrays = (x_BTD, table.rows, targets_BT, logsumexp_BT, dlosses_BT, logits_BTV)
    dx_BTD, dhead = table.run(local_gradients, *names)(*arrays)
    return dx_BTD, table.replace(rows=None, gradient=dhead), None


linear_cross_entropy.defvjp(_forward, _backward)
