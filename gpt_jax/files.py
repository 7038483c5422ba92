"""Files on disk: written whole or not at all, hashed, and where the user's caches are."""

import contextlib
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import platformdirs

from gpt_jax.errors import InputError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a new binary file that takes the place of `path` when the block ends well, and is removed otherwise.

    The bytes are on disk (fsync) before the name is: after a crash `path` is the old file or the whole new one.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
    try:
        with open(temporary, 'xb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(paths: Iterable[pathlib.Path]) -> None:
    """Removes what processes that were killed while `replacing` one of `paths` have left; nobody may be at it now."""
    for path in paths:
        for leftover in path.parent.glob(f'.{path.name}.*.tmp'):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and is removed otherwise.

    Missing parents are made. An empty folder may stand at `path`; nothing else is ever replaced.

    Raises:
      InputError: something else stands at `path`, or the folder cannot be made there.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise InputError(f'{path} exists already; name a new folder, or remove that one first')
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f'{path} cannot be made ({error.strerror}); name another folder') from None
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes; OSError where it cannot be read."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def cache_folder(name: str) -> pathlib.Path:
    """The folder `name` in the user's cache folder of gpt_jax; not made here."""
    return pathlib.Path(platformdirs.user_cache_dir('gpt_jax'), name)
