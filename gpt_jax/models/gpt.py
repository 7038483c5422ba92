"""The whole model on one page.

Shape suffixes, here and everywhere: B batch, T time, S key time, D d_model, N heads, K head_dim, F mlp width, V vocab,
L layers, C the three of query, key and value, Q a block of queries.

Parameters: `wte` [V, D], `wpe` [T, D], `blocks` with every array stacked over the layers on its leading axis, `ln_f`,
and `lm_head` [V, D] where it is not tied. V is padded to a multiple of 128.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax.errors import InputError
from gpt_jax.models import attention
from gpt_jax.models.cache import Cache, advance, init_cache
from gpt_jax.models.config import GPTConfig
from gpt_jax.models.depth import layer_trees, run_layers
from gpt_jax.models.layers import INIT_STD, Dense, Dropout, LayerNorm
from gpt_jax.models.losses import linear_cross_entropy, masked_logits
from gpt_jax.models.token_info import TokenInfo
from gpt_jax.parallel import constrain

Params = dict[str, Any]


class MLP(nn.Module):
    """Two matrices with a tanh-GELU between them (GPT-1, section 4.1)."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        residual_std = INIT_STD / math.sqrt(2 * c.n_layer)  # GPT-2, section 2.3
        x_BTF = checkpoint_name(Dense((c.d_model, c.d_mlp), dtype=c.dtype, name='up')(x_BTD), attention.MLP_NAME)
        x_BTF = constrain(nn.gelu(x_BTF, approximate=True), 'batch', 'time', 'mlp')
        x_BTD = Dense((c.d_mlp, c.d_model), std=residual_std, dtype=c.dtype, name='down')(x_BTF)
        return Dropout(c.mlp_dropout)(x_BTD, info.rows_B)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream (GPT-2, section 2.3).

    `band` is that of its layer: `GPTConfig.band`.
    """

    config: GPTConfig
    band: int | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, info: TokenInfo, layer_cache: tuple | None = None, places: Cache | None = None
    ) -> tuple[jax.Array, tuple | None]:
        """[B, T, D] -> [B, T, D], and the layer's updated cache (see CausalSelfAttention)."""
        c = self.config
        h_BTD = LayerNorm(c.layer_norm_epsilon, c.dtype, name='ln_1')(x_BTD)
        attend = attention.CausalSelfAttention(c, self.band, name='attention')
        h_BTD, layer_cache = attend(h_BTD, info, layer_cache, places)
        x_BTD = constrain(x_BTD + h_BTD, 'batch', 'time', 'embed')
        h_BTD = LayerNorm(c.layer_norm_epsilon, c.dtype, name='ln_2')(x_BTD)
        h_BTD = MLP(c, name='mlp')(h_BTD, info)
        return constrain(x_BTD + h_BTD, 'batch', 'time', 'embed'), layer_cache


