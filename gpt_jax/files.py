"""Files on disk: read within bounds, written whole or not at all, hashed, and where the user's caches are."""

import codecs
import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NoReturn

import platformdirs

from gpt_jax.errors import InputError

# What is read whole into memory: a configuration, a vocabulary, a prompt. Far above any real one.
MOST_BYTES = 64 * 2**20
LFS_POINTER = b'version https://git-lfs.github.com/spec/'
_KINDS = {
    stat.S_IFDIR: 'a folder',
    stat.S_IFIFO: 'a named pipe',
    stat.S_IFSOCK: 'a socket',
    stat.S_IFCHR: 'a device',
    stat.S_IFBLK: 'a device',
}


def check_local(path: str | os.PathLike, name: str | None = None) -> None:
    """Raises InputError where `path` is an address (gs://bucket/run): it would become a local folder called "gs:"."""
    scheme = re.match(r'([A-Za-z][A-Za-z0-9+.-]*):/', os.fspath(path))
    if scheme:
        raise InputError(
            f'{_called(path, name)}: {scheme[1]}: is no place on this machine; name a local or mounted folder'
        )


def check_regular(path: str | os.PathLike, name: str | None = None) -> None:
    """Raises InputError where `path` is no regular file that can be read, or stands for one that Git LFS holds.

    Args:
      path: of a file that is opened otherwise; `read_bytes` and the like check by themselves.
      name: what the message calls it, e.g. '--text=FILE'; None: its path.
    """
    with _opened(path, name):
        pass


def read_bytes(path: str | os.PathLike, name: str | None = None, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file.

    Args:
      path: the file; pipes, devices, sockets and folders are refused, unread: some of them never end.
      name: what a message calls it, e.g. '--text=FILE'; None: its path.
      most: bytes that it may have.

    Raises:
      InputError: it is none of these, is missing, larger, cannot be read, or stands for one that Git LFS holds.
    """
    with _opened(path, name) as file:
        # One byte more than is allowed: a file may grow, or lie about its size, as those of /proc do.
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f'{_called(path, name)} is larger than the {most:,} bytes that are read of such a file')
    return data


def read_text(path: str | os.PathLike, name: str | None = None, most: int = MOST_BYTES) -> str:
    """The text of a regular file, in UTF-8, without its byte order mark; arguments and errors as `read_bytes`.

    Raises:
      InputError: also where it is no UTF-8.
    """
    return decoded(read_bytes(path, name, most), _called(path, name))


def decoded(data: bytes, name: str) -> str:
    """Bytes as text, without a byte order mark; raises InputError, naming their source, where they are no UTF-8."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f'{name} is UTF-16; make UTF-8 of it: iconv -f UTF-16 -t UTF-8') from None
        wrong = (
            f'byte 0x{data[error.start]:02x} in line {data.count(10, 0, error.start) + 1}, at offset {error.start:,}'
        )
        raise InputError(f'{name} is not UTF-8 ({wrong}); convert it, e.g. with iconv -f LATIN1 -t UTF-8') from None


def read_json(path: str | os.PathLike, name: str | None = None, most: int = MOST_BYTES) -> Any:
    """The value of a regular file of JSON; arguments and errors as `read_bytes`.

    Raises:
      InputError: also where it is no JSON, which has no NaN and no Infinity, or nests too deeply.
    """
    text, name = read_text(path, name, most), _called(path, name)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise InputError(f'{name} is nested too deeply to be read') from None
    except ValueError as error:
        raise InputError(f'{name} is not JSON ({error}); restore the file') from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f'{constant} is no number of JSON')


@contextlib.contextmanager
def _opened(path: str | os.PathLike, name: str | None) -> Iterator[BinaryIO]:
    """A regular file, open; raises InputError for anything else, also where reading it in the block fails."""
    called = _called(path, name)
    try:
        # Opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(pathlib.Path(path).expanduser(), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, 'rb') as file:
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind != stat.S_IFREG:
                raise InputError(f'{called} is {_KINDS.get(kind, "no regular file")}; name a regular file')
            if file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
                raise InputError(f'{called} is a Git LFS pointer, not the file itself; fetch it: git lfs pull')
            yield file
    except IsADirectoryError:
        raise InputError(f'{called} is a folder; name a regular file') from None
    except OSError as error:
        raise InputError(f'{called} cannot be read ({error.strerror or error})') from None
    except (ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        # An embedded NUL; a home folder that nobody has.
        raise InputError(f'{called} cannot be read ({error})') from None


def _called(path: str | os.PathLike, name: str | None) -> str:
    return name or os.fspath(path)


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
