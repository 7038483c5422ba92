"""The sha256 of every file of a checkpoint, because orbax restores flipped bytes without a word.

The manifest is the last file written into a step folder and appears in one rename, so it is also the mark of a finished
checkpoint: a step folder without one was interrupted.
"""

import concurrent.futures
import json
import os
import pathlib
from collections.abc import Callable

from gpt_jax.errors import InputError
from gpt_jax.files import sha256

NAME = 'manifest.sha256.json'
FORMAT = 'gpt_jax checkpoint manifest 1'
COPY_AGAIN = 'copy the checkpoint again from where it came from'


def write(folder: pathlib.Path) -> None:
    """Hash every file under `folder` into `folder/manifest.sha256.json`, which appears whole or not at all.

    Raises OSError when the folder cannot be read or written.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
    files = {
        name: {'bytes': (folder / name).stat().st_size, 'sha256': sha256(folder / name)}
        for name in names
        if not name.startswith(NAME)  # a temporary file that a killed process left
    }
    temporary = folder / f'{NAME}.tmp'
    temporary.write_text(json.dumps({'format': FORMAT, 'files': files}, indent=1), encoding='utf-8')
    os.replace(temporary, folder / NAME)


def exists(folder: pathlib.Path) -> bool:
    """Whether `folder` is a finished checkpoint: one that has its manifest."""
    return (folder / NAME).is_file()


def verify(
    folder: pathlib.Path,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    part: tuple[int, int] = (0, 1),
    way_out: str = COPY_AGAIN,
) -> None:
    """Compare the files of `folder` with its manifest; files that the manifest does not list are not looked at.

    `wanted` limits the check to files by name (relative, with slashes). `part=(i, n)` checks the i-th of n shares, so
    that n processes divide the reading. Raises InputError, which names the first file that is missing, has another size
    or other bytes, and ends in `way_out`.
    """
    files = _read(folder, way_out)
    names = [name for name in files if wanted(name)]
    if not names:  # else a damaged list would leave nothing to compare, and everything would pass
        raise InputError(f'{folder / NAME} is damaged (it lists too few files): {way_out}')

    def damage(name: str) -> str | None:
        path, expected = folder / name, files[name]
        if not path.is_file():
            return f'{path} is missing'
        if path.stat().st_size != expected['bytes']:
            return f'{path} has {path.stat().st_size} bytes instead of {expected["bytes"]}'
        return None if sha256(path) == expected['sha256'] else f'{path} is damaged (its sha256 differs)'

    # hashlib lets go of the interpreter lock, so threads divide the hashing between the cores
    with concurrent.futures.ThreadPoolExecutor() as executor:
        for problem in executor.map(damage, names[part[0] :: part[1]]):
            if problem:
                raise InputError(f'{problem}: {way_out}')


def _read(folder: pathlib.Path, way_out: str) -> dict[str, dict]:
    path = folder / NAME
    try:
        document = json.loads(path.read_bytes())
        if document['format'] != FORMAT:
            raise ValueError(f'unknown format {document["format"]!r}')
        return {
            name: {'bytes': int(entry['bytes']), 'sha256': entry['sha256']} for name, entry in document['files'].items()
        }
    except FileNotFoundError:
        raise InputError(f'{folder} has no {NAME}, its saving was interrupted: {way_out}') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path} is damaged ({type(error).__name__}): {way_out}') from error
