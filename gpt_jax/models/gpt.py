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

from gpt_jax.errors import InputError
from gpt_jax.models import attention
from gpt_jax.models.config import GPTConfig
from gpt_jax.models.layers import INIT_STD, Dense, Dropout, LayerNorm
from gpt_jax.models.losses import linear_cross_entropy, masked_logits
from gpt_jax.parallel import constrain

Params = dict[str, Any]


class MLP(nn.Module):
    """Two matrices with a tanh-GELU between them (GPT-1, section 4.1)."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        residual_std = INIT_STD / math.sqrt(2 * c.n_layer)  # GPT-2, section 2.3
        x_BTF = Dense((c.d_model, c.d_mlp), dtype=c.dtype, name='up')(x_BTD)
        x_BTF = constrain(nn.gelu(x_BTF, approximate=True), 'batch', 'time', 'mlp')
        x_BTD = Dense((c.d_mlp, c.d_model), std=residual_std, dtype=c.dtype, name='down')(x_BTF)
        return Dropout(c.mlp_dropout)(x_BTD)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream (GPT-2, section 2.3)."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layer_cache: attention.Cache | None = None, positions_BT: jax.Array | None = None
    ) -> tuple[jax.Array, attention.Cache | None]:
        """[B, T, D] -> [B, T, D], and the layer's updated cache (see CausalSelfAttention)."""
        c = self.config
        h_BTD = LayerNorm(c.layer_norm_epsilon, c.dtype, name='ln_1')(x_BTD)
        h_BTD, layer_cache = attention.CausalSelfAttention(c, name='attention')(h_BTD, layer_cache, positions_BT)
        x_BTD = constrain(x_BTD + h_BTD, 'batch', 'time', 'embed')
        h_BTD = LayerNorm(c.layer_norm_epsilon, c.dtype, name='ln_2')(x_BTD)
        h_BTD = MLP(c, name='mlp')(h_BTD)
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
        self, tokens_BT: jax.Array, cache: attention.Cache | None = None, positions: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, attention.Cache]:
        """Logits of the token after each position.

        Args:
          tokens_BT: int token ids [batch, time]; time is at most block_size.
          cache: from `init_cache` or an earlier call: what was seen before. Tokens are appended to it.
          positions: int [batch, time], the position of each token in its sequence (default 0, 1, ...; needed with a
            cache). With a cache a negative one marks padding, which no other token sees.

        Returns:
          logits float32 [batch, time, vocab]; with a cache, `(logits, cache)`.

        Raises:
          InputError: more tokens than block_size, or than the cache has slots. How far a cache is filled is not known
            while compiling: appending more than fits to a part-filled one gives wrong logits, which the caller avoids.
        """
        x_BTD, cache = self._hidden(tokens_BT, cache, positions)
        logits_BTV = masked_logits(x_BTD, self._head(), self.config.vocab_size)[..., : self.config.vocab_size]
        return logits_BTV if cache is None else (logits_BTV, cache)

    def token_losses(self, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """Cross-entropy of each target, in nats, float32 [batch, time].

        The full logits are never held: at most one chunk of them (`losses.CHUNK_ELEMENTS`) is.
        """
        x_BTD, _ = self._hidden(tokens_BT)
        return linear_cross_entropy(x_BTD, self._head(), targets_BT, self.config.vocab_size)

    def init_cache(self, batch: int, length: int) -> attention.Cache:
        """An empty cache for `length` tokens of `batch` sequences; see `attention.init_cache`."""
        return attention.init_cache(self.config, batch, length)

    def _hidden(self, tokens_BT, cache=None, positions_BT=None):
        c = self.config
        if tokens_BT.shape[1] > c.block_size:
            raise InputError(f'{tokens_BT.shape[1]} tokens exceed block_size={c.block_size}; give at most that many')
        if positions_BT is None:
            if cache is not None:
                raise ValueError('apply with a cache needs positions=: int [batch, time]')
            position_embedding = self.wpe[None, : tokens_BT.shape[1]]
        else:
            position_embedding = self.wpe[jnp.maximum(positions_BT, 0)]
        x_BTD = self.wte[tokens_BT].astype(c.dtype) + position_embedding.astype(c.dtype)
        x_BTD = self.embedding_dropout(constrain(x_BTD, 'batch', 'time', 'embed'))
        x_BTD, cache = self._run_blocks(x_BTD, cache, positions_BT)
        return self.ln_f(x_BTD), cache

    def _run_blocks(self, x_BTD, cache, positions_BT):
        c = self.config
        block = Block(c, parent=None)
        key = self.make_rng('dropout') if self.has_rng('dropout') else None

        def run(x_BTD, layer_params, layer, layer_cache=None):
            rngs = {} if key is None else {'dropout': jax.random.fold_in(key, layer)}
            return block.apply({'params': layer_params}, x_BTD, layer_cache, positions_BT, rngs=rngs)

        if cache is None and c.scan_layers and not isinstance(self.blocks, tuple):
            layers = (self.blocks, jnp.arange(c.n_layer))
            return jax.lax.scan(lambda x, inputs: (run(x, *inputs)[0], None), x_BTD, layers)
        layers = self.blocks if isinstance(self.blocks, tuple) else _unstack(self.blocks, c.n_layer)
        if cache is None:
            for layer, layer_params in enumerate(layers):
                x_BTD, _ = run(x_BTD, layer_params, layer)
            return x_BTD, None
        return self._run_cached(run, layers, x_BTD, cache, positions_BT)

    def _run_cached(self, run, layers, x_BTD, cache, positions_BT):
        index, slots = cache['index'], cache['positions'].shape[1]
        if positions_BT.shape[1] > slots:
            raise InputError(f'{positions_BT.shape[1]} tokens exceed the {slots} slots of the cache; make a longer one')
        written_BT = jnp.where(positions_BT < 0, attention.EMPTY, positions_BT)
        slots_BS = jax.lax.dynamic_update_slice(cache['positions'], written_BT.astype(jnp.int32), (0, index))
        keys, values = [], []
        for layer, layer_params in enumerate(layers):
            layer_cache = {'key': cache['key'][layer], 'value': cache['value'][layer]}
            layer_cache |= {'positions': slots_BS, 'index': index}
            x_BTD, updated = run(x_BTD, layer_params, layer, layer_cache)
            keys.append(updated['key'])
            values.append(updated['value'])
        cache = {'key': tuple(keys), 'value': tuple(values), 'positions': slots_BS, 'index': index + x_BTD.shape[1]}
        return x_BTD, cache

    def _init_blocks(self, rng: jax.Array) -> Params:
        """Every layer drawn from its own key, whatever the form the layers are run in."""
        block, x_BTD = Block(self.config, parent=None), jnp.zeros((1, 1, self.config.d_model))
        layer_keys = jax.vmap(lambda layer: jax.random.fold_in(rng, layer))(jnp.arange(self.config.n_layer))
        return jax.vmap(lambda key: block.init(key, x_BTD)['params'])(layer_keys)

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
    """A GPT-3 of the given size, with dense attention in every layer; arguments as for GPT2."""
    return GPT2(vocab_size, block_size, n_layer, n_head, d_model, dropout=dropout, **changes)


def stack_layers(params: Params) -> Params:
    """The tree that is stored: `blocks` a tuple of one tree a layer -> one tree of arrays [n_layer, ...]."""
    return params | {'blocks': jax.tree.map(lambda *layers: jnp.stack(layers), *params['blocks'])}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`; `apply` takes both forms, and a decoding loop is faster on this one."""
    n_layer = jax.tree.leaves(params['blocks'])[0].shape[0]
    return params | {'blocks': _unstack(params['blocks'], n_layer)}


def _unstack(blocks: Params, n_layer: int) -> tuple[Params, ...]:
    arrays, treedef = jax.tree.flatten(blocks)
    columns = [_unstack_array(n_layer)(array) for array in arrays]
    return tuple(jax.tree.unflatten(treedef, layer) for layer in zip(*columns, strict=True))


def _unstack_array(n_layer: int):
    """[n_layer, ...] -> tuple of [...], whose gradient is one stack instead of a sum of n_layer padded arrays."""

    @jax.custom_vjp
    def unstack(array):
        return tuple(array[i] for i in range(n_layer))

    unstack.defvjp(lambda array: (unstack(array), None), lambda _, gradients: (jnp.stack(gradients),))
    return unstack
