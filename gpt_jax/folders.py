"""Writing a folder so that nobody ever sees half of it."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from gpt_jax.errors import InputError


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
