"""The sha256 of every file of a checkpoint, because orbax restores flipped bytes without a word.

The manifest is the last file written into a checkpoint, before the folder is given its name: a step folder without one
has lost it, and nothing vouches for what is in there.

Checkpoints that many processes write are too large for one of them to hash: each hashes a share of the files, on
writing as on reading. The folder is on storage that they share.
"""

import collections
import concurrent.futures
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gpt_jax.errors import InputError
from gpt_jax.files import is_address, listing, read_json, remove_leftovers, replacing, sha256
from gpt_jax.storage import StorageError

NAME = 'manifest.sha256.json'
FORMAT = 'gpt_jax checkpoint manifest 1'
COPY_AGAIN = 'copy the checkpoint again from where it came from'

# How long process 0 waits for the share of another one before it hashes that itself.
SHARE_TIMEOUT_MS = 10 * 60 * 1000

_times_written: collections.Counter[str] = collections.Counter()


class DamagedError(InputError):
    """A checkpoint is not what was saved.

    Attributes:
      what: which file of it, and how, in a few words; the message adds the way out.
    """

    def __init__(self, what: str, way_out: str = COPY_AGAIN):
        super().__init__(f'{what}: {way_out}')
        self.what = what


def write(folder: pathlib.Path) -> None:
    """Hash every file under `folder` into `folder/manifest.sha256.json`, which appears whole or not at all.

    Of several processes each makes this call, in any thread: all hash a share, and process 0 writes when it has them.

    Raises OSError, in process 0, when the folder cannot be read or written.
    """
    if jax.process_index() == 0:
        remove_leftovers([folder / NAME])
    hashed = {} if jax.process_count() == 1 else _share_hashing(folder)
    if jax.process_index() != 0:
        return
    sizes = _sizes(folder)
    files = hashed | _hash(folder, {name: size for name, size in sizes.items() if name not in hashed})
    with replacing(folder / NAME) as file:
        file.write(json.dumps({'format': FORMAT, 'files': dict(sorted(files.items()))}, indent=1).encode())


def exists(folder: pathlib.Path) -> bool:
    """Whether `folder` is a finished checkpoint: one that has its manifest."""
    return (folder / NAME).is_file()


def verify(
    folder: pathlib.Path,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    part: tuple[int, int] = (0, 1),
    way_out: Callable[[], str] = lambda: COPY_AGAIN,
) -> None:
    """Compare the files of `folder` with its manifest; files that the manifest does not list are not looked at.

    `wanted` limits the check to files by name (relative, with slashes). `part=(i, n)` checks the i-th of n shares, so
    that n processes divide the reading. Raises DamagedError, which names the first file that is missing, unreadable, of
    another size or of other bytes, and ends in what `way_out()` says, which may look at all that lies beside the
    folder: it is called only then.
    """
    files = _read(folder, way_out)
    names = [name for name in files if wanted(name)]
    if not names:  # else a damaged list would leave nothing to compare, and everything would pass
        raise DamagedError(f'{folder / NAME} is damaged (it lists too few files)', way_out())

    # Of an object, to ask for its size is a request over the network: all are asked for together.
    sizes = listing(folder) if is_address(folder) else None

    def damage(name: str) -> str | None:
        path, expected = folder / name, files[name]
        if not (path.is_file() if sizes is None else name in sizes):
            return f'{path} is missing'
        try:
            size = path.stat().st_size if sizes is None else sizes[name]
            if size != expected['bytes']:
                return f'{path} has {size} bytes instead of {expected["bytes"]}'
            return None if sha256(path) == expected['sha256'] else f'{path} is damaged (its sha256 differs)'
        except StorageError:
            raise  # what cannot be reached now may be whole
        except OSError as error:
            return f'{path} cannot be read ({error.strerror})'

    # hashlib lets go of the interpreter lock, so threads divide the hashing between the cores
    with concurrent.futures.ThreadPoolExecutor() as executor:
        for problem in executor.map(damage, names[part[0] :: part[1]]):
            if problem:
                raise DamagedError(problem, way_out())


