"""Hugging Face directories of GPT-2 and GPT-Neo, in and out: config.json with safetensors, and nothing else needed.

    config, params = load(directory)
    save(directory, config, params)

A directory holds `config.json` and the weights, in `model.safetensors` or in several files that
`model.safetensors.index.json` lists. Pickled weights are never read: loading a pickle runs the code in it. Nothing in a
directory is trusted: every value has its bounds, and nothing large is made before sizes and tensors agree.

From top to bottom: reading and writing a directory; where each of our parameters stands in its files; config.json <->
GPTConfig; the safetensors files as one set of tensors.
"""

import contextlib
import dataclasses
import functools
import json
import math
import operator
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt_jax.errors import InputError, first_line, printable
from gpt_jax.files import check_regular, new_folder, read_json
from gpt_jax.models.config import ACTIVATIONS, COMPUTE_DTYPES, GPTConfig
from gpt_jax.models.gpt import parameter_shapes

GPT2, GPT_NEO = 'gpt2', 'gpt_neo'

# Files of a directory.
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLED = ('pytorch_model.bin', 'pytorch_model.bin.index.json')
COPY_AGAIN = 'copy it again from where it came from'

PREFIX = 'transformer.'
TABLE, HEAD = 'wte.weight', 'lm_head.weight'
# Tensors that every model has once: what stands before their names stands before all.
ANCHORS = ('wpe.weight', 'ln_f.weight', 'ln_f.bias')
FLOATS = ('F32', 'F16', 'BF16')
# Our names of a LayerNorm's parameters, and theirs.
NORM = (('scale', 'weight'), ('bias', 'bias'))
# Causal masks that old files carry along: they are not weights, and every model makes its own.
BUFFERS = r'h\.\d+\.attn\.(attention\.)?(bias|masked_bias)'


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
        'scale_attn_by_inverse_layer_idx': ('scale_attn_by_inverse_layer_idx', False),
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

# Further names of the same functions, by their formulas in transformers' activations.py. Those of the tanh
# approximation differ in how sqrt(2 / pi) is rounded and in the order of products: in float32 by no more than rounding.
SYNONYMS = {
    'gelu_pytorch_tanh': 'gelu_new',
    'gelu_python_tanh': 'gelu_new',
    'gelu_fast': 'gelu_new',
    'gelu_accurate': 'gelu_new',
    'gelu_python': 'gelu',
    'swish': 'silu',
}

# Switches that would make another function of the model, with the one value that does not.
# `reorder_and_upcast_attn` is none: it says in what order and precision the same is computed.
ONLY = {
    'add_cross_attention': False,
    'rotary': False,
    'rotary_dim': None,
    'position_embedding_type': 'absolute',
    'alibi': False,
    'multi_query': False,
    'is_encoder_decoder': False,
    'pruned_heads': {},
    'quantization_config': None,
    'auto_map': None,
}

# Of config.json and generation_config.json: ids that mean something to whoever generates.
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
LARGEST_ID = 2**31 - 1

DIVERGED = 'has values that are NaN or infinite; use weights of a training that did not diverge'

KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number'}

TORCH_DTYPES = {'f32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}


class Tensor(NamedTuple):
    """One tensor of a file, and the part of a parameter that it fills.

    Attributes:
      name: without the prefix `transformer.`.
      shape: in the file.
      index: the part of the parameter: `parameter[index]`, reshaped, is the tensor.
      transposed: whether it is so only after transposing the tensor.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[Any, ...]
    transposed: bool = False


class Parameter(NamedTuple):
    """One parameter of ours: its path in the tree, its shape, and the tensors that fill it (but for padded rows)."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]


class StoredTensor(NamedTuple):
    """One tensor on disk: its file, shape and dtype as safetensors names it ('F32'), and the open file."""

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    file: Any

    def read(self, name: str) -> np.ndarray:
        """The tensor; InputError, naming file and tensor, where the file cannot be read."""
        try:
            return self.file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f'{self.path}: {name} cannot be read ({first_line(error)}); {COPY_AGAIN}') from None


