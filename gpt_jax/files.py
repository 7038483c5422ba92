"""Files: read within bounds, written whole or not at all, hashed, and where the user's caches are.

What is on disk is a `pathlib.Path`. Where object storage can be used as well, a path is what `as_path` makes of the
user's text: gs://bucket/run is a `gpt_jax.storage.Address`, which most functions here take likewise.
"""

import codecs
import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import platformdirs

from gpt_jax.errors import InputError

if TYPE_CHECKING:
    from gpt_jax.storage import Address

# What is read whole into memory: a configuration, a vocabulary, a prompt. Far above any real one.
MOST_BYTES = 64 * 2**20
LFS_POINTER = b'version https://git-lfs.github.com/spec/'
# Nothing more can be written: a full disk, a quota, a limit of a file's size; or nothing at all.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
NOFOLLOW = getattr(os, 'O_NOFOLLOW', 0)  # Windows has none
_KINDS = {
    stat.S_IFDIR: 'a folder',
    stat.S_IFIFO: 'a named pipe',
    stat.S_IFSOCK: 'a socket',
    stat.S_IFCHR: 'a device',
    stat.S_IFBLK: 'a device',
}


def is_address(path: str | os.PathLike) -> bool:
    """Whether `path` leads to object storage: gs://... or s3://..., as text or as an `Address`."""
    return re.match(r'(gs|s3):/', os.fspath(path)) is not None


def as_path(path: str | os.PathLike, name: str | None = None) -> 'pathlib.Path | Address':
    """What a user gave, as a path on this machine or, where it is one, as an address of object storage.

    Args:
      path: of a file or a folder, whether it is there or not.
      name: what messages call it, e.g. '--workdir=gs://bucket/run'.

    Raises:
      InputError: it is an address that cannot be, of a store that nothing here reaches, or of one that only a package
        reaches which is not installed.
    """
    if is_address(path):
        from gpt_jax import storage  # imports etils, and what it is for is rarely asked for

        return storage.address(path, _called(path, name))
    check_local(path, name)
    return pathlib.Path(path)


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
    if is_address(path):
        data = _read_object(path, name, most + 1)
    else:
        data = _read_file(path, name, most + 1)
    if len(data) > most:
        raise InputError(f'{_called(path, name)} is larger than the {most:,} bytes that are read of such a file')
    return data


def _read_file(path: str | os.PathLike, name: str | None, most: int) -> bytes:
    with _opened(path, name) as file:
        # One byte more than is allowed: a file may grow, or lie about its size, as those of /proc do.
        return file.read(most)


def _read_object(path: 'Address', name: str | None, most: int) -> bytes:
    from gpt_jax import storage

    try:
        return storage.read(as_path(path), most)
    except IsADirectoryError:
        raise InputError(f'{_called(path, name)} is a folder; name a regular file') from None
    except FileNotFoundError as error:
        raise InputError(f'{_called(path, name)} cannot be read ({error.strerror or error})') from None


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
        if b'\0' in data or data.startswith((b'\x1f\x8b', b'\x28\xb5\x2f\xfd', b'PK')):
            raise InputError(f'{name} is not UTF-8 but compressed or binary; name a file of plain text') from None
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


class WriteError(InputError, OSError):
    """Something cannot be written: the disk is full, the place is read-only, ... As an OSError it has its `errno`."""

    def __init__(
        self, path: str | os.PathLike, error: OSError, way_out: str = 'free some space, or name another place'
    ):
        super().__init__(f'{path} cannot be written ({error.strerror or error}); {way_out}')
        self.errno, self.strerror, self.filename = error.errno, error.strerror, os.fspath(path)

    def __str__(self) -> str:
        return self.args[0]

    def __reduce__(self) -> tuple:
        # OSError's own would give the message as the path.
        return InputError, self.args


