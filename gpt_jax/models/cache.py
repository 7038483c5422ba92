"""The key-value cache: what each layer keeps of the tokens seen so far, and where new ones go.

A dense layer has a slot for every token, filled in the order in which tokens come. A banded layer has one for each
token of its band; a token's slot is its position modulo their number, so that a new token takes the place of the one
that has left the band, whatever padding the rows of a batch have. Slots carry the position they hold, and that alone
decides who sees them.
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
    """An empty key-value cache for `length` tokens of `batch` sequences.

    Args:
      config: of the model.
      batch, length: sequences, and tokens of each.
      dtype: of keys and values; None: the compute dtype.
      undoable: how many of the newest tokens `truncate` may take back. A banded layer has so many slots more, or the
        tokens that they replaced, which the band reaches again, would be lost.

    Returns:
      `key` and `value`, tuples of one [batch, heads, slots, head_dim] array a layer: `length` slots, or `band_size` +
      `undoable` where that is less and the layer is banded; `positions` [batch, length], the position each slot of a
      dense layer holds (EMPTY: none), and `band_positions` that of a banded one, where there are any; `index`, the
      next slot of a dense layer.

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
    cache = arrays | {'positions': jnp.full((batch, length), EMPTY, jnp.int32), 'index': jnp.zeros((), jnp.int32)}
    if config.has_bands:
        cache['band_positions'] = jnp.full((batch, band_slots), EMPTY, jnp.int32)
    return cache


def advance(cache: Cache, positions_BT: jax.Array, empty: bool = False) -> tuple[Cache, Cache]:
    """Makes room for tokens at `positions_BT` (negative: padding, which is seen by nobody).

    `empty` tells that nothing is in the cache yet: `places` says so, and attention need not look into it.

    Returns:
      The bookkeeping of the cache with the tokens in it, all but their keys and values; and `places`:
      where the tokens go, and the positions `before` (of a banded layer `band_before`) of what the cache held so far.
    """
    shown_BT = jnp.where(positions_BT < 0, EMPTY, positions_BT).astype(jnp.int32)
    positions_BS = jax.lax.dynamic_update_slice(cache['positions'], shown_BT, (0, cache['index']))
    after = {'positions': positions_BS, 'index': cache['index'] + positions_BT.shape[1]}
    places = {'index': cache['index'], 'before': cache['positions'], 'shown': shown_BT, 'empty': empty}
    if 'band_positions' in cache:
        before_BS = cache['band_positions']
        slots_BT = _band_slots(positions_BT, before_BS.shape[1])
        after['band_positions'] = jax.vmap(_put)(before_BS, slots_BT, shown_BT)
        places |= {'band_slots': slots_BT, 'band_before': before_BS}
    return after, places


def store(
    key_BNSK: jax.Array, value_BNSK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, places: Cache, banded: bool
) -> tuple[jax.Array, jax.Array]:
    """One layer's part of the cache with the keys and values of new tokens in it; `places` is from `advance`."""
    pairs = (key_BNSK, k_BNTK), (value_BNSK, v_BNTK)
    if banded:
        put = jax.vmap(jax.vmap(_put, in_axes=(0, None, 0)))
        return tuple(put(old, places['band_slots'], new) for old, new in pairs)
    start = (0, 0, places['index'], 0)
    return tuple(jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start) for old, new in pairs)


def truncate(cache: Cache, lengths_B: jax.Array) -> Cache:
    """The cache without the tokens whose position is `lengths_B` or later: what followed a rejected token.

    At most `undoable` tokens of a row (see `init_cache`) may be taken back.
    """
    kept = {
        name: jnp.where(cache[name] < lengths_B[:, None], cache[name], EMPTY)
        for name in ('positions', 'band_positions')
        if name in cache
    }
    used_S = jnp.any(kept['positions'] != EMPTY, axis=0)
    kept['index'] = jnp.max(jnp.where(used_S, jnp.arange(1, used_S.size + 1), 0)).astype(jnp.int32)
    return cache | kept


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache of the sequences `rows` of the batch, which may repeat and change their order."""
    return {name: part if name == 'index' else jax.tree.map(lambda a: a[rows], part) for name, part in cache.items()}


def _band_slots(positions_BT: jax.Array, slots: int) -> jax.Array:
    """The slot of each token; `slots`, which does not exist, for padding and for tokens that later ones replace."""
    last_B1 = jnp.max(positions_BT, axis=1, keepdims=True)
    kept_BT = (positions_BT >= 0) & (positions_BT > last_B1 - slots)
    return jnp.where(kept_BT, positions_BT % slots, slots)


def _put(array_S: jax.Array, slots_T: jax.Array, values_T: jax.Array) -> jax.Array:
    """[slots, ...] with `values_T` at `slots_T`; a slot that does not exist takes nothing."""
    return array_S.at[slots_T].set(values_T.astype(array_S.dtype), mode='drop')
