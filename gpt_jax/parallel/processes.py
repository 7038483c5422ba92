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
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # for its client: the public API has no store of keys and values

from gpt_jax import signals
from gpt_jax.errors import InputError, first_line
from gpt_jax.parallel.rendezvous import ALL_THREE, CONNECT_SECONDS, find, meet

# Without a heartbeat (a thread of jaxlib's gives one, whatever Python is at) a process counts as lost. What waits for
# it ends some seconds later.
LOST_SECONDS = 20
SHUTDOWN_SECONDS = 60  # the first process has more to do at the end than the others
SAYS_MORE = '(TF_CPP_MIN_LOG_LEVEL=0 shows what jaxlib says)'
LOST = 'another process of this run was lost; start all of them again, and the run goes on from its last checkpoint'
# What collectives raise where the other side is gone: of Gloo (CPU), NCCL (GPU), and the coordination service.
_CONNECTION = re.compile(
    r'gloo|nccl|coordination|unavailable|deadline_exceeded|connection (closed|reset)', re.IGNORECASE
)

_calls = itertools.count()


def connect(
    coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: float = CONNECT_SECONDS
) -> None:
    """Starts jax's distributed runtime, in bounded time.

    Args:
      coordinator: HOST:PORT of process 0; None, here and below: as jax finds it on a cluster that it knows.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      seconds: to wait for all of them.

    Raises:
      InputError: naming the flag, a value that cannot be, or processes that cannot be found.
    """
    place = find(coordinator, num_processes, process_id)
    meet(place, seconds)
    _end_in_one_line(f'a process was lost while all were starting; start all of them again {SAYS_MORE}')
    timeouts = {
        'initialization_timeout': CONNECT_SECONDS,
        'heartbeat_timeout_seconds': LOST_SECONDS,
        'shutdown_timeout_seconds': SHUTDOWN_SECONDS,
    }
    # The processes reach each other without the proxy that some clusters have for the world outside; gRPC would ask it,
    # and jax warns of that.
    os.environ['no_grpc_proxy'] = place.address[0]  # noqa: SIM112  its name
    jax.config.update('jax_check_proxy_envs', False)
    devices = None if place.local_devices is None else list(place.local_devices)
    given = (place.coordinator, place.num_processes, place.process_id, devices, 'deactivate')  # all is known by now
    try:
        _interruptible(lambda: jax.distributed.initialize(*given, **timeouts))
    except (RuntimeError, ValueError) as error:
        raise InputError(f'--coordinator={place.coordinator}: {first_line(error)}; {ALL_THREE}') from None
    _end_in_one_line(f'{LOST} {SAYS_MORE}')
    for number in signals.numbers():  # jax has taken SIGTERM for itself
        if callable(handler := signal.getsignal(number)):
            signal.signal(number, handler)


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
        more = f' (and {len(found) - 5} more)' if len(found) > 5 else ''
        message = f'{"; ".join(found[:5])}{more}; start all processes with the same command and versions'
        # Process 0 keeps the values: it leaves when the others have read them. One of these may lose it before it has
        # come to raise this itself.
        _end_in_one_line(message)
        client.key_value_set(f'gpt_jax/read/{call}/{index}', '')
        for number in range(1, jax.process_count() if index == 0 else 1):
            _wait_for_value(client, f'gpt_jax/read/{call}/{number}')
        raise InputError(message)


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


_on_abort = None  # kept: the system has its address


def _end_in_one_line(message: str) -> None:
    """Has jaxlib's abort, its only answer to a lost process, end this one with a line and status 1.

    Python's own handlers are of no use: they run when the signal's returns, and the process has ended by then.
    """
    global _on_abort  # noqa: PLW0603
    if sys.platform == 'win32':
        return
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _end(message))
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    _on_abort = handler


_ending = threading.Lock()  # never released: of two threads that end the process one has the word


def _end(message: str) -> None:
    _ending.acquire()
    signals.warn(f'error: {message}\n')
    os._exit(1)