class GPT(nn.Module):
    """A decoder-only language model; dropout acts where apply is given a 'dropout' rng."""

    config: GPTConfig

    def setup(self):
        """Declares the parameters."""
        c = self.config
        table = nn.initializers.normal(INIT_STD)
        self.wte = self.param('wte', table, (c.padded_vocab_size, c.d_model), jnp.float32)
        self.wpe = self.param('wpe', table, (c.block_size, c.d_model), jnp.float32)
        # The tree that is stored stacks the layers; apply also takes them unstacked (see `unstack_layers`), which
        # self.param would refuse.
        if self.has_variable('params', 'blocks'):
            self.blocks = self.get_variable('params', 'blocks')
        else:
            self.blocks = self.param('blocks', self._init_blocks)
        self.ln_f = LayerNorm(c.layer_norm_epsilon, c.dtype)
        self.embedding_dropout = Dropout(c.embedding_dropout)
        if not c.tie_embeddings:
            self.lm_head = self.param('lm_head', table, (c.padded_vocab_size, c.d_model), jnp.float32)

    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: Cache | None = None,
        positions: jax.Array | None = None,
        rows: jax.Array | None = None,
        documents: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Logits of the token after each position.

        Args:
          tokens_BT: int token ids [batch, time]; time is at most block_size.
          cache: from `init_cache` or an earlier call: what was seen before. Tokens are appended to it.
          positions: int [batch, time], the position of each token in its sequence (default 0, 1, ...; needed with a
            cache). With a cache a negative one marks padding, which no other token sees.
          rows: int [batch], the row of the global batch that each sequence is (default 0, 1, ...): its dropout masks
            depend on that, not on its place in this array.
          documents: int [batch, time], equal where two tokens of a row are of one document: others do not see each
            other (default: each row is one document). Not with a cache. `positions` start again by themselves only
            where they are given so.

        Returns:
          logits float32 [batch, time, vocab]; with a cache, `(logits, cache)`.

        Raises:
          InputError: more tokens than block_size, or than the cache has slots. How far a cache is filled is not known
            while compiling: appending more than fits to a part-filled one gives wrong logits, which the caller avoids.
        """
        if cache is not None and documents is not None:
            raise ValueError('apply with a cache takes no documents=: the tokens of a cache are of one document')
        x_BTD, cache = self._hidden(tokens_BT, TokenInfo.of(tokens_BT, positions, rows, documents), cache)
        logits_BTV = masked_logits(x_BTD, self._head(), self.config.vocab_size)[..., : self.config.vocab_size]
        return logits_BTV if cache is None else (logits_BTV, cache)

    def token_losses(
        self,
        tokens_BT: jax.Array,
        targets_BT: jax.Array,
        positions: jax.Array | None = None,
        rows: jax.Array | None = None,
        documents: jax.Array | None = None,
    ) -> jax.Array:
        """Cross-entropy of each target, in nats, float32 [batch, time]; `positions`, `rows`, `documents` as above.

        The full logits are never held: at most one chunk of them (`losses.CHUNK_ELEMENTS`) is.
        """
        x_BTD, _ = self._hidden(tokens_BT, TokenInfo.of(tokens_BT, positions, rows, documents))
        return linear_cross_entropy(x_BTD, self._head(), targets_BT, self.config.vocab_size)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype | None = None, undoable: int = 0) -> Cache:
        """An empty cache for `length` tokens of `batch` sequences; see `cache.init_cache`."""
        return init_cache(self.config, batch, length, dtype, undoable)

    def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads prompts into an empty cache, with the attention of training: never a full matrix of scores.

        Args:
          tokens_BT: int token ids [batch, time], prompts that are padded at their end.
          lengths_B: int [batch], how much of each row is prompt; at least 1.
          cache: from `init_cache`, with at least `time` slots.

        Returns:
          Logits float32 [batch, vocab] of the token after each prompt, and the cache. The next token of a row has the
          position `lengths_B`.
        """
        order_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        positions_BT = jnp.where(order_BT < lengths_B[:, None], order_BT, -1)
        x_BTD, cache = self._hidden(tokens_BT, TokenInfo.of(tokens_BT, positions_BT, None), cache, empty=True)
        last_B1D = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)
        logits_B1V = masked_logits(last_B1D, self._head(), self.config.vocab_size)
        return logits_B1V[:, 0, : self.config.vocab_size], cache

    def _hidden(self, tokens_BT, info, cache=None, empty=False):
        c = self.config
        if tokens_BT.shape[1] > c.block_size:
            raise InputError(f'{tokens_BT.shape[1]} tokens exceed block_size={c.block_size}; give at most that many')
        if info.positions_BT is None:
            if cache is not None:
                raise ValueError('apply with a cache needs positions=: int [batch, time]')
            position_embedding = self.wpe[None, : tokens_BT.shape[1]]
        else:
            position_embedding = self.wpe[jnp.maximum(info.positions_BT, 0)]
        x_BTD = self.wte[tokens_BT].astype(c.dtype) + position_embedding.astype(c.dtype)
        x_BTD = self.embedding_dropout(constrain(x_BTD, 'batch', 'time', 'embed'), info.rows_B)
        dropout_key = self.make_rng('dropout') if self.has_rng('dropout') else None
        if cache is None:
            return self.ln_f(run_layers(c, self._block(info, dropout_key), self.blocks, x_BTD)), None
        x_BTD, cache = self._run_cached(self._block(info, dropout_key), x_BTD, info.positions_BT, cache, empty)
        return self.ln_f(x_BTD), cache

    def _block(self, info, dropout_key):
        """The function of one layer: (x, its parameters, index, band, part of a cache) -> (x, that part)."""

        def run(x_BTD, layer_params, layer, band, layer_cache=None, places=None):
            rngs = {} if dropout_key is None else {'dropout': jax.random.fold_in(dropout_key, layer)}
            block = Block(self.config, band, parent=None)
            return block.apply({'params': layer_params}, x_BTD, info, layer_cache, places, rngs=rngs)

        return run

    def _run_cached(self, run, x_BTD, positions_BT, cache, empty):
        slots = cache['positions'].shape[1]
        if positions_BT.shape[1] > slots:
            raise InputError(f'{positions_BT.shape[1]} tokens exceed the {slots} slots of the cache; make a longer one')
        after, places = advance(cache, positions_BT, empty)
        kept = []
        for layer, layer_params in enumerate(layer_trees(self.blocks, self.config.n_layer)):
            layer_cache = (cache['key'][layer], cache['value'][layer])
            x_BTD, layer_cache = run(x_BTD, layer_params, layer, self.config.band(layer), layer_cache, places)
            kept.append(layer_cache)
        keys, values = zip(*kept, strict=True)
        return x_BTD, after | {'key': keys, 'value': values}

    def _init_blocks(self, rng: jax.Array) -> Params:
        """Every layer drawn from its own key, whatever the form the layers are run in."""
        block, x_BTD = Block(self.config, parent=None), jnp.zeros((1, 1, self.config.d_model))
        info = TokenInfo.of(jnp.zeros((1, 1), jnp.int32))
        layer_keys = jax.vmap(lambda layer: jax.random.fold_in(rng, layer))(jnp.arange(self.config.n_layer))
        return jax.vmap(lambda key: block.init(key, x_BTD, info)['params'])(layer_keys)

    def _head(self) -> jax.Array:
        return self.wte if self.config.tie_embeddings else self.lm_head


def GPT2(  # noqa: N802 - a factory with the name of the model it makes
    vocab_size: int, block_size: int, n_layer: int, n_head: int, d_model: int, *, dropout: float = 0.0, **changes: Any
) -> GPT:
    """A GPT-2 of the given size.

    Args:
      vocab_size, block_size, n_layer, n_head, d_model: see GPTConfig.
      dropout: rate on embeddings, attention probabilities and the MLP's output.
      **changes: `resid_dropout` (default: `dropout`) and any other field of GPTConfig.
    """
    rates = {key: dropout for key in ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout')}
    return GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, d_model, **(rates | changes)))


def GPT3(  # noqa: N802
    vocab_size: int, block_size: int, n_layer: int, n_head: int, d_model: int, *, dropout: float = 0.0, **changes: Any
) -> GPT:
    """A GPT-3 of the given size: dense and locally banded layers in turn (GPT-3, section 2.1); arguments as for GPT2.

    `attention_pattern='dense'` gives dense attention in every layer, `band_size` another band than the assumed 256.
    """
    changes = {'attention_pattern': 'alternating'} | changes
    return GPT2(vocab_size, block_size, n_layer, n_head, d_model, dropout=dropout, **changes)
