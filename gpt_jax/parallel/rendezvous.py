"""Where the processes of a run are, and whether all of them have come: known before jax starts anything.

place = find(coordinator, num_processes, process_id)    # what is not given, as jax finds it on a cluster
meet(place, seconds=60)                                 # returns in all of them, or raises in all of them

jaxlib itself ends a process that waits in vain, and says nothing of who is missing. So the processes meet at the
coordinator's port before jax opens it: process 0 listens there, each (process 0 too, which so finds out whether it is
where the others look for it) says who it is, and all get the same answer. What one says is a line of JSON.
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import selectors
import socket
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from jax._src import clusters  # jax asks it only when it starts its runtime, which is too late

from gpt_jax.errors import InputError, first_line, printable

CONNECT_SECONDS = 60
ALL_THREE = 'give --coordinator=HOST:PORT (of process 0), --num_processes and --process_id'
# Where each process of a host has one of its GPUs, the launcher says in these which one it is.
_LOCAL_RANKS = ('SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK')
_GRACE_SECONDS = 3  # for the others to come where something is wrong already
_ANSWER_SECONDS = 10  # for the answer, after the time for the last one to come
_MOST_BYTES = 2**16  # of what one says, whoever it is


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of a run.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      local_devices: the GPUs of the host that are this process's, or None: all that it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0, as sockets take them."""
        host, _, port = self.coordinator.rpartition(':')
        return host.strip('[]'), int(port)