def is_directory(path: str | os.PathLike) -> bool:
    """Whether `path` is meant as a Hugging Face directory: it has its weights, or a config.json with a `model_type`.

    One whose files are incomplete or of another architecture is one, too: `load` says what is wrong with it.
    """
    path = pathlib.Path(path)
    weights = (SINGLE, INDEX, *PICKLED)
    if any(os.path.lexists(path / name) for name in weights):
        return True
    try:
        document = read_json(path / 'config.json')
    except InputError:
        return False
    return isinstance(document, dict) and 'model_type' in document


def read_config(directory: str | os.PathLike) -> GPTConfig:
    """The architecture that a directory's config.json describes. Raises InputError as `load`."""
    return _read_config_json(pathlib.Path(directory) / 'config.json')[1]


def read_token_ids(directory: str | os.PathLike) -> dict[str, int | list[int]]:
    """`bos_token_id`, `eos_token_id` (one or a list) and `pad_token_id`, of those that a directory gives.

    As in transformers generation_config.json wins over config.json. An id need not be in the vocabulary: many small
    models carry GPT-2's 50256, which they never write.

    Raises:
      InputError: naming file, key and value, where one is no id, or a file is damaged.
    """
    ids: dict[str, int | list[int]] = {}
    for name in ('config.json', 'generation_config.json'):
        path = pathlib.Path(directory).expanduser() / name
        if name == 'generation_config.json' and not os.path.lexists(path):
            continue
        keys = _Keys(path)
        for key in TOKEN_IDS:
            value = keys.document.get(key)
            several = value if isinstance(value, list) and key == 'eos_token_id' else [value]
            if value is None:
                continue
            if any(type(id_) is not int or not -1 <= id_ <= LARGEST_ID for id_ in several):
                keys.refuse(key, f'is no token id; use one from 0 to {LARGEST_ID}')
            ids[key] = value
    return ids


def is_finite(array: Any) -> bool:
    """Whether no value of a numpy or jax array is NaN or infinite."""
    # Both are NaN where any value is, and unlike `isfinite(array)` they make no array.
    return not array.size or bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def load(
    directory: str | os.PathLike, place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None
) -> tuple[GPTConfig, Any]:
    """Read a GPT-2 or GPT-Neo directory, as transformers writes it: `(config, params)`, all parameters float32.

    Tensors may be float32, float16 or bfloat16, their names with or without `transformer.` or the prefix of a wrapper
    (`model.`). A tied table may stand there as `wte.weight`, `lm_head.weight`, or both. Rows of padding are zero.
    At no time is more in memory than the parameters, one parameter again (its layers stacked), and one tensor.

    Args:
      directory: holds config.json and safetensors.
      place: takes a parameter's path in the tree and its array in host memory, and gives what the tree is to hold;
        by default an array on jax's default device.

    Raises:
      InputError: in one line that names file and key, where a file is missing or damaged, config.json describes what
        has no counterpart here, or a tensor is missing, unknown, of another shape, of another type, or has a value that
        is NaN or infinite.
    """
    folder = pathlib.Path(directory).expanduser()
    family, config = _read_config_json(folder / 'config.json')
    wanted = _parameters(config, family)
    place = place or (lambda _, array: jax.device_put(array).block_until_ready())
    params = {}
    with _open_tensors(folder) as tensors:
        names = _accounted_for(tensors, wanted, folder)
        for parameter in wanted:
            array = _read_parameter(parameter, tensors, names)
            if parameter.path == ('wte',) and config.tie_embeddings:
                _check_tied(array[: config.vocab_size], tensors, names)
            params[parameter.path] = place(parameter.path, array)
    return config, _nested(params)


