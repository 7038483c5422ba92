"""The folder of a run: whose it is, and that one run at a time writes to it."""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax.checkpoints.verifying import raise_together
from gpt_jax.config import RunConfig, as_record, differing_keys
from gpt_jax.errors import InputError
from gpt_jax.files import as_path, is_address, read_json, remove_leftovers, replacing

if TYPE_CHECKING:
    from gpt_jax.storage import Address

HEARTBEAT_SECONDS = 10
# A holder on another host whose heartbeat is older than this is taken for dead. Six beats: storage that many hosts
# share may hang for a while, and their clocks need not agree to the second.
STALE_SECONDS = 60
# What a run writes, besides the lock.
FILES = ('config.json', 'tokenizer.json', 'metrics.jsonl', 'samples.txt', 'loss.png')
FOLDERS = ('checkpoints', 'tensorboard')


def check(workdir: pathlib.Path, run: RunConfig, resumed: bool = False) -> None:
    """Lets a run into its folder.

    Where it is `resumed` from a checkpoint, keys of the schedule are left to `optimizer.resumed_lengths`: what counts
    is the rates of the steps that were taken.

    Raises:
      InputError: the folder holds a run whose config differs in more than a resumed run may change.
    """
    path = workdir / 'config.json'
    if not path.exists():
        return
    try:
        recorded = read_json(path)
    except InputError as error:
        raise InputError(f'{error}; choose another --workdir, or restore that file') from None
    if not isinstance(recorded, dict):
        raise InputError(f'{path} holds no experiment; choose another --workdir, or restore that file')
    lines = differing_keys(recorded, run, str(path))
    if resumed:
        lines = [line for line in lines if not line.startswith('schedule.')]
    if lines:
        raise InputError(
            f'--workdir={workdir} holds a run of another config ({"; ".join(lines)}); '
            'choose another --workdir or give these keys their old values'
        )


