"""The whole model on one page, from token ids to logits and losses.

Shape suffixes, here and everywhere: B batch, T time, S key time, D d_model, N heads, K head_dim, F mlp width, V vocab,
L layers, C the three of query, key and value, Q a block of queries.

Parameters: `wte` [V, D], `wpe` [T, D], `blocks` with every array stacked over the layers on its leading axis, `ln_f`,
and `lm_head` [V, D] where it is not tied. V is padded to a multiple of 128.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax.errors import InputError
from gpt_jax.models import attention, ring
from gpt_jax.models.cache import Cache, advance, init_cache, store
from gpt_jax.models.config import ACTIVATIONS, GPTConfig, preset_config
from gpt_jax.models.layers import INIT_STD, Dense, Dropout, LayerNorm, add_positions, copy_table, embed_tokens
from gpt_jax.models.losses import linear_cross_entropy, masked_logits
from gpt_jax.parallel import can_split, constrain, on_one_device, target_device

Params = dict[str, Any]

QKV_NAME, MLP_NAME = 'qkv', 'mlp_up'
# The activations that remat='names' keeps: with them no matrix product of width 3 d_model or d_mlp is made again in the
# backward pass, nor is attention.
SAVED_NAMES = (QKV_NAME, attention.OUTPUT_NAME, attention.LOGSUMEXP_NAME, MLP_NAME)


@flax.struct.dataclass
class TokenInfo:
    """What the model is told of each token besides its id; carried to every block.

    Attributes:
      rows_B: int32 [batch], which row of the global batch each sequence is: dropout masks belong to rows.
      positions_BT: int32 [batch, time], the position of each token in its sequence, or None: 0, 1, ...
      documents_BT: int32 [batch, time], equal where two tokens of a row are of one document and may see each other, or
        None: each row is one document.
    """

    rows_B: jax.Array
    positions_BT: jax.Array | None = None
    documents_BT: jax.Array | None = None

    @classmethod
    def of(
        cls,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        rows_B: jax.Array | None = None,
        documents_BT: jax.Array | None = None,
    ) -> 'TokenInfo':
        """With the rows counted from 0 where they are not given."""
        rows_B = jnp.arange(tokens_BT.shape[0]) if rows_B is None else rows_B
        return cls(rows_B, positions_BT, documents_BT)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what stands before it (GPT-2; GPT-1, section 3.1).

    With a `band` it sees no more than that many tokens, itself among them (GPT-3, section 2.1: "locally banded"). Where
    `info` tells documents apart, it sees none of another one.
    """

    config: GPTConfig
    band: int | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        info: TokenInfo,
        layer: jax.Array | int,
        layer_cache: tuple | None = None,
        cache_slots: Cache | None = None,
    ) -> tuple[jax.Array, tuple | None]:
        """Attends over x itself, or over a cache that x is first added to.

        Args:
          x_BTD: normalised activations.
          info: what is known of the tokens; their positions are needed with a cache.
          layer: which one it is, from 0.
          layer_cache: this layer's keys and values.
          cache_slots: where x goes in the cache (see `cache.advance`).

        Returns:
          Output [batch, time, d_model], and the layer's keys and values with x in them (None without a cache).
        """
        c = self.config
        residual_std = INIT_STD / math.sqrt(2 * c.n_layer)  # GPT-2, section 2.3
        qkv = Dense((c.d_model, 3, c.n_head, c.head_dim), use_bias=c.qkv_bias, dtype=c.dtype, name='qkv')
        qkv_BTCNK = checkpoint_name(qkv(x_BTD), QKV_NAME)
        q_BNTK, k_BNTK, v_BNTK = (
            constrain(y_BNTK, 'batch', 'heads', 'time', 'head_dim', called='query, key and value, each')
            for y_BNTK in qkv_BTCNK.transpose(2, 0, 3, 1, 4)
        )
        if c.scale_attn_by_inverse_layer_idx:
            # Of the queries, as in a scan the layer is not known when the program is made, and kernels take a number.
            q_BNTK = (q_BNTK.astype(jnp.float32) / (layer + 1)).astype(q_BNTK.dtype)
        if layer_cache is None or cache_slots['empty']:
            # Prompts are padded at their end, so that no token of an empty cache has anything but tokens before it.
            y_BNTK = self._causal(q_BNTK, k_BNTK, v_BNTK, info)
        else:
            # Over the cache as it was and over the new tokens, not over the cache as it will be: of several new tokens
            # the first still see what gives way in a band to the last.
            before_BS = cache_slots['before' if self.band is None else 'band_before']
            parts = (*layer_cache, before_BS), (k_BNTK, v_BNTK, cache_slots['shown'])
            y_BNTK = attention.cached_attention(q_BNTK, info.positions_BT, parts, c.scale, self.band)
            # The cache is written to in place, when all have looked at it. Without an order between the two (a term
            # that is zero) the CPU's compiler copies the whole cache for each token.
            k_BNTK, v_BNTK = (x_BNTK + 0.0 * y_BNTK.astype(x_BNTK.dtype) for x_BNTK in (k_BNTK, v_BNTK))
        if layer_cache is not None:
            layer_cache = store(*layer_cache, k_BNTK, v_BNTK, cache_slots, self.band is not None)
        y_BTNK = y_BNTK.transpose(0, 2, 1, 3)
        out = Dense((c.n_head, c.head_dim, c.d_model), contract=2, std=residual_std, dtype=c.dtype, name='out')
        return Dropout(c.resid_dropout)(out(y_BTNK), info.rows_B), layer_cache

    def _causal(self, q_BNTK: jax.Array, k_BNTK: jax.Array, v_BNTK: jax.Array, info: TokenInfo) -> jax.Array:
        """Attention of whole sequences, by the kernel that is fastest where the program will run."""
        c, time = self.config, q_BNTK.shape[2]
        band = self.band if self.band is not None and self.band < time else None
        kernel = attention.choose_kernel(
            target_device(),
            q_BNTK.dtype,
            c.head_dim,
            band=band,
            dropout=c.attention_dropout > 0 and self.has_rng('dropout'),
            documents=info.documents_BT is not None,
            time=time,
            divides=on_one_device() or can_split(q_BNTK.shape, 'batch', 'heads', None, 'head_dim'),
            time_is_split=ring.can_split_time(q_BNTK.shape),
        )
        match kernel:
            case 'ring':
                return ring.ring_attention(q_BNTK, k_BNTK, v_BNTK, info.documents_BT, c.scale)
            case 'ring_banded':
                return ring.ring_banded_attention(q_BNTK, k_BNTK, v_BNTK, info.documents_BT, c.scale, band)
            case 'full':
                drop = functools.partial(Dropout(c.attention_dropout), rows_B=info.rows_B)
                return attention.full_attention(q_BNTK, k_BNTK, v_BNTK, info.documents_BT, c.scale, band, drop)
            case 'cudnn':
                return attention.cudnn_attention(q_BNTK, k_BNTK, v_BNTK, c.scale, band)
            case 'splash':
                return attention.splash_attention(q_BNTK, k_BNTK, v_BNTK, info.documents_BT, c.scale, band)
            case 'banded':
                return attention.banded_attention(q_BNTK, k_BNTK, v_BNTK, info.documents_BT, c.scale, band)
            case 'blockwise':
                return attention.blockwise_attention(q_BNTK, k_BNTK, v_BNTK, info.documents_BT, c.scale)


