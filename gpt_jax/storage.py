"""Object storage: gs://bucket/run and s3://bucket/run as paths, with what such a store can do and what it cannot.

An `Address` is an `etils.epath` path, which orbax takes, with the methods of `pathlib.Path` that the rooms above use.
So most of them never ask where a path leads. What they have to know:

- A folder is but the beginning of names: it needs no making, and is gone with its last object.
- An object appears whole or not at all, and can neither be appended to nor be locked. `put_if` replaces it only where
  it is still the one that was read, or makes it only where there is none.
- There is no rename: `move` copies, object by object, and is no single event (`checkpoints/committing.py`).

Whatever fails is an OSError with its `strerror`, as it is for a file. gcsfs, s3fs and tensorstore try again by
themselves where a store is busy or a connection is lost (for half a minute, and more); what fails here has failed then.
The one place that imports them is here, when the first address is given.
"""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import importlib
import logging
import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
import urllib.parse
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from etils.epath import gpath

from gpt_jax.errors import InputError, first_line, printable
from gpt_jax.files import FULL, is_address, replacing

# Scheme -> the package that reaches it, and the extra that brings it.
PACKAGES = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}
REACH_SECONDS = 40  # that a store has for its first answer; its library's own tries take that long
CONNECT_SECONDS, CONNECT_TRIES = 5, 3
STRETCH = 2**25  # bytes of an object that are read in one go
THREADS = 8  # that fetch and upload
MOST_CACHED = 50 * 2**30  # bytes of local copies that are kept of what is read from addresses
LOG_IN = {
    'gs': 'log in: gcloud auth application-default login, or let GOOGLE_APPLICATION_CREDENTIALS name a key',
    's3': 'log in: aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY',
}


class StorageError(InputError, OSError):
    """What an object store, or the way to it, answers where it does not do what was asked.

    As an OSError it has its `errno` (EIO) and `strerror`; one that nobody catches is a line like any other.
    """

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(f'{os.fspath(path)}: {reason}; check the network and your rights there, then run it again')
        self.errno, self.strerror, self.filename = errno.EIO, reason, os.fspath(path)

    def __str__(self) -> str:
        return self.args[0]

    def __reduce__(self) -> tuple:
        return StorageError, (self.filename, self.strerror)


