"""Choosing a token from logits: pure functions [..., vocab] -> [..., vocab], to be composed.

A filter sets what it drops to -inf. Names and meanings are those of Hugging Face's logits processors.
"""

import jax
import jax.numpy as jnp


def apply_temperature(logits_BV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Logits divided by `temperature` > 0: below 1 sharper, above 1 flatter."""
    return logits_BV / temperature


def keep_top_k(logits_BV: jax.Array, top_k: int) -> jax.Array:
    """The `top_k` likeliest tokens (a static int >= 1), and any that tie with the last of them."""
    kth = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][..., -1:]
    return jnp.where(logits_BV < kth, -jnp.inf, logits_BV)


def keep_top_p(logits_BV: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """The smallest set of likeliest tokens whose probability reaches `top_p` in (0, 1] (Holtzman et al. 2020, 3.1).

    The likeliest token is always kept.
    """
    order = jnp.argsort(-logits_BV, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Ranked back to the vocabulary's order. At top_p = 1 rounding must not drop the tail.
    kept = jnp.take_along_axis((before < top_p) | (top_p >= 1.0), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits_BV, -jnp.inf)


def categorical(keys_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """One token for each row, drawn with the row's own key from softmax(logits): int32 [batch]."""
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The likeliest token of each row (the first of equals): int32 [batch]."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
