"""The key-value cache: what each layer keeps of the tokens read so far, and where new ones go.

A token's slot is its position modulo the number of slots. A dense layer has a slot for every token of a sequence, a
banded one for each token of its band, so that there a new token takes the place of the one that has left the band. The
slot depends on nothing but the row's own tokens: rows of a batch have lengths of their own, and one may join or leave
while the others go on. Slots carry the position they hold, and that alone decides who sees them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.models.config import GPTConfig
from gpt_jax.parallel import constrain

# Position stored for a slot that nobody may see.
EMPTY = jnp.iinfo(jnp.int32).max

Cache = dict[str, Any]


def init_cache(config: GPTConfig, batch: int, length: int, dtype: jnp.dtype | None = None, undoable: int = 0) -> Cache:
    """An empty key-value cache for `length` tokens of each of `batch` sequences.

    Args:
      config: of the model.
      batch, length: sequences, and tokens of each.
      dtype: of keys and values; None: the compute dtype.
      undoable: how many of the newest tokens `truncate` may take back. A banded layer has so many slots more, or the
        tokens that they replaced, which the band reaches again, would be lost.

    Returns:
      `key` and `value`, tuples of one [batch, heads, slots, head_dim] array a layer: `length` slots, or `band_size` +
      `undoable` where that is less and the layer is banded; `positions` [batch, length], the position each slot of a
      dense layer holds (EMPTY: none), and `band_positions` that of a banded one, where there are any; `lengths`
      [batch], how many tokens of each sequence have been read: the position of its next one.

    Raises:
      ValueError: `length` exceeds the model's block_size by more than `undoable`.
    """
    if length > config.block_size + undoable:
        raise ValueError(f'a cache of {length} tokens exceeds block_size={config.block_size}')
    dtype = config.dtype if dtype is None else dtype
    band_slots = min(length, config.band_size + undoable)
    slots = [length if config.band(layer) is None else band_slots for layer in range(config.n_layer)]
    arrays = {
        name: tuple(
            constrain(jnp.zeros((batch, config.n_head, count, config.head_dim), dtype), 'batch', 'heads', None, None)
            for count in slots
        )
        for name in ('key', 'value')
    }
    cache = arrays | {'positions': jnp.full((batch, length), EMPTY, jnp.int32), 'lengths': jnp.zeros(batch, jnp.int32)}
    if config.has_bands:
        cache['band_positions'] = jnp.full((batch, band_slots), EMPTY, jnp.int32)
    return cache


def advance(cache: Cache, positions_BT: jax.Array, empty: bool = False) -> tuple[Cache, Cache]:
    """Makes room for tokens at `positions_BT` (negative: padding, which is seen by nobody).

    `empty` tells that nothing is in the cache yet, and that padding stands at the end of its row alone: attention need
    not look into the cache, and a dense layer takes the tokens as one piece.

    Returns:
      The bookkeeping of the cache with the tokens in it, all but their keys and values; and `cache_slots`: where the
      tokens go, and the positions `before` (of a banded layer `band_before`) of what the cache held so far.
    """
    shown_BT = jnp.where(positions_BT < 0, EMPTY, positions_BT).astype(jnp.int32)
    after = {'lengths': jnp.maximum(cache['lengths'], jnp.max(positions_BT, axis=1) + 1)}
    cache_slots = {'shown': shown_BT, 'empty': empty}
    for band in ('', 'band_'):
        if f'{band}positions' in cache:
            before_BS = cache[f'{band}positions']
            slots_BT = _slots(positions_BT, before_BS.shape[1])
            rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
            after[f'{band}positions'] = before_BS.at[rows_B1, slots_BT].set(shown_BT, mode='drop')
            cache_slots |= {f'{band}slots': slots_BT, f'{band}before': before_BS}
    return after, cache_slots


def store(
    key_BNSK: jax.Array, value_BNSK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, cache_slots: Cache, banded: bool
) -> tuple[jax.Array, jax.Array]:
    """One layer's part of the cache with the keys and values of new tokens in it; `cache_slots` is from `advance`."""
    pairs = (key_BNSK, k_BNTK.astype(key_BNSK.dtype)), (value_BNSK, v_BNTK.astype(value_BNSK.dtype))
    if cache_slots['empty'] and not banded:
        # Padding goes in as well: its slots hold no position, and nobody sees them.
        return tuple(jax.lax.dynamic_update_slice(old, new, (0, 0, 0, 0)) for old, new in pairs)
    slots_BT = cache_slots['band_slots' if banded else 'slots']
    rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
    # With one index before the heads and one after them, a token's heads are one piece: as many writes as tokens.
    return tuple(old.at[rows_B1, :, slots_BT].set(new.transpose(0, 2, 1, 3), mode='drop') for old, new in pairs)


def truncate(cache: Cache, lengths_B: jax.Array) -> Cache:
    """The cache without the tokens whose position is `lengths_B` or later: what followed a rejected token.

    At most `undoable` tokens of a row (see `init_cache`) may be taken back.
    """
    kept = {
        name: jnp.where(cache[name] < lengths_B[:, None], cache[name], EMPTY)
        for name in ('positions', 'band_positions')
        if name in cache
    }
    return cache | kept | {'lengths': jnp.minimum(cache['lengths'], lengths_B)}


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache of the sequences `rows` of the batch, which may repeat and change their order."""
    return jax.tree.map(lambda array: array[rows], cache)


def put_rows(cache: Cache, rows: jax.Array, other: Cache) -> Cache:
    """The cache with the sequences of `other`, of as many slots, at `rows`; a row that does not exist takes nothing."""
    return jax.tree.map(lambda array, new: array.at[rows].set(new, mode='drop'), cache, other)


def _slots(positions_BT: jax.Array, slots: int) -> jax.Array:
    """The slot of each token; `slots`, which does not exist, for padding and for tokens that later ones replace."""
    last_B1 = jnp.max(positions_BT, axis=1, keepdims=True)
    kept_BT = (positions_BT >= 0) & (positions_BT > last_B1 - slots)
    return jnp.where(kept_BT, positions_BT % slots, slots)