def write_config(workdir: pathlib.Path, run: RunConfig) -> None:
    """Records the resolved experiment in config.json."""
    with replacing(workdir / 'config.json') as file:
        file.write((json.dumps(as_record(run), indent=2) + '\n').encode())


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Makes `workdir` where it is missing, and keeps every other run out of it for the length of the block.

    Two files say that somebody is at it. `.lock` is locked by the system, which opens it when its holder dies, however
    that happens. `.holder.json` names host, pid and the time of a heartbeat: for the message, and for storage on which
    several hosts do not see each other's locks. A dead holder's place is taken at once on the same host, and after
    `STALE_SECONDS` without a heartbeat on another. Both files are gone afterwards, and so is a folder left empty.

    Object storage has no such locks. There `.holder.json` is all, and who writes it does so only where it is still the
    one that was read: of two that want a dead holder's place one gets it.

    Of several processes the first holds the lock for all, which call this together.

    Yields:
      `workdir` as a path, `~` being the home folder.

    Raises:
      InputError: another run is at it, or the folder cannot be used.
    """
    workdir = _as_path(workdir)
    lock, refusal = None, None
    if jax.process_index() == 0:
        lock = _ObjectLock(workdir) if is_address(workdir) else _Lock(workdir)
        try:
            lock.acquire()
        except InputError as error:
            refusal = error
    if jax.process_count() > 1:
        # All have to know: those that were let in would wait for the first one for ever.
        refused = multihost_utils.process_allgather(np.asarray(refusal is not None)).any()
        if refused and refusal is None:
            refusal = InputError(f'--workdir={workdir} was refused to process 0: see its message')
    if refusal is not None:
        raise refusal
    try:
        yield workdir
    finally:
        if lock is not None:
            lock.release()


def check_still_ours(workdir: pathlib.Path) -> None:
    """Raises InputError where another run has taken this one for dead, and its place in a `locked` workdir.

    So it happens to a process that sleeps for more than `STALE_SECONDS`, such as a machine that is suspended, or that
    cannot reach its storage for as long: it must not write over what the other one has written since. Of several
    processes, which call this together, the first one looks, as it holds the lock.
    """
    problem = _taken_over(workdir) if jax.process_index() == 0 else None
    raise_together(problem, lambda process: InputError(f'--workdir={workdir}: see the message of process {process}'))


def _taken_over(workdir: pathlib.Path) -> InputError | None:
    try:
        holder = _holder(read_json(workdir / '.holder.json'))
    except InputError:  # nobody's, or out of reach: then what is to be written will tell
        return None
    if holder is None or _is_this_process(holder):
        return None
    return InputError(
        f'--workdir={workdir}: process {holder["pid"]} on host {holder["host"]} has taken it over, as this run had '
        f'given no sign of life for {STALE_SECONDS} s; this one ends and writes no more, that one goes on'
    )


def _as_path(workdir: str | os.PathLike) -> pathlib.Path:
    """Raises InputError where that is no path, or none that libraries can be given."""
    given = as_path(workdir, f'--workdir={workdir}')
    if is_address(given):
        if given.scheme != 'gs':
            raise InputError(
                f'--workdir={workdir}: orbax writes checkpoints to folders and to gs:// alone; mount the bucket, and '
                'name that folder'
            )
        return given
    try:
        os.fspath(workdir).encode()
        path = pathlib.Path(workdir).expanduser()
        path.resolve()
    except UnicodeEncodeError:
        shown = os.fsencode(workdir)
        raise InputError(f'--workdir={shown!r} has bytes that are no UTF-8; name another folder') from None
    except OSError as error:
        raise InputError(f'--workdir={workdir} cannot be used ({error.strerror}); name another folder') from None
    except (ValueError, RuntimeError) as error:  # links in a loop; a home folder that nobody has
        raise InputError(f'--workdir={workdir} cannot be used ({error}); name another folder') from None
    if '\0' in os.fspath(workdir) or not os.fspath(workdir):
        raise InputError(f'--workdir={os.fspath(workdir)!r} is no name of a folder; name another one')
    return path


def _check_places(workdir: pathlib.Path) -> None:
    """Raises InputError where something stands at the place of a file or folder of the run that is none.

    A link to a file is read, and replaced when the run writes. Nothing is ever written through it.
    """
    for name in (*FILES, *FOLDERS):
        path, kind = workdir / name, 'folder' if name in FOLDERS else 'regular file'
        if path.exists() and not (path.is_dir() if name in FOLDERS else path.is_file()):
            raise InputError(
                f'--workdir={workdir}: {path} is no {kind}; move it elsewhere, or choose another --workdir'
            )


class _Lock:
    """The lock of one workdir, and the thread that shows it alive."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir
        self._holder = workdir / '.holder.json'
        self._filelock = filelock.FileLock(workdir / '.lock')
        self._made: list[pathlib.Path] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='heartbeat', daemon=True)

    def acquire(self) -> None:
        """Raises InputError where another one holds the lock, or the folder cannot be used."""
        try:
            if self._workdir.exists() and not self._workdir.is_dir():
                raise InputError(f'--workdir={self._workdir} is a file; name a folder')
            self._made = [path for path in (self._workdir, *self._workdir.parents) if not path.exists()]
            self._workdir.mkdir(parents=True, exist_ok=True)
            # Storage without such locks is left to the heartbeat.
            with contextlib.suppress(NotImplementedError):
                self._filelock.acquire(blocking=False)
            if (holder := self._read()) is not None and _alive(holder):
                raise self._refusal(holder)
            _check_places(self._workdir)
            remove_leftovers([self._holder, *(self._workdir / name for name in FILES)])
            self._write()
        except filelock.Timeout:
            raise self._refusal(self._read()) from None
        except OSError as error:
            self._open_again()
            raise InputError(
                f'--workdir={self._workdir} cannot be written to ({error.strerror}); name another folder'
            ) from None
        except InputError:
            self._open_again()
            raise
        self._thread.start()

    def release(self) -> None:
        """Takes the files away, and folders that were made for nothing."""
        self._ended.set()
        self._thread.join()
        holder = self._read()
        if holder is None or _is_this_process(holder):
            self._holder.unlink(missing_ok=True)
            (self._workdir / '.lock').unlink(missing_ok=True)  # while it is still locked, or it could be another one's
        self._open_again()

    def _open_again(self) -> None:
        self._filelock.release()
        for path in self._made:
            with contextlib.suppress(OSError):  # somebody's files are in it
                path.rmdir()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # Where storage fails for a moment the next beat may come through. Where this process slept for so long
            # that another host took its place (a laptop's lid), it must not take it back.
            with contextlib.suppress(OSError):
                if (holder := self._read()) is not None and _is_this_process(holder):
                    self._write()

    def _write(self) -> None:
        with replacing(self._holder) as file:
            file.write(json.dumps(_record()).encode())

    def _read(self) -> dict[str, Any] | None:
        """Who holds the lock; None where nobody does, or the file is not one of ours."""
        try:
            return _holder(read_json(self._holder))
        except InputError:
            return None

    def _refusal(self, holder: dict[str, Any] | None) -> InputError:
        return _refused(self._workdir, holder)


