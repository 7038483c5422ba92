"""Filters of logits: pure functions [batch, vocab] -> [batch, vocab], to be composed.

Names and meanings are those of Hugging Face's logits processors. What a filter drops becomes -inf. Those that look at
the text take `tokens_BL`, int32 [batch, length], and `lengths_B`: of each row the first `lengths_B` tokens, prompt and
new ones, are its text, and what lies behind them is not read. Numbers may be traced; only what is called static must be
known while compiling.

None of them sorts the vocabulary, which on CPU takes longer than a small model does for its token.
"""

import jax
import jax.numpy as jnp


def apply_temperature(logits_BV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Logits divided by `temperature` > 0: below 1 sharper, above 1 flatter."""
    return logits_BV / temperature


def keep_top_k(logits_BV: jax.Array, top_k: jax.Array | int) -> jax.Array:
    """The `top_k` >= 1 likeliest tokens, and any that tie with the last of them (Fan et al. 2018, section 3.2)."""
    last = -_least_key_reaching(-logits_BV, jnp.ones_like(logits_BV), top_k)
    return jnp.where(logits_BV >= last, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """The smallest set of likeliest tokens whose probability reaches `top_p` in (0, 1] (Holtzman et al. 2020, 3.1).

    The likeliest token is always kept; of equally likely ones the first are.
    """
    probabilities = jax.nn.softmax(logits_BV, axis=-1)
    last = -_least_key_reaching(-logits_BV, probabilities, top_p)
    above, equal = logits_BV > last, logits_BV == last
    mass = jnp.sum(jnp.where(above, probabilities, 0.0), axis=-1, keepdims=True)
    rank = jnp.cumsum(equal, axis=-1) - 1
    # At top_p = 1 rounding must not drop the tail.
    kept = above | (equal & ((mass + rank * probabilities < top_p) | (rank == 0))) | (jnp.asarray(top_p) >= 1.0)
    return jnp.where(kept, logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, min_p: jax.Array | float) -> jax.Array:
    """Tokens at least `min_p` in [0, 1] times as probable as the likeliest one (Nguyen et al. 2024, section 3)."""
    probabilities = jax.nn.softmax(logits_BV, axis=-1)
    most = jnp.max(probabilities, axis=-1, keepdims=True)
    kept = (probabilities >= min_p * most) | (logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True))
    return jnp.where(kept, logits_BV, -jnp.inf)


def keep_typical_p(logits_BV: jax.Array, typical_p: jax.Array | float) -> jax.Array:
    """The smallest set of typical tokens whose probability reaches `typical_p` in (0, 1) (Meister et al. 2022, 4).

    The most typical token is the one whose information, -log p, is nearest to its expectation, the entropy.
    """
    logprobs = jax.nn.log_softmax(logits_BV, axis=-1)
    probabilities = jnp.exp(logprobs)
    entropy = -jnp.sum(jnp.where(probabilities > 0, probabilities * logprobs, 0.0), axis=-1, keepdims=True)
    distance = jnp.abs(-logprobs - entropy)
    return jnp.where(distance <= _least_key_reaching(distance, probabilities, typical_p), logits_BV, -jnp.inf)


def penalize_repetition(
    logits_BV: jax.Array, tokens_BL: jax.Array, lengths_B: jax.Array, penalty: jax.Array | float
) -> jax.Array:
    """Makes tokens of the text less likely, for a `penalty` above 1 (Keskar et al. 2019, section 4.1).

    Positive logits are divided by it and negative ones multiplied.
    """
    seen_BV = _mark(logits_BV, tokens_BL, jnp.arange(tokens_BL.shape[1]) < lengths_B[:, None])
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def ban_repeated_ngrams(logits_BV: jax.Array, tokens_BL: jax.Array, lengths_B: jax.Array, size: int) -> jax.Array:
    """Drops tokens that would repeat `size` >= 1 (static) tokens of the text in a row (Paulus et al. 2017, 2.5)."""
    windows = tokens_BL.shape[1] - size + 1
    if windows < 1:
        return logits_BV
    matches_BW = jnp.arange(windows) + size <= lengths_B[:, None]
    for offset in range(size - 1):
        last_B1 = _at(tokens_BL, lengths_B[:, None] - (size - 1) + offset)
        matches_BW &= tokens_BL[:, offset : offset + windows] == last_B1
    return jnp.where(_mark(logits_BV, tokens_BL[:, size - 1 :], matches_BW), -jnp.inf, logits_BV)


def ban_words(logits_BV: jax.Array, tokens_BL: jax.Array, lengths_B: jax.Array, words_WN: jax.Array) -> jax.Array:
    """Drops the last token of every word whose tokens before it end the text.

    `words_WN` holds a word's token ids in each row, filled up at its start by -1; a row of -1 is no word.
    """
    places_N = jnp.arange(words_WN.shape[1] - 1) - (words_WN.shape[1] - 1)
    ends_BN = _at(tokens_BL, lengths_B[:, None] + places_N)
    begun_BWN = (words_WN[:, :-1] == -1) | (words_WN[:, :-1] == ends_BN[:, None])
    last_BW = jnp.broadcast_to(words_WN[:, -1], begun_BWN.shape[:2])
    return jnp.where(_mark(logits_BV, last_BW, jnp.all(begun_BWN, axis=-1) & (last_BW >= 0)), -jnp.inf, logits_BV)


def ban_end_of_text(logits_BV: jax.Array, ends_E: jax.Array | int, banned_B: jax.Array) -> jax.Array:
    """Drops the tokens `ends_E` (or the one) that end a text, in the rows that `banned_B` tells."""
    is_end_V = jnp.any(jnp.arange(logits_BV.shape[-1])[:, None] == jnp.atleast_1d(ends_E), axis=-1)
    dropped_BV = banned_B[:, None] & is_end_V
    return jnp.where(dropped_BV, -jnp.inf, logits_BV)


def _least_key_reaching(keys: jax.Array, weights: jax.Array, goal: jax.Array | float) -> jax.Array:
    """The least of `keys` up to which the weights >= 0 sum to `goal`, [..., 1]; infinity where rounding keeps them off.

    A bisection over the bits of float32, whose order as integers is that of the numbers.
    """
    order = _ordered_bits(keys.astype(jnp.float32))
    low = jnp.full((*keys.shape[:-1], 1), _ordered_bits(jnp.float32(-jnp.inf)))
    high = jnp.full((*keys.shape[:-1], 1), _ordered_bits(jnp.float32(jnp.inf)))

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their sum may overflow
        reached = jnp.sum(jnp.where(order <= middle, weights, 0.0), axis=-1, keepdims=True) >= goal
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    _, found = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jax.lax.bitcast_convert_type(_flip(found), jnp.float32)


def _ordered_bits(values: jax.Array) -> jax.Array:
    return _flip(jax.lax.bitcast_convert_type(values, jnp.int32))


def _flip(bits: jax.Array) -> jax.Array:
    """Float bits to integers of the same order, and back: of negative numbers all bits but the sign."""
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _mark(logits_BV: jax.Array, tokens_BT: jax.Array, marked_BT: jax.Array) -> jax.Array:
    """bool [batch, vocab]: the tokens that are marked anywhere."""
    vocab = logits_BV.shape[-1]
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.zeros(logits_BV.shape, bool).at[rows_B1, jnp.where(marked_BT, tokens_BT, vocab)].set(True, mode='drop')


def _at(tokens_BL: jax.Array, places_BN: jax.Array) -> jax.Array:
    """Tokens of the text at `places_BN`; -2, which no token is, before its start."""
    found_BN = jnp.take_along_axis(tokens_BL, jnp.maximum(places_BN, 0), axis=1)
    return jnp.where(places_BN < 0, -2, found_BN)
