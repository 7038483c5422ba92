"""The one description of a model's architecture, the published sizes, and what can be counted from it alone."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.config import LEAST_EPSILON, MOST_EXPANSION, MOST_IDS, MOST_LAYERS, MOST_WIDTH
from gpt_jax.errors import InputError

# Divisible by any usual tensor-parallel size, and a whole number of lanes for the matrix units.
VOCAB_MULTIPLE = 128

COMPUTE_DTYPES = {'f32': jnp.float32, 'bf16': jnp.bfloat16, 'fp16': jnp.float16}

ATTENTION_PATTERNS = ('dense', 'alternating')

# Between the MLP's two matrices, by their names in transformers (its activations.py), of those without parameters.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu_new': functools.partial(jax.nn.gelu, approximate=True),  # by tanh: GPT-1, section 4.1
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'relu': jax.nn.relu,
    'relu2': lambda x: jnp.square(jax.nn.relu(x)),
    'relu6': jax.nn.relu6,
    'leaky_relu': jax.nn.leaky_relu,
    'silu': jax.nn.silu,
    'mish': jax.nn.mish,
    'hardswish': jax.nn.hard_swish,
    'tanh': jnp.tanh,
    'sigmoid': jax.nn.sigmoid,
    'linear': lambda x: x,
}

# What the backward pass makes again instead of keeping it; see GPTConfig.remat.
REMAT_POLICIES = ('none', 'dots', 'names', 'full')

LARGEST = {
    'vocab_size': MOST_IDS,
    'block_size': MOST_IDS,
    'n_layer': MOST_LAYERS,
    'n_head': MOST_WIDTH,
    'd_model': MOST_WIDTH,
    'mlp_expansion': MOST_EXPANSION,
    'n_inner': MOST_WIDTH,
    'band_size': MOST_IDS,
}

# GPT-3's paper gives no width for its bands: assumed to be that of GPT-Neo, its public counterpart.
ASSUMED_BAND_SIZE = 256


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Architecture of a GPT-2/GPT-3 decoder.

    Pre-LayerNorm blocks and a final one, learned positions, biases everywhere, by default tanh-GELU (GPT-2, section
    2.3; GPT-3, section 2.1, "the same model and architecture as GPT-2").

    Attributes:
      vocab_size: number of tokens; tables inside are padded to a multiple of 128, invisibly from outside.
      block_size: longest sequence, in tokens.
      n_layer: number of blocks.
      n_head: attention heads; must divide `d_model`.
      d_model: width of the residual stream.
      mlp_expansion: the MLP's width as a multiple of `d_model`; None where `n_inner` gives it.
      embedding_dropout: rate on the sum of token and position embeddings (GPT-2's `embd_pdrop`).
      attention_dropout: rate on the attention probabilities (`attn_pdrop`).
      mlp_dropout: rate on the MLP's output before it joins the residual stream.
      resid_dropout: rate on the attention's output before it joins the residual stream. GPT-2's single `resid_pdrop`
        is `mlp_dropout` and `resid_dropout` at the same rate.
      attention_pattern: 'dense', or 'alternating': dense and locally banded layers in turn, the first one dense (GPT-3,
        section 2.1, after the Sparse Transformer). Of an odd number of layers the last is dense, too.
      band_size: tokens that a query of a banded layer sees, itself among them. Assumed: the paper gives none.
      qkv_bias: whether the projections to query, key and value have a bias (GPT-Neo's have none).
      attention_scale: factor on the product of query and key; None is 1 / sqrt(head_dim) (GPT-Neo's is 1.0).
      tie_embeddings: the output head is the token embedding (GPT-2's choice).
      remat: what the backward pass makes again instead of keeping it, layer by layer: 'none' keeps everything, 'dots'
        keeps the results of matrix products with parameters, 'names' the four activations named in the model
        (`gpt.SAVED_NAMES`), 'full' only the input of each layer. Same gradients, less memory, more time.
      scan_layers: run the blocks as one `lax.scan` (compiles once for all layers) or unrolled (faster on CPU). Same
        parameters, same function.
      compute_dtype: 'f32', 'bf16' or 'fp16': of matmuls and activations. Parameters, softmax, LayerNorm statistics and
        losses stay float32.
      layer_norm_epsilon: added to the variance (1e-5 in GPT-2's code).
      activation: between the MLP's two matrices, a key of `ACTIVATIONS`.
      n_inner: the MLP's width where it is no multiple of `d_model`; then `mlp_expansion` counts for nothing.
      scale_attn_by_inverse_layer_idx: the product of query and key is also divided by the layer's number, from 1.

    Raises:
      InputError: on construction, where a value is out of range.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    d_model: int
    mlp_expansion: int | None = 4
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    resid_dropout: float = 0.0
    attention_pattern: str = 'dense'
    band_size: int = ASSUMED_BAND_SIZE
    qkv_bias: bool = True
    attention_scale: float | None = None
    tie_embeddings: bool = True
    remat: str = 'none'
    scan_layers: bool = False
    compute_dtype: str = 'f32'
    layer_norm_epsilon: float = 1e-5
    activation: str = 'gelu_new'
    n_inner: int | None = None
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self):
        if self.n_inner is not None:
            # So that one width is described in one way.
            object.__setattr__(self, 'mlp_expansion', None)
        for key, largest in LARGEST.items():
            value = getattr(self, key)
            if value is None and key == ('n_inner' if self.n_inner is None else 'mlp_expansion'):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f'model.{key}={value!r} must be a whole number of at least 1')
            if value > largest:
                raise InputError(f'model.{key}={value} must be at most {largest}')
        if self.d_model % self.n_head:
            raise InputError(
                f'model.d_model={self.d_model} is not divisible by model.n_head={self.n_head}; '
                f'the nearest width that is: {max(1, round(self.d_model / self.n_head)) * self.n_head}'
            )
        for key in ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout'):
            if not (_is_number(getattr(self, key)) and 0.0 <= getattr(self, key) < 1.0):
                raise InputError(f'model.{key}={getattr(self, key)} must be at least 0 and below 1')
        scale = self.attention_scale
        if scale is not None and not (_is_number(scale) and 0 < scale < math.inf):
            raise InputError(f'model.attention_scale={scale} must be above 0, or unset for 1 / sqrt(head_dim)')
        choices = {'attention_pattern': ATTENTION_PATTERNS, 'remat': REMAT_POLICIES, 'activation': tuple(ACTIVATIONS)}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise InputError(f'model.{key}={getattr(self, key)!r} must be one of {", ".join(known)}')
        epsilon = self.layer_norm_epsilon
        # Beyond 1 it is no small number that keeps a division sound, but another function.
        if not (_is_number(epsilon) and LEAST_EPSILON <= epsilon <= 1):
            raise InputError(f'model.layer_norm_epsilon={epsilon!r} must be at least {LEAST_EPSILON} and at most 1')
        for key in ('qkv_bias', 'tie_embeddings', 'scan_layers', 'scale_attn_by_inverse_layer_idx'):
            if not isinstance(getattr(self, key), bool):
                raise InputError(f'model.{key}={getattr(self, key)!r} must be True or False')
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise InputError(f'precision.compute={self.compute_dtype!r} must be one of {", ".join(COMPUTE_DTYPES)}')

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head

    @property
    def scale(self) -> float:
        """Factor on the product of query and key."""
        return 1.0 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale

    @property
    def has_bands(self) -> bool:
        """Whether any layer is banded."""
        return any(self.band(layer) is not None for layer in range(self.n_layer))

    def band(self, layer: int) -> int | None:
        """Tokens that a query of `layer` (from 0) sees, itself among them; None where it sees all before it."""
        return self.band_size if self.attention_pattern == 'alternating' and layer % 2 else None

    @property
    def d_mlp(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.d_model * self.mlp_expansion if self.n_inner is None else self.n_inner

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def dtype(self) -> jnp.dtype:
        """`compute_dtype` as a dtype."""
        return COMPUTE_DTYPES[self.compute_dtype]

    @property
    def num_parameters(self) -> int:
        """Trainable scalars as the papers count them: tied head counted once, no vocabulary padding."""
        return sum(parameters_by_part(self).values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


GPT2_VOCAB_SIZE = 50257


def _gpt2(n_layer: int, n_head: int, d_model: int) -> GPTConfig:
    return GPTConfig(GPT2_VOCAB_SIZE, block_size=1024, n_layer=n_layer, n_head=n_head, d_model=d_model)


def _gpt3(n_layer: int, n_head: int, d_model: int) -> GPTConfig:
    return GPTConfig(
        GPT2_VOCAB_SIZE,
        block_size=2048,
        n_layer=n_layer,
        n_head=n_head,
        d_model=d_model,
        attention_pattern='alternating',  # section 2.1; the width of the bands is assumed
    )


# Dropout is 0 here: it belongs to a training recipe, not to a size.
PRESETS: dict[str, GPTConfig] = {
    # "Language Models are Unsupervised Multitask Learners" (2019), table 2. The often quoted 117M and 345M are early
    # miscounts; `num_parameters` gives 124M and 355M.
    'gpt2-small': _gpt2(12, 12, 768),
    'gpt2-medium': _gpt2(24, 16, 1024),
    'gpt2-large': _gpt2(36, 20, 1280),
    'gpt2-xl': _gpt2(48, 25, 1600),
    # "Language Models are Few-Shot Learners" (2020), table 2.1.
    'gpt3-125m': _gpt3(12, 12, 768),
    'gpt3-350m': _gpt3(24, 16, 1024),
    'gpt3-760m': _gpt3(24, 16, 1536),
    # The table says 24 heads of 128 at width 2048, which contradicts itself (24 x 128 = 3072): 16 heads of 128 here.
    'gpt3-1.3b': _gpt3(24, 16, 2048),
    'gpt3-2.7b': _gpt3(32, 32, 2560),
    'gpt3-6.7b': _gpt3(32, 32, 4096),
    # The table says width 5140 with 40 heads of 128, which contradicts itself (40 x 128 = 5120): width 5120 here.
    'gpt3-13b': _gpt3(40, 40, 5120),
    'gpt3-175b': _gpt3(96, 96, 12288),
    # The four tiers of the PyTorch suite that gpt_jax follows. Its table calls the first three 350M, 1.3B and 6.7B; at
    # these dimensions they have 125M, 356M and 2.5B parameters.
    'gpt3-ada': _gpt3(12, 12, 768),
    'gpt3-babbage': _gpt3(24, 16, 1024),
    'gpt3-curie': _gpt3(48, 32, 2048),
    'gpt3-davinci': _gpt3(96, 96, 12288),
}


def preset_config(name: str, **changes: Any) -> GPTConfig:
    """The configuration called `name`, with `changes` to its fields.

    Raises:
      InputError: there is no such preset.
    """
    if name not in PRESETS:
        raise InputError(f'model.preset={name!r} is not one of {", ".join(PRESETS)}')
    return dataclasses.replace(PRESETS[name], **changes)


def parameters_by_part(config: GPTConfig) -> dict[str, int]:
    """Trainable scalars of each part, without the padding of the vocabulary; they add up to `num_parameters`."""
    # Imported here: the model itself imports this file.
    from gpt_jax.models.gpt import parameter_shapes

    shapes = parameter_shapes(config)

    def size(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    blocks, table = shapes['blocks'], config.vocab_size * config.d_model
    parts = {
        'token embedding': table,
        'position embedding': size(shapes['wpe']),
        'attention': size(blocks['attention']),
        'MLP': size(blocks['mlp']),
        'LayerNorm': size((blocks['ln_1'], blocks['ln_2'], shapes['ln_f'])),
    }
    return parts if config.tie_embeddings else parts | {'output head': table}


def mean_keys(config: GPTConfig, layer: int) -> float:
    """Keys that a query of `layer` is counted with, by the mean over a sequence of block_size tokens.

    A dense layer counts all T of them, as the PaLM paper does, though the causal mask hides half. A banded layer
    counts what its queries see: the t-th of them min(t, band).
    """
    time, band = config.block_size, config.band(layer)
    if band is None or band >= time:
        return time
    return (band * (band + 1) / 2 + (time - band) * band) / time


def training_flops_per_token(config: GPTConfig) -> float:
    """6 N + 12 D (keys a query is counted with, summed over the layers): forward and backward.

    N counts all parameters but the position embeddings (PaLM paper, appendix B). With dense layers alone it is the
    usual 6 N + 12 L D T.
    """
    weights = config.num_parameters - config.block_size * config.d_model
    return 6 * weights + 12 * config.d_model * sum(mean_keys(config, layer) for layer in range(config.n_layer))


def causal_flops_per_token(config: GPTConfig) -> float:
    """The same with nothing counted that the causal mask hides: a dense layer's queries see (T + 1) / 2 keys."""
    dense = dataclasses.replace(config, attention_pattern='dense')
    hidden = sum(mean_keys(config, layer) == mean_keys(dense, layer) for layer in range(config.n_layer))
    return training_flops_per_token(config) - 12 * config.d_model * hidden * (config.block_size - 1) / 2