class _ObjectLock:
    """The lock of a workdir on object storage: one object, and the thread that shows its holder alive."""

    def __init__(self, workdir: 'Address'):
        self._workdir = workdir
        self._holder = workdir / '.holder.json'
        self._mine: bytes | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='heartbeat', daemon=True)

    def acquire(self) -> None:
        """Raises InputError where another one holds the lock, or the bucket cannot be reached or written to."""
        from gpt_jax import storage

        storage.check_reachable(self._workdir, f'--workdir={self._workdir}')
        try:
            found = storage.get_version(self._holder)
            if found is not None and (holder := self._parsed(found[0])) is not None and _alive(holder):
                raise _refused(self._workdir, holder)
            if not self._put(None if found is None else found[1]):
                raise _refused(self._workdir, None)
        except storage.StorageError as error:
            raise InputError(
                f'--workdir={self._workdir} cannot be written to ({error.strerror}); name another folder, or get the '
                'right to write there'
            ) from None
        self._thread.start()

    def release(self) -> None:
        """Takes the object away, unless another run has taken this one for dead and its place."""
        from gpt_jax import storage

        self._ended.set()
        self._thread.join()
        with contextlib.suppress(storage.StorageError):  # else it counts as dead after STALE_SECONDS
            found = storage.get_version(self._holder)
            if found is not None and found[0] == self._mine:
                self._holder.unlink(missing_ok=True)

    def _put(self, version: str | None) -> bool:
        from gpt_jax import storage

        data = json.dumps(_record()).encode()
        done = storage.put_if(self._holder, data, version)
        self._mine = data if done else self._mine
        return done

    def _beat(self) -> None:
        from gpt_jax import storage

        while not self._ended.wait(HEARTBEAT_SECONDS):
            # As in `_Lock`: the next one may come through, and a place that another one took is not taken back.
            with contextlib.suppress(storage.StorageError):
                found = storage.get_version(self._holder)
                if found is not None and found[0] == self._mine:
                    self._put(found[1])

    def _parsed(self, data: bytes) -> dict[str, Any] | None:
        try:
            return _holder(json.loads(data))
        except ValueError:
            return None


def _record() -> dict[str, Any]:
    """What this process writes of itself as a holder."""
    return {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'started': _start_time(os.getpid()),
        'time': time.time(),
        'system': _system(),
    }


def _system() -> str:
    """Of which a process has its number: containers may have one host's name, and each a process 1."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
        return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    return ''


def _holder(document: Any) -> dict[str, Any] | None:
    """A record as `_record` or an older gpt_jax made it; None for anything else."""
    try:
        whole = {'host': str, 'pid': int, 'time': float, 'started': int | None}
        return document if all(isinstance(document[name], kind) for name, kind in whole.items()) else None
    except (TypeError, KeyError):
        return None


def _refused(workdir: pathlib.Path, holder: dict[str, Any] | None) -> InputError:
    way_out = 'wait for its end or stop it, or choose another --workdir'
    if holder is None:
        return InputError(f'--workdir={workdir}: another run is starting in it; {way_out}')
    if not _is_here(holder):
        age = max(0, time.time() - holder['time'])
        way_out += f'; its last heartbeat is {age:.0f} s old, and at {STALE_SECONDS} s it counts as dead'
    return InputError(
        f'--workdir={workdir}: another run is writing to it, process {holder["pid"]} on host {holder["host"]}; '
        f'{way_out}'
    )


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether its process, if it lives, is one that this one can see."""
    return holder['host'] == socket.gethostname() and holder.get('system', _system()) == _system()


def _is_this_process(holder: dict[str, Any]) -> bool:
    return _is_here(holder) and holder['pid'] == os.getpid()


def _alive(holder: dict[str, Any]) -> bool:
    if not _is_here(holder):
        # One from the future is of no clock that this one agrees with: it would hold the folder for ever.
        return abs(time.time() - holder['time']) < STALE_SECONDS
    try:
        os.kill(holder['pid'], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's
    # The number of a dead process may be another one's by now.
    return _start_time(holder['pid']) == holder['started']


def _start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since the system did; None where it ended, or this is no Linux."""
    try:
        fields = pathlib.Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()
    except OSError:
        return None
    return None if fields[0] in 'ZX' else int(fields[19])