def check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raises InputError, naming the flag, for values that can be of no run; nothing is connected to."""
    if num_processes is not None and num_processes < 1:
        raise InputError(f'--num_processes={num_processes} must be at least 1')
    if process_id is not None and not 0 <= process_id < (num_processes or 2**31):
        most = '' if num_processes is None else f' and less than --num_processes={num_processes}'
        raise InputError(f'--process_id={process_id} must be at least 0{most}: processes are counted from 0')
    if coordinator is None:
        return
    host, _, port = coordinator.rpartition(':')
    if not host or not re.fullmatch(r'\d{1,5}', port, re.ASCII) or not 0 < int(port) < 2**16:
        raise InputError(f'--coordinator={coordinator} must be HOST:PORT of process 0, e.g. 10.0.0.1:1234')
    if not _may_be_a_host(host):
        raise InputError(f'--coordinator={coordinator}: {host} is no name of a host; name the host of process 0')


def find(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Place:
    """Which process of which run this is: what is None, jax finds on a cluster that it knows.

    Raises:
      InputError: naming a flag that can be of no run, or what the cluster does not tell.
    """
    if coordinator is None:
        coordinator = os.environ.get('JAX_COORDINATOR_ADDRESS')  # jax's own variable
    check_flags(coordinator, num_processes, process_id)
    given = (coordinator, num_processes, process_id)
    flags = ('--coordinator', '--num_processes', '--process_id')
    asked = [f'{flag}={value}' for flag, value in zip(flags, given, strict=True) if value is not None]
    asked = ' '.join(asked) or '--distributed'
    if None not in given and not any(name in os.environ for name in _LOCAL_RANKS):
        return Place(*given)  # no cluster has to be asked, which may take long, or refuse
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # jax's, on packages that would help: `_way_out` names them
        try:
            *found, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                *given, None, None, CONNECT_SECONDS
            )
        except Exception as error:  # of each cluster's own kind
            raise InputError(
                f'{asked}: jax cannot tell the processes here ({first_line(error)}); {_way_out()}'
            ) from None
    if None in found:
        missing = [flag for flag, value in zip(flags, found, strict=True) if value is None]
        what = 'of the other processes' if len(missing) == 3 else ' and '.join(missing)
        raise InputError(f'{asked}: nothing here tells jax {what}; {_way_out()}')
    check_flags(*found)
    if 'JAX_LOCAL_DEVICE_IDS' in os.environ:
        devices = None  # jax reads it itself
    return Place(*found, None if devices is None else tuple(devices))


def meet(place: Place, seconds: float = CONNECT_SECONDS) -> None:
    """Waits until all processes of the run are there.

    Each calls this; all return, or all that came are told why not.

    Args:
      place: which process this is.
      seconds: that it waits for process 0, and process 0 for the others.

    Raises:
      InputError: naming the processes that did not come, or the flag that differs between those that did.
    """
    reception = None
    if place.process_id == 0:
        reception = _Reception(place, seconds)
        reception.start()
    try:
        error = _ask(place, seconds)
    finally:
        if reception is not None:
            reception.close()
    if error is not None:
        raise InputError(error)


def names(numbers: Collection[int], most: int = 10) -> str:
    """{2} -> 'process 2'; {1, 2, 3} -> 'processes 1, 2 and 3'; of many, the first ones and how many more."""
    shown = [str(number) for number in sorted(numbers)[:most]]
    if len(numbers) > most:
        shown.append(f'{len(numbers) - most} more')
    return f'process{"es" if len(numbers) > 1 else ""} {_and(shown)}'


def _and(words: Iterable[str]) -> str:
    *first, last = words
    return f'{", ".join(first)} and {last}' if first else last


def _may_be_a_host(host: str) -> bool:
    """Whether a name is written as those of hosts are; a cluster may give it to one later than it starts this."""
    if host.startswith('[') or ':' in host:
        try:
            return bool(ipaddress.IPv6Address(host.removeprefix('[').removesuffix(']').partition('%')[0]))
        except ValueError:
            return False
    try:
        return bool(re.fullmatch(r'[\w.-]+', host)) and len(host.encode('idna')) < 254
    except UnicodeError:  # a part that is empty or too long
        return False


def _way_out() -> str:
    """What to do where a launcher does not tell jax all: by what it has left in the environment."""
    if 'SLURM_JOB_ID' in os.environ:
        return f'start it with srun, or {ALL_THREE}'
    if 'KUBERNETES_SERVICE_HOST' in os.environ:
        return f'{ALL_THREE}, as launch/kubernetes_jobset.yaml does, or install jax[k8s] and let the pods read the job'
    if 'OMPI_COMM_WORLD_SIZE' in os.environ:
        return (
            'Open MPI 5 does not tell it: give --coordinator=HOST:PORT (of process 0), '
            '--num_processes=$OMPI_COMM_WORLD_SIZE and --process_id=$OMPI_COMM_WORLD_RANK, as launch/mpi.sh does'
        )
    if 'PMI_SIZE' in os.environ:
        return 'give --coordinator=HOST:PORT (of process 0), --num_processes=$PMI_SIZE and --process_id=$PMI_RANK'
    return ALL_THREE


class _Reception:
    """Process 0's end, in a thread of its own: notes who comes, and answers all when all are there or none is to come.

    The port is closed before anybody is told to go on, so that jax's service can have it.
    """

    def __init__(self, place: Place, seconds: float):
        self._place, self._seconds = place, seconds
        # The address that jax's service would take.
        bind = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS', '').rpartition(':')[0].strip('[]')
        both = socket.has_dualstack_ipv6() and bind in ('', '::')
        family = socket.AF_INET6 if both or ':' in bind else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (bind, place.address[1]), family=family, backlog=1024, dualstack_ipv6=both
            )
        except OSError as error:
            raise InputError(
                f'--coordinator={place.coordinator}: process 0 cannot listen there ({os.strerror(error.errno or 0)}); '
                'name another port'
            ) from None
        self._listener.setblocking(False)
        self._closed = threading.Event()
        self._here: dict[int, tuple[dict[str, Any], socket.socket]] = {}
        self._refused: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, name='reception', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Returns when the port is free."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            stack.enter_context(self._listener)
            selector.register(self._listener, selectors.EVENT_READ)
            error = self._receive(selector, stack)
            self._listener.close()
            answer = (json.dumps({'gpt_jax': 'refused' if error else 'all are here', 'error': error}) + '\n').encode()
            for connection in [*(connection for _, connection in self._here.values()), *self._refused]:
                with contextlib.suppress(OSError):  # it has gone meanwhile
                    connection.setblocking(True)
                    connection.sendall(answer)

    def _receive(self, selector: selectors.BaseSelector, stack: contextlib.ExitStack) -> str | None:
        """Returns None when all are there, or why they will not be."""
        start = time.monotonic()
        until, say_at, heard, error = start + self._seconds, start + min(5, self._seconds / 2), {}, None
        while not self._all_here():
            now = time.monotonic()
            if self._closed.is_set():
                return 'process 0 was stopped while it waited for the others; start all again'
            if now > until:
                return error or self._missing()
            if now > say_at:
                say_at = until
                absent = set(range(self._place.num_processes)) - self._here.keys()
                print(f'waiting up to {self._seconds:g} s for {names(absent)}', file=sys.stderr, flush=True)
            for key, _ in selector.select(0.2):
                if key.fileobj is self._listener:
                    with contextlib.suppress(OSError):  # gone before it was let in
                        connection, _ = self._listener.accept()
                        stack.enter_context(connection)
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ)
                        heard[connection] = b''
                    continue
                connection = key.fileobj
                data = _read(connection)
                if data is None:
                    continue
                heard[connection] += data
                if data and b'\n' not in heard[connection] and len(heard[connection]) < _MOST_BYTES:
                    continue
                hello = _parse(heard[connection])
                if not data or hello is None:  # it left, or is none of us
                    selector.unregister(connection)
                    connection.close()
                    self._here = {n: other for n, other in self._here.items() if other[1] is not connection}
                elif (wrong := self._let_in(hello, connection)) is not None:
                    # Those that are about to come are told as well.
                    error, until = error or wrong, min(until, now + _GRACE_SECONDS)
        return error

    def _all_here(self) -> bool:
        if len(self._here) == self._place.num_processes:  # unless one has died since
            self._here = {n: other for n, other in self._here.items() if _read(other[1]) != b''}
        return len(self._here) == self._place.num_processes

    def _let_in(self, hello: dict[str, Any], connection: socket.socket) -> str | None:
        """Notes who came, or returns what is wrong with it."""
        number, count, known = hello['process_id'], hello['num_processes'], self._here.get(hello['process_id'])
        if count != self._place.num_processes:
            self._refused.append(connection)
            return (
                f'--num_processes={count} in process {number} (on {printable(hello["host"])}) and '
                f'{self._place.num_processes} in process 0; give all the same'
            )
        if known is not None and _read(known[1]) != b'':  # else it died, and this is it once more
            self._refused.append(connection)
            hosts = ' and '.join(f'{printable(one["host"])} (pid {one["pid"]})' for one in (known[0], hello))
            return f'--process_id={number} was given to two processes, on {hosts}; give each its own, from 0'
        self._here[number] = hello, connection
        return None

    def _missing(self) -> str:
        absent = set(range(self._place.num_processes)) - self._here.keys()
        hosts = sorted({printable(hello['host'], 100) for hello, _ in self._here.values()})
        shown = hosts[:5] + ([f'{len(hosts) - 5} more'] if len(hosts) > 5 else [])
        came = f' ({names(self._here)} came, from {_and(shown)})' if hosts else ''
        return (
            f'{names(absent)} of {self._place.num_processes} did not come within {self._seconds:g} s{came}; '
            'start all with the same command, or give those that start slowly more time with --connect_seconds'
        )


def _ask(place: Place, seconds: float) -> str | None:
    """Says who this is to process 0; returns when it has answered: None, or what is wrong."""
    hello = {'process_id': place.process_id, 'num_processes': place.num_processes}
    hello |= {'gpt_jax': 'hello', 'host': socket.gethostname(), 'pid': os.getpid()}
    deadline, said = time.monotonic() + seconds, False
    while True:
        try:
            with socket.create_connection(place.address, timeout=5) as connection:
                connection.sendall((json.dumps(hello) + '\n').encode())
                answer = _wait_for_answer(connection, seconds + _ANSWER_SECONDS)
            if answer is not None:
                return answer['error']
            # Such as the service of the run before, which has not noticed yet that it has lost somebody.
            reason = 'what answers there is no process 0 that waits for others'
        except (OSError, UnicodeError) as error:
            reason = getattr(error, 'strerror', None) or first_line(error)
        if time.monotonic() > deadline:
            break
        if not said:
            said = True
            text = f'waiting up to {seconds:g} s for process 0 at {place.coordinator} ({reason})'
            print(text, file=sys.stderr, flush=True)
        time.sleep(0.2)
    if place.process_id == 0:
        return (
            f'--coordinator={place.coordinator}: process 0, which is this one on {socket.gethostname()}, is not to be '
            f'reached there ({reason}); name its host and port'
        )
    return (
        f'--coordinator={place.coordinator}: process 0 did not answer within {seconds:g} s ({reason}); '
        'start it, or name its host and port'
    )


def _wait_for_answer(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """What process 0 says; None where it leaves, or is none."""
    deadline, heard = time.monotonic() + seconds, b''
    connection.settimeout(0.2)  # a signal may be given to another thread, and is then heard between two readings
    while b'\n' not in heard and len(heard) < _MOST_BYTES and time.monotonic() < deadline:
        try:
            data = connection.recv(4096)
        except TimeoutError:
            continue
        if not data:
            return None
        heard += data
    try:
        answer = json.loads(heard)
        return answer if answer['gpt_jax'] in ('refused', 'all are here') and 'error' in answer else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _read(connection: socket.socket) -> bytes | None:
    """What has come of it; b'' where it is gone, None where nothing has."""
    try:
        return connection.recv(4096)
    except BlockingIOError:
        return None
    except OSError:
        return b''


def _parse(heard: bytes) -> dict[str, Any] | None:
    """What one of us says of itself; None where it is none."""
    try:
        hello = json.loads(heard)
        kinds = {'process_id': int, 'num_processes': int, 'host': str, 'pid': int}
        is_ours = hello['gpt_jax'] == 'hello' and all(isinstance(hello[name], kind) for name, kind in kinds.items())
        return hello if is_ours and 0 <= hello['process_id'] < hello['num_processes'] else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
