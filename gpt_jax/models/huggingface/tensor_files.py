"""The safetensors files of one directory as one set of named tensors, read one at a time."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from gpt_jax.errors import InputError

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLED = ('pytorch_model.bin', 'pytorch_model.bin.index.json')
COPY_AGAIN = 'copy it again from where it came from'


class Stored(NamedTuple):
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


@contextlib.contextmanager
def open_tensors(folder: pathlib.Path) -> Iterator[dict[str, Stored]]:
    """Every tensor of the directory by name; only headers are read until a tensor is.

    Raises:
      InputError: naming the file, where there is none, it is damaged, or the index does not agree with the files.
    """
    with contextlib.ExitStack() as stack:
        if (folder / SINGLE).is_file():
            yield _open(folder / SINGLE, stack)
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


def _open(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    try:
        # pread, since the pages of a mapped file would count as this process's memory until it is closed
        file = stack.enter_context(safe_open(path, framework='np', backend='pread'))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error}); {COPY_AGAIN}') from None
    except SafetensorError as error:
        raise InputError(f'{path}: is no whole safetensors file ({error}); {COPY_AGAIN}') from None
    return {name: Stored(path, tuple(part.get_shape()), part.get_dtype(), file) for name, part in slices.items()}


def _open_listed(index: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    listed = _weight_map(index)
    tensors: dict[str, Stored] = {}
    for file_name in sorted(set(listed.values())):
        path = index.parent / file_name
        if path.parent != index.parent:
            raise InputError(f'{index}: {file_name!r} lies outside of the directory; put all files into it')
        if not path.is_file():
            raise InputError(f'{index} lists {file_name}, which is not there; add it')
        for name, stored in _open(path, stack).items():
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
