"""The sha256 of files; of large ones it is remembered, so that a run over a large corpus starts without reading it."""

import json
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from gpt_jax.errors import InputError
from gpt_jax.files import replacing
from gpt_jax.files import sha256 as sha256_of

MEMORY = 'files.json'  # in the cache folder: path -> [size, time of change, sha256]
LARGE = 64 * 2**20  # bytes; smaller files are read each time
# A file changed so shortly ago may change again without a later time of change, and is not remembered.
SETTLED_NS = 2 * 10**9


def describe(paths: Iterable[pathlib.Path], cache: pathlib.Path) -> list[dict[str, Any]]:
    """`path`, `bytes` and `sha256` of each file.

    Args:
      paths: the files. Those of LARGE bytes are read only where they are new, or their size or time of change is.
      cache: the folder that remembers them; where it cannot be written nothing is remembered.

    Raises:
      InputError: a file cannot be read.
    """
    memory = cache / MEMORY
    known = _read(memory)
    files, new = [], {}
    for path in paths:
        key = str(path.absolute())
        try:
            stat = os.stat(path)
            state = [stat.st_size, stat.st_mtime_ns]
            is_known = stat.st_size >= LARGE and known.get(key, [])[:2] == state
            sha256 = known[key][2] if is_known else sha256_of(path)
        except OSError as error:
            raise InputError(f'data.path={path}: cannot be read ({error.strerror}); name a readable file') from None
        if not is_known and stat.st_size >= LARGE and time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
            new[key] = [*state, sha256]
        files.append({'path': str(path), 'bytes': stat.st_size, 'sha256': sha256})
    if new:
        _write(memory, known | new)
    return files


def _read(memory: pathlib.Path) -> dict[str, list]:
    try:
        known = json.loads(memory.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}  # none yet, or damaged: the files are read again
    return known if isinstance(known, dict) else {}


def _write(memory: pathlib.Path, known: dict[str, list]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(memory) as file:
            file.write(json.dumps(known).encode())
    except OSError:
        return  # a folder that others own, or a full disk: then the files are read at every start
