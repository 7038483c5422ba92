"""The one description of a model's architecture."""

import dataclasses
import math

import jax.numpy as jnp

from gpt_jax.errors import InputError

# Divisible by any usual tensor-parallel size, and a whole number of lanes for the matrix units.
VOCAB_MULTIPLE = 128

COMPUTE_DTYPES = {'f32': jnp.float32, 'bf16': jnp.bfloat16, 'fp16': jnp.float16}

ATTENTION_PATTERNS = ('dense', 'alternating')

# What the backward pass makes again instead of keeping it; see GPTConfig.remat.
REMAT_POLICIES = ('none', 'dots', 'names', 'full')

# GPT-3's paper gives no width for its bands: assumed to be that of GPT-Neo, its public counterpart.
ASSUMED_BAND_SIZE = 256


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Architecture of a GPT-2/GPT-3 decoder.

    Pre-LayerNorm blocks and a final one, learned positions, tanh-GELU, biases everywhere (GPT-2, section 2.3; GPT-3,
    section 2.1, "the same model and architecture as GPT-2").

    Attributes:
      vocab_size: number of tokens; tables inside are padded to a multiple of 128, invisibly from outside.
      block_size: longest sequence, in tokens.
      n_layer: number of blocks.
      n_head: attention heads; must divide `d_model`.
      d_model: width of the residual stream.
      mlp_expansion: the MLP's width as a multiple of `d_model`.
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
        (`attention.SAVED_NAMES`), 'full' only the input of each layer. Same gradients, less memory, more time.
      scan_layers: run the blocks as one `lax.scan` (compiles once for all layers) or unrolled (faster on CPU). Same
        parameters, same function.
      compute_dtype: 'f32', 'bf16' or 'fp16': of matmuls and activations. Parameters, softmax, LayerNorm statistics and
        losses stay float32.
      layer_norm_epsilon: added to the variance (1e-5 in GPT-2's code).

    Raises:
      InputError: on construction, where a value is out of range.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    d_model: int
    mlp_expansion: int = 4
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

    def __post_init__(self):
        for key in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'd_model', 'mlp_expansion', 'band_size'):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f'model.{key}={value!r} must be a whole number of at least 1')
        if self.d_model % self.n_head:
            raise InputError(
                f'model.d_model={self.d_model} is not divisible by model.n_head={self.n_head}; '
                f'the nearest width that is: {max(1, round(self.d_model / self.n_head)) * self.n_head}'
            )
        for key in ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout'):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise InputError(f'model.{key}={getattr(self, key)} must be at least 0 and below 1')
        scale = self.attention_scale
        if scale is not None and (isinstance(scale, bool) or not 0 < scale < math.inf):
            raise InputError(f'model.attention_scale={scale} must be above 0, or unset for 1 / sqrt(head_dim)')
        for key, known in (('attention_pattern', ATTENTION_PATTERNS), ('remat', REMAT_POLICIES)):
            if getattr(self, key) not in known:
                raise InputError(f'model.{key}={getattr(self, key)!r} must be one of {", ".join(known)}')
        if not self.layer_norm_epsilon > 0:
            raise InputError(f'model.layer_norm_epsilon={self.layer_norm_epsilon} must be above 0')
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
        return self.d_model * self.mlp_expansion

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
        d, f = self.d_model, self.d_mlp
        attention = d * 3 * d + (3 * d if self.qkv_bias else 0) + d * d + d
        mlp = d * f + f + f * d + d
        norms = 2 * 2 * d
        embeddings = self.vocab_size * d * (1 if self.tie_embeddings else 2) + self.block_size * d
        return embeddings + self.n_layer * (attention + mlp + norms) + 2 * d
