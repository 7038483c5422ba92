"""config.json <-> GPTConfig: what has a counterpart is carried over, and what has none is refused by name."""

import json
import math
import pathlib
from typing import Any, NoReturn

from gpt_jax.errors import InputError
from gpt_jax.models.config import GPTConfig
from gpt_jax.models.huggingface.layout import GPT2, GPT_NEO

# Our field -> the key of each family, and its value in transformers where config.json leaves it out.
FIELDS = {
    GPT2: {
        'vocab_size': ('vocab_size', 50257),
        'block_size': ('n_positions', 1024),
        'n_layer': ('n_layer', 12),
        'n_head': ('n_head', 12),
        'd_model': ('n_embd', 768),
        'embedding_dropout': ('embd_pdrop', 0.1),
        'attention_dropout': ('attn_pdrop', 0.1),
        'resid_dropout': ('resid_pdrop', 0.1),
        'layer_norm_epsilon': ('layer_norm_epsilon', 1e-5),
        'tie_embeddings': ('tie_word_embeddings', True),
    },
    GPT_NEO: {
        'vocab_size': ('vocab_size', 50257),
        'block_size': ('max_position_embeddings', 2048),
        'n_layer': ('num_layers', 24),
        'n_head': ('num_heads', 16),
        'd_model': ('hidden_size', 2048),
        'embedding_dropout': ('embed_dropout', 0.0),
        'attention_dropout': ('attention_dropout', 0.0),
        'resid_dropout': ('resid_dropout', 0.0),
        'layer_norm_epsilon': ('layer_norm_epsilon', 1e-5),
        'tie_embeddings': ('tie_word_embeddings', True),
    },
}
MLP_WIDTH = {GPT2: 'n_inner', GPT_NEO: 'intermediate_size'}
ARCHITECTURE = {GPT2: 'GPT2LMHeadModel', GPT_NEO: 'GPTNeoForCausalLM'}

# Ours alone: transformers has one rate for the outputs of attention and MLP. Written where the two differ.
MLP_DROPOUT = 'mlp_pdrop'

# Three names of one function, the tanh approximation.
ACTIVATIONS = ('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast')

# Switches that would make another function of the model, with the one value that does not.
ONLY = {
    'scale_attn_by_inverse_layer_idx': False,
    'add_cross_attention': False,
    'is_encoder_decoder': False,
    'pruned_heads': {},
    'quantization_config': None,
    'auto_map': None,
}

KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number'}

