"""Hugging Face directories of GPT-2 and GPT-Neo, in and out: config.json with safetensors, and nothing else needed.

    config, params = load(directory)
    save(directory, config, params)

A directory holds `config.json` and the weights, in `model.safetensors` or in several files that
`model.safetensors.index.json` lists. Pickled weights are never read: loading a pickle runs the code in it.

From top to bottom: reading and writing a directory; where each of our parameters stands in its files; config.json <->
GPTConfig; the safetensors files as one set of tensors.
"""

import contextlib
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

from gpt_jax.errors import InputError
from gpt_jax.files import new_folder
from gpt_jax.models.config import COMPUTE_DTYPES, GPTConfig
from gpt_jax.models.gpt import parameter_shapes

GPT2, GPT_NEO = 'gpt2', 'gpt_neo'

# Files of a directory.
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLED = ('pytorch_model.bin', 'pytorch_model.bin.index.json')
COPY_AGAIN = 'copy it again from where it came from'

PREFIX = 'transformer.'
HEAD = 'lm_head.weight'
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
            raise InputError(f'{self.path}: {name} cannot be read ({error}); {COPY_AGAIN}') from None


def is_directory(path: str | os.PathLike) -> bool:
    """Whether `path` is meant as a Hugging Face directory: it has its weights, or a config.json with a `model_type`.

    One whose files are incomplete or of another architecture is one, too: `load` says what is wrong with it.
    """
    path = pathlib.Path(path)
    weights = (SINGLE, INDEX, *PICKLED)
    if any((path / name).is_file() for name in weights):
        return True
    try:
        return 'model_type' in json.loads((path / 'config.json').read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def read_config(directory: str | os.PathLike) -> GPTConfig:
    """The architecture that a directory's config.json describes. Raises InputError as `load`."""
    return _read_config_json(pathlib.Path(directory) / 'config.json')[1]


def load(
    directory: str | os.PathLike, place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None
) -> tuple[GPTConfig, Any]:
    """Read a GPT-2 or GPT-Neo directory, as transformers writes it: `(config, params)`, all parameters float32.

    Tensors may be float32, float16 or bfloat16, their names with or without `transformer.`. Rows of padding are zero.
    At no time is more in memory than the parameters, one parameter again (its layers stacked), and one tensor.

    Args:
      directory: holds config.json and safetensors.
      place: takes a parameter's path in the tree and its array in host memory, and gives what the tree is to hold;
        by default an array on jax's default device.

    Raises:
      InputError: in one line that names file and key, where a file is missing or damaged, config.json describes what
        has no counterpart here, or a tensor is missing, unknown, of another shape, or of another type.
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
                _check_tied(array[: config.vocab_size], tensors)
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
        unknown, float16 cannot hold a parameter, or something stands at `directory` already.
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
        text = json.dumps(document, indent=2, sort_keys=True) + '\n'
        (folder / 'config.json').write_text(text, encoding='utf-8')


def _accounted_for(tensors: dict[str, StoredTensor], wanted: list[Parameter], folder: pathlib.Path) -> dict[str, str]:
    """The name in the file of every tensor that is wanted, after holding all that is there against it."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ''
    expected = {
        tensor.name if tensor.name == HEAD else prefix + tensor.name: tensor
        for parameter in wanted
        for tensor in parameter.tensors
    }
    for name, stored in tensors.items():
        if re.fullmatch(re.escape(prefix) + BUFFERS, name) or (name == HEAD and HEAD not in expected):
            continue
        if name not in expected:
            raise InputError(f'{stored.path}: {name} is no tensor of the model in config.json; use the config of it')
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


def _read_parameter(parameter: Parameter, tensors: dict[str, StoredTensor], names: dict[str, str]) -> np.ndarray:
    array = np.zeros(parameter.shape, np.float32)
    for tensor in parameter.tensors:
        name = names[tensor.name]
        value, part = tensors[name].read(name), array[tensor.index]
        part[...] = (value.T if tensor.transposed else value).reshape(part.shape)
    return array


def _check_tied(table: np.ndarray, tensors: dict[str, StoredTensor]) -> None:
    if HEAD not in tensors:
        return
    stored = tensors[HEAD]
    if stored.shape != table.shape or not np.array_equal(stored.read(HEAD).astype(np.float32, copy=False), table):
        raise InputError(
            f'{stored.path}: {HEAD} differs from wte.weight, and by config.json (tie_word_embeddings) they are one; '
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
        if (folder / SINGLE).is_file():
            yield _open_file(folder / SINGLE, stack)
        elif (folder / INDEX).is_file():
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
    try:
        # pread, since the pages of a mapped file would count as this process's memory until it is closed
        file = stack.enter_context(safe_open(path, framework='np', backend='pread'))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error}); {COPY_AGAIN}') from None
    except SafetensorError as error:
        raise InputError(f'{path}: is no whole safetensors file ({error}); {COPY_AGAIN}') from None
    return {name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype(), file) for name, part in slices.items()}


def _open_listed(index: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, StoredTensor]:
    listed = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(listed.values())):
        path = index.parent / file_name
        if path.parent != index.parent:
            raise InputError(f'{index}: {file_name!r} lies outside of the directory; put all files into it')
        if not path.is_file():
            raise InputError(f'{index} lists {file_name}, which is not there; add it')
        for name, stored in _open_file(path, stack).items():
            if listed.get(name) != file_name:
                raise InputError(f'{path} holds {name}, which {INDEX} lists as {listed.get(name)}; {COPY_AGAIN}')
            tensors[name] = stored
    for name, file_name in listed.items():
        if name not in tensors:
            raise InputError(f'{index} lists {name} in {file_name}, which does not hold it; {COPY_AGAIN}')
    return tensors


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_bytes())['weight_map']
        if not all(isinstance(file_name, str) for file_name in listed.values()):
            raise TypeError('weight_map')
        return listed
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{index}: is no index of safetensors files ({type(error).__name__}); {COPY_AGAIN}') from None