class MLP(nn.Module):
    """Two matrices with an activation between them, by default a tanh-GELU (GPT-1, section 4.1)."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        residual_std = INIT_STD / math.sqrt(2 * c.n_layer)  # GPT-2, section 2.3
        x_BTF = checkpoint_name(Dense((c.d_model, c.d_mlp), dtype=c.dtype, name='up')(x_BTD), MLP_NAME)
        x_BTF = constrain(ACTIVATIONS[c.activation](x_BTF), 'batch', 'time', 'mlp', called='inside of the MLP')
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
        self,
        x_BTD: jax.Array,
        info: TokenInfo,
        layer: jax.Array | int,
        layer_cache: tuple | None = None,
        cache_slots: Cache | None = None,
    ) -> tuple[jax.Array, tuple | None]:
        """[B, T, D] -> [B, T, D], and the layer's updated cache (see CausalSelfAttention)."""
        c = self.config
        h_BTD = LayerNorm(c.layer_norm_epsilon, c.dtype, name='ln_1')(x_BTD)
        attend = CausalSelfAttention(c, self.band, name='attention')
        h_BTD, layer_cache = attend(h_BTD, info, layer, layer_cache, cache_slots)
        x_BTD = constrain(x_BTD + h_BTD, 'batch', 'time', 'embed', called='residual stream')
        h_BTD = LayerNorm(c.layer_norm_epsilon, c.dtype, name='ln_2')(x_BTD)
        h_BTD = MLP(c, name='mlp')(h_BTD, info)
        return constrain(x_BTD + h_BTD, 'batch', 'time', 'embed', called='residual stream'), layer_cache


