"""Hugging Face directories seen as checkpoints: the same description and parameters as one of ours."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import gpt2
from gpt_jax.errors import InputError
from gpt_jax.models import huggingface


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """`model`, `tokenizer` and `tokenizer_fingerprint`, as a checkpoint's own `meta` has them.

    Raises InputError, naming the file, where config.json cannot be used, or there is no tokenizer for its vocabulary.
    """
    config = huggingface.read_config(folder)
    tokenizer = _tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f'{folder}: the tokenizer has {tokenizer.vocab_size} tokens and vocab_size={config.vocab_size} in '
            "config.json has no room for them; put the model's own tokenizer there"
        )
    return {
        'model': dataclasses.asdict(config),
        'tokenizer': tokenizer.to_json(),
        'tokenizer_fingerprint': tokenizer.fingerprint,
    }


def read_params(folder: pathlib.Path, sharding: jax.sharding.Sharding | Callable[[Any], Any]) -> Any:
    """The parameters, each put where `sharding` says as soon as it is read. Raises InputError as `huggingface.load`.

    `sharding` is one for all, or a function from the abstract tree to a tree of shardings.
    """
    if not callable(sharding):
        return huggingface.load(folder, lambda _, array: jax.device_put(array, sharding))[1]
    shardings = sharding(huggingface.parameter_shapes(huggingface.read_config(folder)))

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        where = shardings
        for key in path:
            where = where[key]
        return jax.device_put(array, where)

    return huggingface.load(folder, place)[1]


def _tokenizer(folder: pathlib.Path) -> Tokenizer:
    def has(*names: str) -> bool:
        return any((folder / name).is_file() for name in names)

    if not has('tokenizer.json') and not (has('vocab.json', 'encoder.json') and has('merges.txt', 'vocab.bpe')):
        raise InputError(
            f'{folder} has no tokenizer; put tokenizer.json there, or vocab.json with merges.txt, from where the '
            'weights came'
        )
    return gpt2(folder)