TORCH_DTYPES = {'f32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}


def read(path: pathlib.Path) -> tuple[str, GPTConfig]:
    """The family ('gpt2' or 'gpt_neo') and the architecture that a config.json describes.

    Raises:
      InputError: naming file, key and value, where it is missing or damaged, or what it describes cannot be had here.
    """
    keys = _Keys(path)
    family = keys.document.get('model_type')
    if not isinstance(family, str) or family not in FIELDS:
        raise InputError(f'{path}: model_type={family!r} cannot be read; {GPT2} (GPT-2) and {GPT_NEO} (GPT-Neo) can')
    for key, allowed in ONLY.items():
        if (keys.document.get(key) or allowed) != allowed:
            keys.refuse(key, 'has no counterpart here; use a model without it')
    if keys.document.get('activation_function', ACTIVATIONS[0]) not in ACTIVATIONS:
        keys.refuse('activation_function', f'has no counterpart here; these have: {", ".join(ACTIVATIONS)}')
    fields = {field: keys.take(key, default) for field, (key, default) in FIELDS[family].items()}
    fields['mlp_dropout'] = keys.take(MLP_DROPOUT, fields['resid_dropout'])
    if keys.document.get(MLP_WIDTH[family]) is not None:
        width, d_model = keys.take(MLP_WIDTH[family], 1), max(fields['d_model'], 1)
        if width % d_model:
            keys.refuse(MLP_WIDTH[family], f'is not a multiple of the width {d_model}, which it must be here')
        fields['mlp_expansion'] = width // d_model
    if family == GPT_NEO:
        fields |= _neo_attention(keys, fields['n_layer'])
    elif not keys.take('scale_attn_weights', True):
        fields['attention_scale'] = 1.0
    try:
        return family, GPTConfig(**fields)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None


class _Keys:
    """A config.json by its keys, with errors that name the file, the key and its value."""

    def __init__(self, path: pathlib.Path):
        try:
            self.document = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(f'{path}: cannot be read ({error.strerror}); it must stand beside the weights') from None
        except ValueError as error:
            raise InputError(f'{path}: is no JSON ({error}); copy it again from where it came from') from None
        if not isinstance(self.document, dict):
            raise InputError(f'{path}: is no JSON object; copy it again from where it came from')
        self._path = path

    def take(self, key: str, default: bool | int | float) -> Any:
        """The value of `key`, which must be of the default's type (a whole number may stand for a float)."""
        value = self.document.get(key, default)
        if type(value) is not type(default) and not (type(value) is int and type(default) is float):
            self.refuse(key, f'must be {KINDS[type(default)]}')
        return value

    def refuse(self, key: str, reason: str) -> NoReturn:
        raise InputError(f'{self._path}: {key}={json.dumps(self.document.get(key))} {reason}')


def _neo_attention(keys: _Keys, n_layer: int) -> dict[str, Any]:
    try:
        types = keys.document.get('attention_types', [[['global', 'local'], 12]])
        kinds = [kind for pattern, times in types for _ in range(times) for kind in pattern]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != n_layer or any(kind not in ('global', 'local') for kind in kinds):
        keys.refuse('attention_types', f'does not name global or local for each of num_layers={n_layer}')
    attention = {'qkv_bias': False, 'attention_scale': 1.0}
    if 'local' not in kinds:
        return attention
    if kinds != ['local' if layer % 2 else 'global' for layer in range(n_layer)]:
        keys.refuse('attention_types', 'has no counterpart here; all global has, and global and local in turn')
    return attention | {'attention_pattern': 'alternating', 'band_size': keys.take('window_size', 256)}


def describe(config: GPTConfig, dtype: str) -> tuple[str, dict[str, Any]]:
    """The family that can hold a model of this architecture, and its config.json; `dtype` is a key of TORCH_DTYPES.

    Raises:
      InputError: naming the field, where neither GPT-2 nor GPT-Neo can.
    """
    family = _family(config)
    document: dict[str, Any] = {'architectures': [ARCHITECTURE[family]], 'model_type': family}
    for field, (key, _) in FIELDS[family].items():
        document[key] = getattr(config, field)
    document[MLP_WIDTH[family]] = config.d_mlp
    document |= {'activation_function': ACTIVATIONS[0], 'initializer_range': 0.02, 'torch_dtype': TORCH_DTYPES[dtype]}
    if config.mlp_dropout != config.resid_dropout:
        document[MLP_DROPOUT] = config.mlp_dropout
    if family == GPT2:
        document |= {'n_ctx': config.block_size, 'scale_attn_weights': config.attention_scale != 1.0}
    else:
        kinds = ['global' if config.band(layer) is None else 'local' for layer in range(config.n_layer)]
        document |= {'attention_types': [[[kind], 1] for kind in kinds], 'attention_layers': kinds}
        document['window_size'] = config.band_size
    return family, document


def _family(config: GPTConfig) -> str:
    if config.qkv_bias:
        if config.attention_pattern != 'dense':
            raise InputError(
                f'model.attention_pattern={config.attention_pattern!r} with model.qkv_bias=True, as GPT-3 has it, has '
                'no counterpart in transformers; dense attention has (GPT-2), or qkv_bias=False with '
                'attention_scale=1.0 (GPT-Neo)'
            )
        usual = 1 / math.sqrt(config.head_dim)
        if not _unscaled(config) and not math.isclose(config.attention_scale or usual, usual, rel_tol=1e-6):
            raise InputError(
                f'model.attention_scale={config.attention_scale} has no counterpart in transformers; 1 / sqrt(head '
                f'width) = {usual:.6g} and 1.0 have'
            )
        return GPT2
    if not _unscaled(config):
        raise InputError(
            f'model.qkv_bias=False with model.attention_scale={config.attention_scale} has no counterpart in '
            'transformers; with attention_scale=1.0 it is GPT-Neo'
        )
    return GPT_NEO


def _unscaled(config: GPTConfig) -> bool:
    return (config.attention_scale or 1 / math.sqrt(config.head_dim)) == 1.0