def run_layers(config: GPTConfig, block: Callable, blocks: Params | tuple[Params, ...], x_BTD: jax.Array) -> jax.Array:
    """x after all layers.

    With `scan_layers` one scan runs over groups of layers of the pattern's period: a scan's body is one program, and
    dense and banded layers are not the same one. What does not fill a group runs after it.

    Args:
      config: says how the layers are run.
      block: (x, parameters of a layer, its index, its band) -> (x, None).
      blocks: parameters stacked over the layers, or a tuple of one tree a layer, which is never scanned.
      x_BTD: what goes into the first layer.
    """
    if not config.scan_layers or isinstance(blocks, tuple):
        one = _layer(config, block, prevent_cse=True)
        for layer, layer_params in enumerate(layer_trees(blocks, config.n_layer)):
            x_BTD = one(x_BTD, layer_params, layer, config.band(layer))
        return x_BTD
    period = 2 if config.has_bands else 1
    groups = config.n_layer // period
    one = _layer(config, block, prevent_cse=False)

    def group(x_BTD, inputs):
        group_params, first = inputs
        for offset, layer_params in enumerate(group_params):
            x_BTD = one(x_BTD, layer_params, first + offset, config.band(offset))
        return x_BTD, None

    # One tree for each place in a group. What the scan itself slices is there for the backward pass; a slice of such a
    # slice would be stored once more, for all layers.
    slices = [slice(offset, groups * period, period) for offset in range(period)]
    grouped = tuple(blocks if period == 1 else jax.tree.map(operator.itemgetter(part), blocks) for part in slices)
    x_BTD, _ = jax.lax.scan(group, x_BTD, (grouped, jnp.arange(groups) * period))
    if config.n_layer % period:
        last = config.n_layer - 1
        x_BTD = one(x_BTD, jax.tree.map(lambda a: a[last], blocks), last, config.band(last))
    return x_BTD


def _layer(config: GPTConfig, block: Callable, prevent_cse: bool) -> Callable:
    """`block` without its cache, under the policy of `config.remat`."""

    def one(x_BTD, layer_params, layer, band):
        def run(x_BTD, layer_params, layer):
            return block(x_BTD, layer_params, layer, band)[0]

        if config.remat != 'none':
            # In a scan the compiler cannot undo the work of rematerialisation, and need not be hindered from it.
            run = jax.checkpoint(run, policy=_policy(config.remat), prevent_cse=prevent_cse)
        return run(x_BTD, layer_params, layer)

    return one


def _policy(remat: str) -> Callable:
    policies = jax.checkpoint_policies
    return {
        'dots': policies.dots_with_no_batch_dims_saveable,
        'names': policies.save_only_these_names(*SAVED_NAMES),
        'full': policies.nothing_saveable,
    }[remat]


