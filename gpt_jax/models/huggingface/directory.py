"""Reading and writing a whole directory: every tensor accounted for."""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from gpt_jax.errors import InputError
from gpt_jax.files import new_folder
from gpt_jax.models.config import COMPUTE_DTYPES, GPTConfig
from gpt_jax.models.huggingface import config_json, tensor_files
from gpt_jax.models.huggingface.layout import BUFFERS, HEAD, Parameter, layout, nested
from gpt_jax.models.huggingface.tensor_files import Stored

PREFIX = 'transformer.'
FLOATS = ('F32', 'F16', 'BF16')


def is_directory(path: str | os.PathLike) -> bool:
    """Whether `path` is meant as a Hugging Face directory: it has its weights, or a config.json with a `model_type`.

    One whose files are incomplete or of another architecture is one, too: `load` says what is wrong with it.
    """
    path = pathlib.Path(path)
    weights = (tensor_files.SINGLE, tensor_files.INDEX, *tensor_files.PICKLED)
    if any((path / name).is_file() for name in weights):
        return True
    try:
        return 'model_type' in json.loads((path / 'config.json').read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def read_config(directory: str | os.PathLike) -> GPTConfig:
    """The architecture that a directory's config.json describes. Raises InputError as `load`."""
    return config_json.read(pathlib.Path(directory) / 'config.json')[1]


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
    family, config = config_json.read(folder / 'config.json')
    wanted = layout(config, family)
    place = place or (lambda _, array: jax.device_put(array).block_until_ready())
    params = {}
    with tensor_files.open_tensors(folder) as tensors:
        names = _accounted_for(tensors, wanted, folder)
        for parameter in wanted:
            array = _read(parameter, tensors, names)
            if parameter.path == ('wte',) and config.tie_embeddings:
                _check_tied(array[: config.vocab_size], tensors)
            params[parameter.path] = place(parameter.path, array)
    return config, nested(params)


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
    family, document = config_json.describe(config, dtype)
    tensors = {}
    for parameter in layout(config, family):
        tensors |= _tensors(parameter, params, COMPUTE_DTYPES[dtype])
    document |= {'bos_token_id': None, 'eos_token_id': None} | dict(extra or {})
    with new_folder(directory) as folder:
        save_file(tensors, folder / tensor_files.SINGLE, metadata={'format': 'pt'})
        text = json.dumps(document, indent=2, sort_keys=True) + '\n'
        (folder / 'config.json').write_text(text, encoding='utf-8')


def _accounted_for(tensors: dict[str, Stored], wanted: list[Parameter], folder: pathlib.Path) -> dict[str, str]:
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


def _read(parameter: Parameter, tensors: dict[str, Stored], names: dict[str, str]) -> np.ndarray:
    array = np.zeros(parameter.shape, np.float32)
    for tensor in parameter.tensors:
        name = names[tensor.name]
        value, part = tensors[name].read(name), array[tensor.index]
        part[...] = (value.T if tensor.transposed else value).reshape(part.shape)
    return array


def _check_tied(table: np.ndarray, tensors: dict[str, Stored]) -> None:
    if HEAD not in tensors:
        return
    stored = tensors[HEAD]
    if stored.shape != table.shape or not np.array_equal(stored.read(HEAD).astype(np.float32, copy=False), table):
        raise InputError(
            f'{stored.path}: {HEAD} differs from wte.weight, and by config.json (tie_word_embeddings) they are one; '
            'set tie_word_embeddings to false there'
        )


def _tensors(parameter: Parameter, params: Any, dtype: Any) -> dict[str, np.ndarray]:
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