def system_error(error: BaseException | None) -> OSError | None:
    """The OSError that `error` is, was caused by, or tells of in its message; None: it has nothing to do with one.

    Libraries that are not written in Python have exceptions of their own, with the system's number in the text:
    tensorstore `[os_error_code='28']`, safetensors `(os error 28)`.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        told = re.search(r"os_error_code='(\d+)'|os error (\d+)", str(error))
        if told:
            number = int(told[1] or told[2])
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a new binary file that takes the place of `path` when the block ends well, and is removed otherwise.

    The bytes are on disk (fsync) before the name is: after a crash `path` is the old file or the whole new one. A link
    at `path` is replaced, never followed; the new file has a name that nobody can foresee, and is nobody else's. An
    object is uploaded at the end of the block, from a local file.

    Raises:
      WriteError: the file cannot be made, or the disk is full; what else fails in the block comes out as it is.
    """
    if is_address(path):
        with _replacing_object(as_path(path)) as file:
            yield file
        return
    path = pathlib.Path(path)
    temporary = _temporary(path)
    try:
        file = os.fdopen(_create(temporary), 'wb')
    except (OSError, ValueError) as error:
        raise _write_error(path, error) from None
    try:
        with file:
            yield file
            try:
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except OSError as error:
                raise _write_error(path, error) from None
    except OSError as error:
        if isinstance(error, WriteError) or error.errno not in FULL:
            raise
        raise _write_error(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing_object(path: 'Address') -> Iterator[BinaryIO]:
    from gpt_jax import storage

    with tempfile.NamedTemporaryFile(prefix='gpt_jax-') as file:
        yield file
        try:
            file.flush()
            storage.upload(pathlib.Path(file.name), path)
        except OSError as error:
            raise _write_error(path, error) from None


def appending(path: str | os.PathLike) -> io.FileIO:
    """An unbuffered file to add bytes to, made where it is missing; never through a link, nor to anything but a file.

    Raises:
      WriteError: it cannot be opened so.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | NOFOLLOW | getattr(os, 'O_NONBLOCK', 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise _write_error(path, error, f'move it away: {path} is to be a file of its own') from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _write_error(path, OSError(errno.EINVAL, 'it is no regular file'), 'move it away')
    if status.st_nlink > 1:  # the same file has another name, in a backup or of somebody else: that one stays as it is
        os.close(descriptor)
        with open(path, 'rb') as shared, replacing(path) as own:
            shutil.copyfileobj(shared, own)
        return appending(path)
    return io.FileIO(descriptor, 'a')


def remove_leftovers(paths: Iterable[pathlib.Path]) -> None:
    """Removes what processes that were killed while `replacing` one of `paths` have left; nobody may be at it now."""
    for path in (path for path in paths if not is_address(path)):  # an object appears whole: nothing is ever left
        for leftover in path.parent.glob(f'.{glob.escape(path.name)}.*.tmp'):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, last: Iterable[str] = ()) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and is removed otherwise.

    Missing parents are made. An empty folder may stand at `path`; nothing else is ever replaced.

    Args:
      path: the folder that is to be. Where it is on object storage, the block gets a local one, which is uploaded.
      last: names of the files without which the folder counts as none: uploaded when the others are there.

    Raises:
      InputError: something else stands at `path`, the folder cannot be made there, or the disk is full on the way.
    """
    if is_address(path):
        with _new_folder_of_objects(as_path(path), tuple(last)) as folder:
            yield folder
        return
    check_local(path)
    given = path
    try:
        path = pathlib.Path(path).expanduser().absolute()
        with contextlib.suppress(FileNotFoundError):
            is_folder = stat.S_ISDIR(path.lstat().st_mode)
            if not is_folder or any(path.iterdir()):
                raise InputError(f'{path} exists already; name a new folder, or remove that one first')
        temporary = _temporary(path)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f'{given} cannot be made ({error.strerror}); name another folder') from None
    except (ValueError, RuntimeError) as error:  # a NUL in the name; a home folder that nobody has
        if isinstance(error, InputError):
            raise
        raise InputError(f'{given} cannot be made ({error}); name another folder') from None
    try:
        yield temporary
        os.rename(temporary, path)
    except Exception as error:
        cause = system_error(error)
        if cause is None or cause.errno not in FULL:
            raise
        raise WriteError(path, cause) from None
    finally:
        remove_folder(temporary)


@contextlib.contextmanager
def _new_folder_of_objects(path: 'Address', last: tuple[str, ...]) -> Iterator[pathlib.Path]:
    from gpt_jax import storage

    storage.check_reachable(path, os.fspath(path))
    if path.exists():
        raise InputError(f'{path} exists already; name a new folder, or remove that one first')
    with tempfile.TemporaryDirectory(prefix='gpt_jax-', ignore_cleanup_errors=True) as temporary:
        try:
            yield pathlib.Path(temporary)
            storage.upload_folder(pathlib.Path(temporary), path, last)
        except BaseException as error:
            with contextlib.suppress(OSError):  # what is there counts as nothing
                path.rmtree()
            cause = system_error(error)
            if isinstance(error, InputError) or cause is None or cause.errno not in FULL:
                raise
            raise WriteError(tempfile.gettempdir(), cause) from None


def listing(folder: 'pathlib.Path | Address') -> dict[str, int]:
    """Bytes of every file below `folder`, by its name from there, with slashes; OSError where it cannot be read."""
    if is_address(folder):
        from gpt_jax import storage

        return {name: entry['size'] for name, entry in storage.listing(as_path(folder)).items()}
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def remove_folder(folder: pathlib.Path) -> None:
    """Removes `folder`, as far as that is possible, also where threads of a library are still writing to it.

    tensorstore makes a missing folder again for a file that it is about to write: one that was there counts as gone
    when it has stayed away for a quarter of a second.
    """
    if not os.path.lexists(folder):
        return
    away = 0
    for _ in range(200):  # for at most 10 seconds
        if os.path.lexists(folder):
            shutil.rmtree(folder, ignore_errors=True)
            away = 0
        elif away == 5:
            return
        else:
            away += 1
        time.sleep(0.05)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """A name beside `path` that nobody can foresee.

    A long one is cut, since names have 255 bytes at most, and is without what libraries take for patterns.
    """
    name = os.fsdecode(os.fsencode(path.name)[:200]).encode(errors='ignore').decode()
    name = re.sub(r'[][*?\\]', '_', name)
    return path.with_name(f'.{name}.{secrets.token_hex(4)}.tmp')


def _create(path: pathlib.Path) -> int:
    """A descriptor of a file that was not there, not even as a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | NOFOLLOW, 0o666)


def _write_error(path: str | os.PathLike, error: Exception, way_out: str | None = None) -> WriteError:
    error = error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))
    if way_out is None:
        is_full = error.errno in FULL and error.errno != errno.EROFS
        way_out = 'free some space, or name another place' if is_full else 'name another place'
    return WriteError(path, error, way_out)


def check_writable(folder: str | os.PathLike) -> None:
    """Makes `folder` where it is missing; raises WriteError where that, or a file in it, cannot be made."""
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder / 'probe')
        os.close(_create(probe))
        probe.unlink()
    except (OSError, ValueError) as error:
        raise _write_error(folder, error) from None


def sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes; OSError where it cannot be read."""
    if is_address(path):
        from gpt_jax import storage

        digest = hashlib.sha256()
        for stretch in storage.stretches(as_path(path)):
            digest.update(stretch)
        return digest.hexdigest()
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def cache_folder(name: str) -> pathlib.Path:
    """The folder `name` in the user's cache folder of gpt_jax; not made here."""
    return pathlib.Path(platformdirs.user_cache_dir('gpt_jax'), name)