def save(
    directory: str | os.PathLike,
    config: GPTConfig,
    params: Any,
    dtype: str = 'f32',
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a directory that `transformers.AutoModelForCausalLM` opens: config.json and model.safetensors.

    It appears whole or not at all. Rows of padding are left out. GPT-2 and GPT-Neo have one dropout rate for the
    outputs of attention and MLP: `resid_dropout`; where `mlp_dropout` differs, `load` alone reads it back.

    Args:
      directory: a new or an empty folder.
      config: the architecture.
      params: its parameters, layers stacked (see `stack_layers`).
      dtype: of the tensors, 'f32', 'bf16' or 'fp16'.
      extra: further keys of config.json, such as `bos_token_id`.

    Raises:
      InputError: the architecture is neither GPT-2's nor GPT-Neo's (GPT-3's banded layers are not), `dtype` is
        unknown, a parameter is NaN or infinite, float16 cannot hold it, or something stands at `directory` already.
      ValueError: `params` are not those of `config`.
    """
    if dtype not in COMPUTE_DTYPES:
        raise InputError(f'dtype={dtype!r} must be one of {", ".join(COMPUTE_DTYPES)}')
    family, document = _config_json(config, dtype)
    tensors = {}
    for parameter in _parameters(config, family):
        tensors |= _tensors_of(parameter, params, COMPUTE_DTYPES[dtype])
    document |= {'bos_token_id': None, 'eos_token_id': None} | dict(extra or {})
    with new_folder(directory) as folder:
        save_file(tensors, folder / SINGLE, metadata={'format': 'pt'})
        text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + '\n'
        (folder / 'config.json').write_text(text, encoding='utf-8')


def _accounted_for(tensors: dict[str, StoredTensor], wanted: list[Parameter], folder: pathlib.Path) -> dict[str, str]:
    """Our name of every tensor that is wanted -> its name in the file, after holding all that is there against it."""
    prefix, head = _prefixes(tensors)
    expected = {
        head if tensor.name == HEAD else prefix + tensor.name: tensor
        for parameter in wanted
        for tensor in parameter.tensors
    }
    if head not in expected and head in tensors and prefix + TABLE not in tensors:
        expected[head] = expected.pop(prefix + TABLE)  # one table, under the name of its other use
    for name, stored in tensors.items():
        if re.fullmatch(re.escape(prefix) + BUFFERS, name) or (name == head and head not in expected):
            continue
        if name not in expected:
            raise InputError(
                f'{stored.path}: {printable(name)} is no tensor of the model in config.json; use the config of it'
            )
        shape = expected[name].shape
        if stored.shape != shape:
            raise InputError(
                f'{stored.path}: {name} has shape {list(stored.shape)} and config.json asks for {list(shape)}; '
                'use the config of these weights'
            )
        if stored.dtype not in FLOATS:
            raise InputError(f'{stored.path}: {name} is of type {stored.dtype}; only {", ".join(FLOATS)} can be read')
    for name in expected:
        if name not in tensors:
            path = next(iter(tensors.values())).path if len({t.path for t in tensors.values()}) == 1 else folder
            raise InputError(f'{path}: {name} is missing, which config.json asks for; use the config of these weights')
    return {tensor.name: name for name, tensor in expected.items()}


def _prefixes(tensors: dict[str, StoredTensor]) -> tuple[str, str]:
    """What stands before the names of a directory's tensors, such as `transformer.`, and the name of its head.

    A wrapper around the model (`model.transformer.`, `module.`) adds its own, in most cases to the head too.
    """
    found = [name.removesuffix(anchor) for name in tensors for anchor in ANCHORS if name.endswith(anchor)]
    prefix = max(found, key=found.count, default='')
    head = prefix.removesuffix(PREFIX) + HEAD
    return prefix, head if head in tensors else HEAD


def _read_parameter(parameter: Parameter, tensors: dict[str, StoredTensor], names: dict[str, str]) -> np.ndarray:
    array = np.zeros(parameter.shape, np.float32)
    for tensor in parameter.tensors:
        name = names[tensor.name]
        value, part = tensors[name].read(name), array[tensor.index]
        part[...] = (value.T if tensor.transposed else value).reshape(part.shape)
        if not is_finite(part):
            raise InputError(f'{tensors[name].path}: {name} {DIVERGED}')
    return array


def _check_tied(table: np.ndarray, tensors: dict[str, StoredTensor], names: dict[str, str]) -> None:
    _, head = _prefixes(tensors)
    if head not in tensors or names[TABLE] == head:
        return
    stored = tensors[head]
    if stored.shape != table.shape or not np.array_equal(stored.read(head).astype(np.float32, copy=False), table):
        raise InputError(
            f'{stored.path}: {head} differs from {TABLE}, and by config.json (tie_word_embeddings) they are one; '
            'set tie_word_embeddings to false there'
        )


def _tensors_of(parameter: Parameter, params: Any, dtype: Any) -> dict[str, np.ndarray]:
    """The tensors of one parameter: views of it where neither type nor order changes."""
    array = params
    for key in parameter.path:
        array = array[key]
    if array.shape != parameter.shape:
        raise ValueError(f'{"/".join(parameter.path)} has shape {array.shape}, the config needs {parameter.shape}')
    array = np.asarray(jax.device_get(array))
    if not is_finite(array):
        raise InputError(f'{"/".join(parameter.path)} {DIVERGED}')
    tensors = {}
    for tensor in parameter.tensors:
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        value = array[tensor.index].reshape(shape)
        with np.errstate(over='ignore'):  # the next lines report it
            value = np.ascontiguousarray((value.T if tensor.transposed else value).astype(dtype, copy=False))
        if dtype == jnp.float16 and np.any(np.isinf(value)):
            raise InputError(f'dtype=fp16 cannot hold the values of {"/".join(parameter.path)}; use bf16 or f32')
        name = tensor.name if tensor.name == HEAD else PREFIX + tensor.name
        tensors[name] = value
    return tensors


def _parameters(config: GPTConfig, family: str) -> list[Parameter]:
    """Every parameter of a model of this architecture; `family` is GPT2 or GPT_NEO.

    Both keep one tensor a layer where we stack them. GPT-2's matrices are [in, out] like ours, with query, key and
    value in one; GPT-Neo's are [out, in], with query, key and value apart.
    """
    d, f, neo, shapes = config.d_model, config.d_mlp, family == GPT_NEO, parameter_shapes(config)

    def parameter(path: str, *tensors: Tensor) -> Parameter:
        names = tuple(path.split('/'))
        return Parameter(names, functools.reduce(operator.getitem, names, shapes).shape, tensors)

    def stacked(path: str, *tensors: Tensor) -> Parameter:
        """`tensors` are those of one layer, with {} where its number goes."""
        filled = (
            tensor._replace(name=tensor.name.format(layer), index=(layer, *tensor.index))
            for layer in range(config.n_layer)
            for tensor in tensors
        )
        return parameter(f'blocks/{path}', *filled)

    def table(name: str, rows: int) -> Tensor:
        return Tensor(name, (rows, d), (slice(0, rows),))  # what is beyond `rows` is our padding

    def matrix(name: str, inputs: int, outputs: int, *index: Any) -> Tensor:
        return Tensor(name, (outputs, inputs) if neo else (inputs, outputs), index, transposed=neo)

    if neo:
        out = 'h.{}.attn.attention.out_proj'
        parts = ((f'h.{{}}.attn.attention.{part}_proj.weight', (slice(None), i)) for i, part in enumerate('qkv'))
        qkv = [stacked('attention/qkv/kernel', *(matrix(name, d, d, *index) for name, index in parts))]
    else:
        out = 'h.{}.attn.c_proj'
        qkv = [
            stacked('attention/qkv/kernel', matrix('h.{}.attn.c_attn.weight', d, 3 * d)),
            stacked('attention/qkv/bias', Tensor('h.{}.attn.c_attn.bias', (3 * d,), ())),
        ]
    parameters = [
        parameter('wte', table('wte.weight', config.vocab_size)),
        parameter('wpe', table('wpe.weight', config.block_size)),
        *(
            stacked(f'{norm}/{ours}', Tensor(f'h.{{}}.{norm}.{theirs}', (d,), ()))
            for norm in ('ln_1', 'ln_2')
            for ours, theirs in NORM
        ),
        *qkv,
        stacked('attention/out/kernel', matrix(f'{out}.weight', d, d)),
        stacked('attention/out/bias', Tensor(f'{out}.bias', (d,), ())),
        stacked('mlp/up/kernel', matrix('h.{}.mlp.c_fc.weight', d, f)),
        stacked('mlp/up/bias', Tensor('h.{}.mlp.c_fc.bias', (f,), ())),
        stacked('mlp/down/kernel', matrix('h.{}.mlp.c_proj.weight', f, d)),
        stacked('mlp/down/bias', Tensor('h.{}.mlp.c_proj.bias', (d,), ())),
        *(parameter(f'ln_f/{ours}', Tensor(f'ln_f.{theirs}', (d,), ())) for ours, theirs in NORM),
    ]
    return parameters if config.tie_embeddings else [*parameters, parameter('lm_head', table(HEAD, config.vocab_size))]


def _nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """{('a', 'b'): x} -> {'a': {'b': x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


def _read_config_json(path: pathlib.Path) -> tuple[str, GPTConfig]:
    """The family ('gpt2' or 'gpt_neo') and the architecture that a config.json describes.

    Raises:
      InputError: naming file, key and value, where it is missing or damaged, or what it describes cannot be had here.
    """
    keys = _Keys(path)
    family = keys.document.get('model_type')
    if not isinstance(family, str) or family not in FIELDS:
        raise InputError(
            f'{path}: model_type={repr(family)[:200]} cannot be read; {GPT2} (GPT-2) and {GPT_NEO} (GPT-Neo) can'
        )
    for key, allowed in ONLY.items():
        if (keys.document.get(key) or allowed) != allowed:
            keys.refuse(key, 'has no counterpart here; use a model without it')
    fields = {field: keys.take(key, default) for field, (key, default) in FIELDS[family].items()}
    if family == GPT_NEO and keys.take('scale_attn_by_inverse_layer_idx', False):
        keys.refuse('scale_attn_by_inverse_layer_idx', 'has no counterpart in GPT-Neo; use a model without it')
    fields['mlp_dropout'] = keys.take(MLP_DROPOUT, fields['resid_dropout'])
    fields['activation'] = _activation(keys)
    if keys.document.get(MLP_WIDTH[family]) is not None:
        width, d_model = keys.take(MLP_WIDTH[family], 1), max(fields['d_model'], 1)
        is_multiple = width > 0 and width % d_model == 0
        fields |= {'mlp_expansion': width // d_model} if is_multiple else {'n_inner': width}
    if family == GPT2 and not keys.take('scale_attn_weights', True):
        fields['attention_scale'] = 1.0
    try:
        config = GPTConfig(**fields)
        if family == GPT_NEO:
            config = dataclasses.replace(config, **_neo_attention(keys, config.n_layer))
        return family, config
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(f'{path}: ') else f'{path}: {error}') from None


def _activation(keys: '_Keys') -> str:
    name = keys.document.get('activation_function', 'gelu_new')
    name = SYNONYMS.get(name, name) if isinstance(name, str) else None
    if name not in ACTIVATIONS:
        keys.refuse(
            'activation_function', f'has no counterpart here; these have: {", ".join((*ACTIVATIONS, *SYNONYMS))}'
        )
    return name


class _Keys:
    """A config.json by its keys, with errors that name the file, the key and its value."""

    def __init__(self, path: pathlib.Path):
        self.document = read_json(path)
        if not isinstance(self.document, dict):
            raise InputError(f'{path} is no JSON object; {COPY_AGAIN}')
        self._path = path

    def take(self, key: str, default: bool | int | float) -> Any:
        """The value of `key`, which must be of the default's type (a whole number may stand for a float)."""
        value = self.document.get(key, default)
        if type(value) is not type(default) and not (type(value) is int and type(default) is float):
            self.refuse(key, f'must be {KINDS[type(default)]}')
        return value

    def refuse(self, key: str, reason: str) -> NoReturn:
        value = json.dumps(self.document.get(key))
        value = value if len(value) <= 200 else f'{value[:200]}...'
        raise InputError(f'{self._path}: {key}={value} {reason}')


def _neo_attention(keys: _Keys, n_layer: int) -> dict[str, Any]:
    kinds: list[str] = []
    try:
        for pattern, times in keys.document.get('attention_types', [[['global', 'local'], 12]]):
            # Counted before it is written out: the number of times may be anything.
            if type(times) is not int or times < 0 or len(kinds) + times * len(pattern) > n_layer:
                raise ValueError
            kinds += list(pattern) * times
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


def _config_json(config: GPTConfig, dtype: str) -> tuple[str, dict[str, Any]]:
    """The family that can hold a model of this architecture, and its config.json; `dtype` is a key of TORCH_DTYPES.

    Raises:
      InputError: naming the field, where neither GPT-2 nor GPT-Neo can.
    """
    family = _family_of(config)
    document: dict[str, Any] = {'architectures': [ARCHITECTURE[family]], 'model_type': family}
    for field, (key, _) in FIELDS[family].items():
        document[key] = getattr(config, field)
    document[MLP_WIDTH[family]] = config.d_mlp
    document |= {'activation_function': config.activation, 'initializer_range': 0.02}
    document['torch_dtype'] = TORCH_DTYPES[dtype]
    if config.mlp_dropout != config.resid_dropout:
        document[MLP_DROPOUT] = config.mlp_dropout
    if family == GPT2:
        document |= {'n_ctx': config.block_size, 'scale_attn_weights': config.attention_scale != 1.0}
    else:
        kinds = ['global' if config.band(layer) is None else 'local' for layer in range(config.n_layer)]
        document |= {'attention_types': [[[kind], 1] for kind in kinds], 'attention_layers': kinds}
        document['window_size'] = config.band_size
    return family, document


def _family_of(config: GPTConfig) -> str:
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
    if config.scale_attn_by_inverse_layer_idx:
        raise InputError(
            'model.qkv_bias=False with model.scale_attn_by_inverse_layer_idx=True has no counterpart in transformers; '
            'without the latter it is GPT-Neo'
        )
    if not _unscaled(config):
        raise InputError(
            f'model.qkv_bias=False with model.attention_scale={config.attention_scale} has no counterpart in '
            'transformers; with attention_scale=1.0 it is GPT-Neo'
        )
    return GPT_NEO


def _unscaled(config: GPTConfig) -> bool:
    return (config.attention_scale or 1 / math.sqrt(config.head_dim)) == 1.0


@contextlib.contextmanager
def _open_tensors(folder: pathlib.Path) -> Iterator[dict[str, StoredTensor]]:
    """Every tensor of the directory by name; only headers are read until a tensor is.

    Raises:
      InputError: naming the file, where there is none, it is damaged, or the index does not agree with the files.
    """
    with contextlib.ExitStack() as stack:
        if os.path.lexists(folder / SINGLE):
            yield _open_file(folder / SINGLE, stack)
        elif os.path.lexists(folder / INDEX):
            yield _open_listed(folder / INDEX, stack)
        else:
            pickled = next((name for name in PICKLED if (folder / name).is_file()), None)
            if pickled:
                raise InputError(
                    f'{folder / pickled} is a pickle, which is never read as loading one runs code; write safetensors '
                    'from it: transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)'
                )
            raise InputError(f'{folder} has neither {SINGLE} nor {INDEX}; add the weights')


def _open_file(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    check_regular(path)
    try:
        # pread, since the pages of a mapped file would count as this process's memory until it is closed
        file = stack.enter_context(safe_open(path, framework='np', backend='pread'))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({first_line(error)}); {COPY_AGAIN}') from None
    except SafetensorError as error:
        raise InputError(f'{path}: is no whole safetensors file ({first_line(error)}); {COPY_AGAIN}') from None
    return {name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype(), file) for name, part in slices.items()}


def _open_listed(index: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    listed = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(listed.values())):
        path = index.parent / file_name
        if path.parent != index.parent:
            raise InputError(f'{index}: {file_name[:200]!r} lies outside of the directory; put all files into it')
        if not os.path.lexists(path):
            raise InputError(f'{index} lists {printable(file_name)}, which is not there; add it')
        for name, stored in _open_file(path, stack).items():
            if listed.get(name) != file_name:
                where = printable(str(listed.get(name)))
                raise InputError(f'{path} holds {printable(name)}, which {INDEX} lists as {where}; {COPY_AGAIN}')
            tensors[name] = stored
    for name, file_name in listed.items():
        if name not in tensors:
            raise InputError(f'{index} lists {printable(name)} in {file_name}, which does not hold it; {COPY_AGAIN}')
    return tensors


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    document = read_json(index)
    listed = document.get('weight_map') if isinstance(document, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(file_name, str) for file_name in listed.values()):
        raise InputError(f'{index}: is no index of safetensors files, by its weight_map; {COPY_AGAIN}')
    return listed
