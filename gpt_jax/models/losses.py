"""Cross-entropy of the next token, without ever holding the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp

from gpt_jax.models.layers import contract_tokens, matmul_transposed
from gpt_jax.parallel import constrain

# Logits alive at once, in elements per chunk of time: 32 MB of float32.
CHUNK_ELEMENTS = 8 * 1024 * 1024


def masked_logits(x_BTD: jax.Array, head_VD: jax.Array, vocab_size: int) -> jax.Array:
    """x @ head.T in float32, with the padding of the vocabulary at -inf: [batch, time, padded vocab]."""
    head_VD = head_VD.astype(x_BTD.dtype)
    logits_BTV = matmul_transposed(x_BTD, head_VD, jnp.float32)
    logits_BTV = constrain(logits_BTV, 'batch', None, 'vocab')
    if head_VD.shape[0] == vocab_size:
        return logits_BTV
    return jnp.where(jnp.arange(head_VD.shape[0]) < vocab_size, logits_BTV, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_cross_entropy(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, vocab_size: int) -> jax.Array:
    """-log softmax(x @ head.T)[target] for each token.

    Time is cut in chunks: each one's logits are made, reduced and dropped, and made again in the backward pass. Logits
    that fit in one chunk are kept instead.

    Args:
      x_BTD: final activations, in the compute dtype.
      head_VD: output head [padded vocab, d_model].
      targets_BT: token ids below `vocab_size`.
      vocab_size: rows of the head that are tokens; the rest is padding and gets no probability.

    Returns:
      Losses in nats, float32 [batch, time].
    """
    return _forward(x_BTD, head_VD, targets_BT, vocab_size)[0]


def _chunks(x_BTD, head_VD) -> int:
    """The number of equal chunks of time whose logits fit in CHUNK_ELEMENTS (a divisor of time)."""
    batch, time, _ = x_BTD.shape
    wanted = min(time, -(-batch * time * head_VD.shape[0] // CHUNK_ELEMENTS))
    return next(count for count in range(max(1, wanted), time + 1) if time % count == 0)


def _split_time(array, count):
    """[batch, time, ...] -> [count, batch, time / count, ...]."""
    batch, time = array.shape[:2]
    return jnp.moveaxis(array.reshape(batch, count, time // count, *array.shape[2:]), 1, 0)


def _join_time(array):
    """[count, batch, time / count, ...] -> [batch, time, ...]."""
    count, batch, time = array.shape[:3]
    return jnp.moveaxis(array, 0, 1).reshape(batch, count * time, *array.shape[3:])


def _forward(x_BTD, head_VD, targets_BT, vocab_size):
    def chunk(_, inputs):
        x, targets = inputs
        logits = masked_logits(x, head_VD, vocab_size)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        losses = logsumexp - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return None, (losses, logsumexp, logits if count == 1 else None)

    count = _chunks(x_BTD, head_VD)
    _, parts = jax.lax.scan(chunk, None, (_split_time(x_BTD, count), _split_time(targets_BT, count)))
    losses_BT, logsumexp_BT, logits_BTV = jax.tree.map(_join_time, parts)
    return losses_BT, (x_BTD, head_VD, targets_BT, logsumexp_BT, logits_BTV)


def _backward(vocab_size, residuals, dlosses_BT):
    x_BTD, head_VD, targets_BT, logsumexp_BT, logits_BTV = residuals

    def chunk(dhead_VD, inputs):
        x, targets, logsumexp, dlosses, logits = inputs
        if logits is None:
            logits = masked_logits(x, head_VD, vocab_size)
        probabilities = jnp.exp(logits - logsumexp[..., None])
        one_hot = jnp.arange(head_VD.shape[0]) == targets[..., None]
        dlogits = ((probabilities - one_hot) * dlosses[..., None]).astype(x.dtype)
        dx = jnp.einsum('BTV,VD->BTD', dlogits, head_VD.astype(x.dtype))
        return dhead_VD + contract_tokens(dlogits, x), dx

    count = _chunks(x_BTD, head_VD)
    arrays = (x_BTD, targets_BT, logsumexp_BT, dlosses_BT, logits_BTV)
    inputs = jax.tree.map(lambda array: _split_time(array, count), arrays)
    dhead_VD, dx = jax.lax.scan(chunk, jnp.zeros(head_VD.shape, jnp.float32), inputs)
    return _join_time(dx), dhead_VD.astype(head_VD.dtype), None


linear_cross_entropy.defvjp(_forward, _backward)