class Address(gpath.PosixGPath):
    """gs://bucket/name or s3://bucket/name; `address` makes one of what a user gave."""

    @property
    def scheme(self) -> str:
        """'gs' or 's3'."""
        return self.parts[1]

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.parts[2]

    @property
    def key(self) -> str:
        """The object's name in its bucket."""
        return '/'.join(self.parts[3:])

    def expanduser(self) -> 'Address':
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> 'Address':
        """Itself: there are no links."""
        return self

    absolute = resolve

    def exists(self) -> bool:
        """Whether there is such an object, or one whose name begins so."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return _object(self) is not None

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return (self._info() or {}).get('type') == 'directory'

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def iterdir(self) -> Iterator['Address']:
        """What is right below it. Raises FileNotFoundError where nothing is."""
        with _told(self):
            found = filesystem(self.scheme).ls(os.fspath(self), detail=True, refresh=True)
        names = {entry['name'].rstrip('/').rpartition('/')[2] for entry in found if not _is(self, entry)}
        if not names:
            wrong = (NotADirectoryError, errno.ENOTDIR) if self.is_file() else (FileNotFoundError, errno.ENOENT)
            raise wrong[0](wrong[1], os.strerror(wrong[1]), os.fspath(self))
        return (self / name for name in sorted(names))

    def read_bytes(self) -> bytes:
        """The object."""
        with _told(self):
            return filesystem(self.scheme).cat_file(os.fspath(self))

    def read_text(self, encoding: str | None = None) -> str:
        """The object's UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Makes or replaces the object, as a whole."""
        with _told(self):
            if self.scheme == 'gs' and data:
                _post(self, data)
            else:
                filesystem(self.scheme).pipe_file(os.fspath(self), data)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        with contextlib.suppress(*[FileNotFoundError] * missing_ok), _told(self):
            filesystem(self.scheme).rm_file(os.fspath(self))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object."""

    def rmdir(self) -> None:
        """Nothing: a folder is gone with its last object."""

    def rmtree(self, missing_ok: bool = True) -> None:
        """Removes all objects below it."""
        with contextlib.suppress(*[FileNotFoundError] * missing_ok), _told(self):
            filesystem(self.scheme).rm(os.fspath(self), recursive=True)

    def _info(self) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError), _told(self):
            return filesystem(self.scheme).info(os.fspath(self))
        return None


def address(given: str | os.PathLike, called: str) -> Address:
    """The path that `given`, gs://... or s3://..., is the text of; nothing is asked of the store.

    Args:
      given: pathlib makes one slash of two, which is taken as well.
      called: names it in messages, e.g. '--workdir=gs://bucket/run'.

    Raises:
      InputError: it can be no address, or the package that reaches it is not installed.
    """
    scheme, name = re.fullmatch(r'(gs|s3):/+(.*)', os.fspath(given), re.DOTALL).groups()
    bucket, _, key = name.rstrip('/').partition('/')
    if not re.fullmatch(r'[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]', bucket):
        raise InputError(f'{called}: {bucket!r} is no name of a bucket; write {scheme}://BUCKET/NAME')
    # Patterns to the libraries, and what would be two names of one object.
    if re.search(r'[][*?#\\\x00-\x1f\x7f]', key) or {'', '.', '..'} & set(key.split('/') if key else ()):
        raise InputError(f'{called}: the name of a folder there has no [ ] * ? # \\ and no empty part; name another')
    try:
        key.encode()
    except UnicodeEncodeError:
        raise InputError(f'{called!a} has bytes that are no UTF-8; name another folder') from None
    package, extra = PACKAGES[scheme]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"{called}: {scheme}:// needs {package} ({first_line(error)}); install it: pip install -e '.[{extra}]'"
        ) from None
    return Address(f'{scheme}://{bucket}', *key.split('/')) if key else Address(f'{scheme}://{bucket}')


@functools.cache
def filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme, made once: what it asks of its user's environment takes a second."""
    import fsspec  # comes with `datasets`

    # They print tracebacks of what they raise as well, and warn of credentials that nobody asked for.
    for name in (PACKAGES[scheme][0], 'fsspec', 'google.auth', 'botocore'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings('ignore', module=r'google\.auth|gcsfs')
    # Another process may write: a remembered listing would be wrong. orbax's own file system is told so as well.
    for protocol in ('gcs', 'gs', 's3'):
        fsspec.config.conf.setdefault(protocol, {}).setdefault('use_listings_cache', False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return fsspec.filesystem(scheme, **({'finalize_on_close': True} if scheme == 'gs' else {}))


def check_reachable(path: Address, called: str) -> None:
    """Raises InputError, within a minute, where the bucket does not answer, is not there, or may not be listed."""
    way_out = 'check the network and the address'
    try:
        fs = filesystem(path.scheme)
        if path.scheme == 'gs':
            _connect(fs.base)
            fs.call('GET', 'b/{}/o', path.bucket, maxResults=1, timeout=REACH_SECONDS)
        else:
            fs.call_s3('list_objects_v2', Bucket=path.bucket, MaxKeys=1, timeout=REACH_SECONDS)
    except FileNotFoundError:
        raise InputError(
            f'{called}: there is no bucket {path.scheme}://{path.bucket}; correct its name, or make it'
        ) from None
    except Exception as error:
        reason = _reason(error)
        if re.search(r'401|403|[Ff]orbidden|denied|[Cc]redential|[Tt]oken|login', reason):
            way_out = LOG_IN[path.scheme]
        raise InputError(f'{called}: {path.scheme}://{path.bucket} cannot be reached ({reason}); {way_out}') from None


def _connect(base: str) -> None:
    """Finds out in seconds whether anybody answers at a URL: gcsfs tries for half a minute, and says less."""
    url = urllib.parse.urlsplit(base)
    if any(os.environ.get(name) for name in ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY', 'all_proxy')):
        return
    place = url.hostname, url.port or {'http': 80, 'https': 443}[url.scheme]
    for left in reversed(range(CONNECT_TRIES)):
        try:
            socket.create_connection(place, timeout=CONNECT_SECONDS).close()
            return
        except OSError as error:
            if not left or isinstance(error, socket.gaierror):  # a name that is not known: that took its time already
                raise StorageError(base, f'{place[0]}:{place[1]}: {error.strerror or first_line(error)}') from None
        time.sleep(0.5)


@contextlib.contextmanager
def _told(path: Address) -> Iterator[None]:
    """Raises whatever the block's libraries raise as an OSError that has an `errno` and a `strerror`."""
    try:
        yield
    except (TypeError, AttributeError, NameError, MemoryError):
        raise  # a mistake of ours
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise  # the disk of this machine
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from None
        if isinstance(error, FileExistsError):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path)) from None
        raise StorageError(path, _reason(error)) from error


def _reason(error: BaseException) -> str:
    """What a library says, in one line."""
    text = ' '.join((getattr(error, 'strerror', None) or str(error)).split())
    return printable(text, 300) or type(error).__name__


@contextlib.contextmanager
def reading_by_others(path: str | os.PathLike) -> Iterator[None]:
    """Raises as a StorageError what orbax or tensorstore raises in the block, where `path` is an address."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_address(path) or isinstance(error, TypeError | AttributeError | NameError | MemoryError):
            raise
        raise StorageError(path, _reason(error)) from error


def _is(path: Address, entry: dict[str, Any]) -> bool:
    return entry['name'].rstrip('/') == f'{path.bucket}/{path.key}'.rstrip('/')


# Whole objects.


def _object(path: Address) -> dict[str, Any] | None:
    """What the store says of an object, None where there is none. Half as many requests as `info`, which lists, too."""
    if not path.key:
        return None
    with contextlib.suppress(FileNotFoundError), _told(path):
        if path.scheme == 'gs':
            return filesystem('gs').call('GET', 'b/{}/o/{}', path.bucket, path.key, json_out=True)
        found = filesystem(path.scheme).info(os.fspath(path))
        return found if found['type'] == 'file' else None
    return None


def _size(path: Address, found: dict[str, Any] | None) -> int:
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return int(found['size'])


def read(path: Address, most: int) -> bytes:
    """The first `most` bytes of an object. Raises IsADirectoryError for a folder."""
    found = _object(path)
    if found is None and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    size = min(most, _size(path, found))
    if not size:
        return b''  # no range of bytes can be asked of it
    with _told(path):
        return filesystem(path.scheme).cat_file(os.fspath(path), start=0, end=size)


def stretches(path: Address) -> Iterator[bytes]:
    """The bytes of an object, one stretch after another."""
    size = _size(path, _object(path))
    for start in range(0, size, STRETCH):
        with _told(path):
            yield filesystem(path.scheme).cat_file(os.fspath(path), start=start, end=min(start + STRETCH, size))


def listing(folder: Address) -> dict[str, dict[str, Any]]:
    """Every object below `folder`: its name from there -> what the store says of it, `size` in bytes among it."""
    with _told(folder):
        found = filesystem(folder.scheme).find(os.fspath(folder), detail=True)
    beginning = f'{folder.bucket}/{folder.key}'.rstrip('/') + '/'
    return {
        name.removeprefix(beginning): entry
        for name, entry in sorted(found.items())
        if name.startswith(beginning) and not name.endswith('/')
    }


def fetch(path: Address, target: pathlib.Path) -> None:
    """Writes an object to the local file `target`, which appears whole or not at all."""
    with replacing(target) as file:
        for stretch in stretches(path):
            file.write(stretch)


def upload(source: pathlib.Path, path: Address) -> None:
    """Makes or replaces an object by a local file."""
    if path.scheme == 'gs' and source.stat().st_size < STRETCH:
        path.write_bytes(source.read_bytes())
        return
    with _told(path):
        filesystem(path.scheme).put_file(os.fspath(source), os.fspath(path))


def _post(path: Address, data: bytes, **conditions: Any) -> None:
    """Writes an object of GCS in one request, whose body is the object and nothing else.

    gcsfs's own way puts it between boundaries, with a line end of one byte before the last one: who takes CRLF for the
    line end takes the last byte of an object that ends in CR with it.
    """
    fs = filesystem('gs')
    fs.call(
        'POST',
        fs.base.replace('/storage/v1/', '/upload/storage/v1/') + 'b/{}/o',
        path.bucket,
        uploadType='media',
        name=path.key,
        headers={'Content-Type': 'application/octet-stream'},
        data=data,
        **conditions,
    )


def upload_folder(folder: pathlib.Path, target: Address, last: Iterable[str] = ()) -> None:
    """Uploads all files of a local folder; those that are named `last` when the others are there."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob('*')) if path.is_file()]
    for wave in ([name for name in names if name not in last], [name for name in last if name in names]):
        with concurrent.futures.ThreadPoolExecutor(THREADS) as executor:
            list(executor.map(lambda name: upload(folder / name, target / name), wave))


def move(source: Address, target: Address) -> None:
    """Copies all of `source`, an object or a folder, inside the store, and removes it then."""
    pairs = [(source, target)] if source.is_file() else [(source / n, target / n) for n in listing(source)]
    for old, new in pairs:
        with _told(old):
            filesystem(source.scheme).cp_file(os.fspath(old), os.fspath(new))
    source.unlink() if pairs == [(source, target)] else source.rmtree()


# One of several who write: what locks are made of.


def get_version(path: Address) -> tuple[bytes, str] | None:
    """An object, and its version for `put_if`; None where there is none."""
    fs = filesystem(path.scheme)
    with contextlib.suppress(FileNotFoundError), _told(path):
        info = fs.info(os.fspath(path))
        version = info.get('generation') or info.get('ETag') or info.get('etag')
        if path.scheme == 'gs':  # that version, even where another one is there by now
            _, data = fs.call('GET', 'b/{}/o/{}', path.bucket, path.key, alt='media', generation=version)
            return data, version
        return fs.cat_file(os.fspath(path)), version
    return None


def put_if(path: Address, data: bytes, version: str | None) -> bool:
    """Writes an object where it is still of that version, or, with None, where there is none; whether it did.

    The store compares and writes as one event. Where its answer is lost and the library asks again, it finds the
    object written by the first try; what was written is looked at then.
    """
    fs = filesystem(path.scheme)
    try:
        with _told(path):
            if path.scheme == 'gs':
                _post(path, data, ifGenerationMatch=version or 0)
            else:
                condition = {'IfNoneMatch': '*'} if version is None else {'IfMatch': version}
                fs.call_s3('put_object', Bucket=path.bucket, Key=path.key, Body=data, **condition)
    except (FileExistsError, FileNotFoundError, StorageError) as error:
        # S3 has a text of its own for a condition that does not hold.
        if isinstance(error, StorageError) and not re.search(r'(?i)pre-?condition|conditional', error.strerror):
            raise
        there = get_version(path)
        return there is not None and there[0] == data
    return True


# Local copies of what libraries want as files.


def local_copy(folder: Address, wanted: Iterable[str], cache: pathlib.Path) -> pathlib.Path:
    """A local folder with the objects `wanted` below `folder`, fetched unless that was done before.

    It is named by what the store says of their bytes: another version of one is another folder. The copies that were
    used longest ago are removed where all of them are larger than MOST_CACHED.

    Args:
      folder: where they are.
      wanted: their names from there.
      cache: where local copies are kept.

    Raises:
      InputError: the cache cannot be written, as WriteError; OSError: the store does not answer.
    """
    found = listing(folder)
    wanted = sorted(set(wanted) & found.keys())
    versions = [[name, found[name]['size'], _version(found[name])] for name in wanted]
    copy = cache / hashlib.sha256(repr((os.fspath(folder), versions)).encode()).hexdigest()[:24] / folder.name
    if not copy.is_dir():
        _make_room(cache, sum(found[name]['size'] for name in wanted))
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent, prefix='.fetching-') as place:
            for name in wanted:
                (pathlib.Path(place, name)).parent.mkdir(parents=True, exist_ok=True)
            with concurrent.futures.ThreadPoolExecutor(THREADS) as executor:
                list(executor.map(lambda name: fetch(folder / name, pathlib.Path(place, name)), wanted))
            with contextlib.suppress(OSError):  # another process has fetched it meanwhile
                os.rename(place, copy)
            pathlib.Path(place).mkdir(exist_ok=True)  # for its own end
    os.utime(copy.parent)
    return copy


def _version(entry: dict[str, Any]) -> str:
    return str(entry.get('md5Hash') or entry.get('ETag') or entry.get('generation') or entry.get('LastModified'))


def _make_room(cache: pathlib.Path, size: int) -> None:
    """Removes the copies that were used longest ago, until `size` more bytes are no more than MOST_CACHED."""
    copies = []
    for path in cache.iterdir() if cache.is_dir() else ():
        with contextlib.suppress(OSError):
            bytes_ = sum(file.stat().st_size for file in path.rglob('*') if file.is_file())
            copies.append((path.stat().st_mtime, bytes_, path))
    total = size + sum(bytes_ for _, bytes_, _ in copies)
    for _, bytes_, path in sorted(copies):
        if total <= MOST_CACHED:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= bytes_
