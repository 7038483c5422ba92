"""A checkpoint made ready for use: the model, its parameters and its tokenizer."""

import dataclasses
import os
from typing import Any

from jax.sharding import Mesh

from gpt_jax.checkpoints.resolve import load, resolve
from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import tree_shardings


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A GPT, its parameters (nested dicts of jax arrays) and the tokenizer of its vocabulary."""

    model: GPT
    params: Any
    tokenizer: Tokenizer


def load_model(path: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None) -> LanguageModel:
    """Load what `path` (and `step`) name, as `resolve` finds it, on the default device.

    With a `mesh` the parameters are split over it by the rules of training, and each device is given its part alone.

    Raises:
      InputError: as `load`, the mesh does not divide the parameters, or a `tokenizer.json` beside the checkpoint is
        another one than it carries.
    """
    found = resolve(path, step)
    loaded = load(found.folder, sharding=None if mesh is None else lambda params: tree_shardings(mesh, params, params))
    tokenizer = Tokenizer.from_json(loaded.meta['tokenizer'])
    beside = found.workdir and found.workdir / 'tokenizer.json'
    if beside and beside.exists() and Tokenizer.load(beside).fingerprint != tokenizer.fingerprint:
        raise InputError(f'{beside} does not match the checkpoint, which carries its own; delete that file')
    return LanguageModel(GPT(GPTConfig(**loaded.meta['model'])), loaded.params, tokenizer)
