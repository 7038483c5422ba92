"""Several processes that are one run: how they find each other, that they mean the same, and that none waits for ever.

connect(coordinator, num_processes, process_id)     # before anything else of jax
check_alike({'train.seed': '0', ...})               # the same in every process, or all are told the difference
with ended_together():                              # where a process is lost, the others end with one line
    ...
"""

import concurrent.futures
import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # for its client: the public API has no store of keys and values

from gpt_jax import signals
from gpt_jax.errors import InputError, first_line

# For processes to appear that a cluster starts one after the other.
CONNECT_SECONDS = 120
# Without a heartbeat (a thread of jaxlib's gives one, whatever Python is at) a process counts as lost. What waits for
# it ends some seconds later.
LOST_SECONDS = 20
SHUTDOWN_SECONDS = 60  # the first process has more to do at the end than the others
ALL_THREE = 'give --coordinator=HOST:PORT (of process 0), --num_processes and --process_id'
LOST = 'another process of this run was lost; start all of them again, and the run goes on from its last checkpoint'
# What collectives raise where the other side is gone: of Gloo (CPU), NCCL (GPU), and the coordination service.
_CONNECTION = re.compile(
    r'gloo|nccl|coordination|unavailable|deadline_exceeded|connection (closed|reset)', re.IGNORECASE
)

_calls = itertools.count()


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Starts jax's distributed runtime, in bounded time.

    Args:
      coordinator: HOST:PORT of process 0; None, here and below: as jax finds it on a cluster that it knows.
      num_processes: how many there are.
      process_id: which of them this is, from 0.

    Raises:
      InputError: naming the flag, a value that cannot be, or processes that cannot be found.
    """
    check_flags(coordinator, num_processes, process_id)
    if coordinator is not None:
        host, _, port = coordinator.rpartition(':')
        if process_id == 0:
            _check_free(coordinator, int(port))
        elif process_id is not None:
            _wait_for(coordinator, host, int(port))
    _end_in_one_line(
        f'not all processes were there within {CONNECT_SECONDS} s; start all of them with the same command'
    )
    timeouts = {
        'initialization_timeout': CONNECT_SECONDS,
        'heartbeat_timeout_seconds': LOST_SECONDS,
        'shutdown_timeout_seconds': SHUTDOWN_SECONDS,
    }
    try:
        _interruptible(lambda: jax.distributed.initialize(coordinator, num_processes, process_id, **timeouts))
    except ValueError:
        raise InputError(f'--distributed: nothing here tells jax of the other processes; {ALL_THREE}') from None
    except RuntimeError as error:
        raise InputError(f'--distributed: {first_line(error)}; {ALL_THREE}') from None
    _end_in_one_line(LOST)
    for number in signals.numbers():  # jax has taken SIGTERM for itself
        if callable(handler := signal.getsignal(number)):
            signal.signal(number, handler)


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
    try:
        socket.getaddrinfo(host.strip('[]'), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f'--coordinator={coordinator}: there is no host {host} ({first_line(error)}); name the host of process 0'
        ) from None


def check_alike(values: Mapping[str, object]) -> None:
    """Raises InputError, in every process, where these are not the same in all; names what differs, and where.

    Args:
      values: what it is -> JSON. Each process makes this call, and waits for the others to make it.
    """
    if jax.process_count() == 1:
        return
    client, call = distributed.global_state.client, next(_calls)
    index = jax.process_index()
    client.key_value_set(f'gpt_jax/alike/{call}/{index}', json.dumps(values))
    others = [json.loads(_wait_for_value(client, f'gpt_jax/alike/{call}/{n}')) for n in range(jax.process_count())]
    first = others[0]
    found = [
        f'{name}={other.get(name)} in process {number} and {first.get(name)} in process 0'
        for number, other in enumerate(others)
        for name in first | other
        if other.get(name) != first.get(name)
    ]
    if found:
        # Process 0 keeps the values: it leaves when the others have read them.
        client.key_value_set(f'gpt_jax/read/{call}/{index}', '')
        for number in range(1, jax.process_count() if index == 0 else 1):
            _wait_for_value(client, f'gpt_jax/read/{call}/{number}')
        more = f' (and {len(found) - 5} more)' if len(found) > 5 else ''
        raise InputError(f'{"; ".join(found[:5])}{more}; start all processes with the same command and versions')


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Ends this process, with one line and status 1, where the block fails for want of another one.

    At once: what would follow, such as the end of a save, waits for the other one as well.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, InputError) or not _CONNECTION.search(str(error)):
            raise
        _end(LOST)


@contextlib.contextmanager
def left_at_once() -> Iterator[None]:
    """Ends this process where the block raises InputError, without waiting for the others, which then end as well."""
    try:
        yield
    except InputError as error:
        _end(str(error))


def _interruptible(wait: Callable[[], None]) -> None:
    """Does what waits in C++, where Python would hear of no signal; one ends the process, which holds nothing yet."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        future = executor.submit(wait)
        try:
            while not future.done():
                concurrent.futures.wait([future], timeout=0.2)
        except (KeyboardInterrupt, SystemExit):
            number = signals.noted() or signal.SIGINT
            signals.warn(f'{signal.Signals(number).name}: ended while waiting for the other processes\n')
            os._exit(128 + number)
        future.result()


def _wait_for_value(client: Any, key: str) -> str:
    """Of another process, which may prepare data for hours; one that is lost ends the waiting, and so does a signal."""
    while True:
        try:
            return client.blocking_key_value_get(key, 1000)
        except (RuntimeError, ValueError) as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise


def _wait_for(coordinator: str, host: str, port: int) -> None:
    """Returns when process 0 answers: jaxlib would end the process where it does not."""
    deadline, said = time.monotonic() + CONNECT_SECONDS, False
    while True:
        try:
            socket.create_connection((host.strip('[]'), port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or first_line(error)
        if time.monotonic() > deadline:
            raise InputError(
                f'--coordinator={coordinator}: process 0 did not answer within {CONNECT_SECONDS} s ({reason}); '
                'start it, or name its host and port'
            )
        if not said:
            print(f'waiting up to {CONNECT_SECONDS} s for process 0 at {coordinator}', file=sys.stderr, flush=True)
            said = True
        time.sleep(0.5)


def _check_free(coordinator: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            raise InputError(
                f'--coordinator={coordinator}: process 0 cannot listen there ({error.strerror}); name another port'
            ) from None


_on_abort = None  # kept: the system has its address


def _end_in_one_line(message: str) -> None:
    """Has jaxlib's abort, its only answer to a lost process, end this one with a line and status 1.

    Python's own handlers are of no use: they run when the signal's returns, and the process has ended by then.
    """
    global _on_abort  # noqa: PLW0603
    if sys.platform == 'win32':
        return
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(
        lambda _: _end(f'{message} (TF_CPP_MIN_LOG_LEVEL=0 shows what jaxlib says)')
    )
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    _on_abort = handler


def _end(message: str) -> None:
    signals.warn(f'error: {message}\n')
    os._exit(1)