def stack_layers(params: Params) -> Params:
    """The tree that is stored: `blocks` a tuple of one tree a layer -> one tree of arrays [n_layer, ...]."""
    return params | {'blocks': jax.tree.map(lambda *layers: jnp.stack(layers), *params['blocks'])}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`; `apply` takes both forms, and a decoding loop is faster on this one."""
    n_layer = jax.tree.leaves(params['blocks'])[0].shape[0]
    return params | {'blocks': layer_trees(params['blocks'], n_layer)}


def layer_trees(blocks: Params | tuple[Params, ...], count: int) -> tuple[Params, ...]:
    """One tree for each of `count` layers; a tuple of trees stays as it is."""
    if isinstance(blocks, tuple):
        return blocks
    arrays, treedef = jax.tree.flatten(blocks)
    columns = [_unstack_array(count)(array) for array in arrays]
    return tuple(jax.tree.unflatten(treedef, layer) for layer in zip(*columns, strict=True))


def _cut(blocks: Params, layer: int, x_BTD: jax.Array) -> Params:
    """The parameters of one of the stacked layers, cut out when `x_BTD`, which goes into the layer, is there.

    The compiler would cut all layers at once, and in a decoding loop before the first step: a copy of the weights. The
    place of the cut is therefore told with a term of zero that only `x_BTD` gives.
    """
    zero = jnp.minimum(jnp.abs(x_BTD.reshape(-1)[0]).astype(jnp.int32), 0)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer + zero, keepdims=False), blocks)


def _unstack_array(n_layer: int):
    """[n_layer, ...] -> tuple of [...], whose gradient is one stack instead of a sum of n_layer padded arrays."""

    @jax.custom_vjp
    def unstack(array):
        return tuple(array[i] for i in range(n_layer))

    unstack.defvjp(lambda array: (unstack(array), None), lambda _, gradients: (jnp.stack(gradients),))
    return unstack


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
        c = self.config
        table = copy_table(self.wte, c.dtype, tokens_BT)
        head = table if c.tie_embeddings else copy_table(self.lm_head, c.dtype, tokens_BT)
        x_BTD, _ = self._hidden(tokens_BT, TokenInfo.of(tokens_BT, positions, rows, documents), table=table)
        return linear_cross_entropy(x_BTD, head, targets_BT, c.vocab_size)

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

    def _hidden(self, tokens_BT, info, cache=None, empty=False, table=None):
        c = self.config
        if tokens_BT.shape[1] > c.block_size:
            raise InputError(f'{tokens_BT.shape[1]} tokens exceed block_size={c.block_size}; give at most that many')
        positions_BT = info.positions_BT
        if positions_BT is None and cache is not None:
            raise ValueError('apply with a cache needs positions=: int [batch, time]')
        if info.documents_BT is not None:
            # Whole rows on every device, for each layer to take what it needs of them.
            info = info.replace(
                documents_BT=constrain(info.documents_BT, 'batch', None, called='documents, in attention')
            )
        # Without a loss there is no gradient to reduce: the compiler looks tokens up in the parts of a split table.
        token_embedding = self.wte[tokens_BT].astype(c.dtype) if table is None else embed_tokens(table, tokens_BT)
        positions_BT = None if positions_BT is None else jnp.maximum(positions_BT, 0)
        x_BTD = add_positions(token_embedding, self.wpe, positions_BT)
        x_BTD = constrain(x_BTD, 'batch', 'time', 'embed', called='residual stream')
        x_BTD = self.embedding_dropout(x_BTD, info.rows_B)
        dropout_key = self.make_rng('dropout') if self.has_rng('dropout') else None
        if cache is None:
            return self.ln_f(run_layers(c, self._block(info, dropout_key), self.blocks, x_BTD)), None
        x_BTD, cache = self._run_cached(self._block(info, dropout_key), x_BTD, info.positions_BT, cache, empty)
        return self.ln_f(x_BTD), cache

    def _block(self, info, dropout_key):
        """The function of one layer: (x, its parameters, index, band, part of a cache) -> (x, that part)."""

        def run(x_BTD, layer_params, layer, band, layer_cache=None, cache_slots=None):
            rngs = {} if dropout_key is None else {'dropout': jax.random.fold_in(dropout_key, layer)}
            block = Block(self.config, band, parent=None)
            return block.apply({'params': layer_params}, x_BTD, info, layer, layer_cache, cache_slots, rngs=rngs)

        return run

    def _run_cached(self, run, x_BTD, positions_BT, cache, empty):
        slots = cache['positions'].shape[1]
        if positions_BT.shape[1] > slots:
            raise InputError(f'{positions_BT.shape[1]} tokens exceed the {slots} slots of the cache; make a longer one')
        after, cache_slots = advance(cache, positions_BT, empty)
        kept = []
        for layer in range(self.config.n_layer):
            layer_params = self.blocks[layer] if isinstance(self.blocks, tuple) else _cut(self.blocks, layer, x_BTD)
            layer_cache = (cache['key'][layer], cache['value'][layer])
            x_BTD, layer_cache = run(x_BTD, layer_params, layer, self.config.band(layer), layer_cache, cache_slots)
            kept.append(layer_cache)
        keys, values = zip(*kept, strict=True)
        return x_BTD, after | {'key': keys, 'value': values}

    def _init_blocks(self, rng: jax.Array) -> Params:
        """Every layer drawn from its own key, whatever the form the layers are run in."""
        block, x_BTD = Block(self.config, parent=None), jnp.zeros((1, 1, self.config.d_model))
        info = TokenInfo.of(jnp.zeros((1, 1), jnp.int32))
        layer_keys = jax.vmap(lambda layer: jax.random.fold_in(rng, layer))(jnp.arange(self.config.n_layer))
        return jax.vmap(lambda key: block.init(key, x_BTD, info, 0)['params'])(layer_keys)

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


def preset(name: str, **changes: Any) -> GPT:
    """The model called `name` ('gpt2-small', 'gpt3-175b', ...), with `changes` to its configuration.

    Raises:
      InputError: there is no such preset.
    """
    return GPT(preset_config(name, **changes))


def attention_kernels(
    config: GPTConfig, device: jax.Device, documents: bool = False, time_is_split: bool = False
) -> list[str]:
    """The kernels that training runs on a device like `device`, each once: ['cudnn'], ['blockwise', 'banded'], ...

    For logs; `attention.choose_kernel` is what chooses. `documents` tells that rows hold several of them,
    `time_is_split` that time is split over devices.
    """
    bands = [config.band(layer) for layer in range(config.n_layer)]
    bands = [band if band is not None and band < config.block_size else None for band in bands]
    case = {'dropout': config.attention_dropout > 0, 'documents': documents, 'time': config.block_size}
    case['time_is_split'] = time_is_split
    kernels = (attention.choose_kernel(device, config.dtype, config.head_dim, band=band, **case) for band in bands)
    return list(dict.fromkeys(kernels))


@functools.cache
def parameter_shapes(config: GPTConfig) -> Params:
    """The parameter tree of a model as jax.ShapeDtypeStruct, float32, layers stacked; do not change it in place."""
    # The tree is the same in both forms, and a scan traces one layer instead of all.
    model = GPT(dataclasses.replace(config, scan_layers=True))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))['params']