def verify_together(
    folder: pathlib.Path,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    way_out: Callable[[], str] = lambda: COPY_AGAIN,
) -> None:
    """`verify`, of which every process does its share; all of them raise where one finds damage."""
    problem = None
    try:
        verify(folder, wanted, part=(jax.process_index(), jax.process_count()), way_out=way_out)
    except InputError as error:
        problem = error
    raise_together(
        problem,
        lambda process: DamagedError(f'{folder} is damaged, process {process} names the file', 'see its message'),
    )


def raise_together(problem: Exception | None, elsewhere: Callable[[int], InputError]) -> None:
    """Raise `problem`; in the processes that have none `elsewhere(process)`, of one that has.

    Every process must call this at the same point of its main thread. One that went on alone would wait forever for
    the others at the next thing that they do together.
    """
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(problem is not None)))
        if failed.size and problem is None:
            problem = elsewhere(failed[0])
    if problem is not None:
        raise problem


def _share_hashing(folder: pathlib.Path) -> dict[str, dict]:
    """Hash this process's share of the files; in process 0, what all have hashed.

    They talk through the key-value store of jax.distributed. This runs in the background of training: a collective on
    devices would meet those of the training step in another order in each process. A process that cannot see or read
    its share (a network file system may show a new folder late) tells of none: process 0 hashes what is left, and meets
    the error itself if there is one.
    """
    store, index, count = ocp.multihost.get_jax_distributed_client(), jax.process_index(), jax.process_count()
    # A step may be written again after its folder was removed: each time has keys of its own.
    _times_written[str(folder)] += 1
    prefix = f'gpt_jax/manifest/{folder}/{_times_written[str(folder)]}'
    if index:
        try:
            store.blocking_key_value_get(f'{prefix}/committed', SHARE_TIMEOUT_MS)
            hashed = _hash(folder, _share(_sizes(folder), index, count))
        except (OSError, jax.errors.JaxRuntimeError):
            hashed = {}  # left to process 0
        store.key_value_set(f'{prefix}/{index}', json.dumps(hashed))
        return hashed
    store.key_value_set(f'{prefix}/committed', 'yes')  # orbax has renamed the folder in this process: now it is there
    hashed = _hash(folder, _share(_sizes(folder), 0, count))
    for other in range(1, count):
        try:
            hashed |= json.loads(store.blocking_key_value_get(f'{prefix}/{other}', SHARE_TIMEOUT_MS))
        except jax.errors.JaxRuntimeError:  # it did not answer in time
            continue
    store.key_value_delete(prefix)  # and all keys below it
    return hashed


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    """Bytes of each file, by name, in the order of names; the manifest is none of them."""
    return {name: size for name, size in sorted(listing(folder).items()) if name != NAME}


def _share(sizes: Mapping[str, int], index: int, count: int) -> dict[str, int]:
    return dict(list(sizes.items())[index::count])


def _hash(folder: pathlib.Path, sizes: Mapping[str, int]) -> dict[str, dict]:
    # one after another: it runs beside a training that may need the other cores
    return {name: {'bytes': size, 'sha256': sha256(folder / name)} for name, size in sizes.items()}


def _read(folder: pathlib.Path, way_out: Callable[[], str]) -> dict[str, dict]:
    path = folder / NAME
    if not path.is_file():
        raise DamagedError(f'{folder} has no {NAME}', way_out())
    try:
        document = read_json(path)
        if document['format'] != FORMAT:
            raise ValueError(f'unknown format {document["format"]!r}')
        return {
            name: {'bytes': int(entry['bytes']), 'sha256': entry['sha256']} for name, entry in document['files'].items()
        }
    except StorageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedError(f'{path} is damaged ({type(error).__name__})', way_out()) from error
