"""Writing a file so that nobody ever sees half of it."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterable, Iterator
from typing import BinaryIO


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
