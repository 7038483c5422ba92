"""Ctrl-C, SIGTERM and SIGHUP, from the first moment of a verb on: each ends it with 128 + its number.

    until `gpt_jax.cli.run`   imports alone are under way: the process ends where it is (`end_at_once`)
    in `gpt_jax.cli.run`      an exception unwinds it, so that locks and temporary folders go (`unwinding`)
    while steps are taken     the step is finished and saved (`gpt_jax.training.stopping`)

An exception from a handler is lost where Python happens to be in a callback of the garbage collector (jax has one) or
in a `__del__`: Python reports it as ignored and goes on. So a signal is noted as well. Where it was lost that way it is
given once more; where a library caught it, the next `check` raises it. While a module is imported it waits for the end.
"""

import _thread
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

IMPORT_SECONDS = 10.0  # that a signal waits for an import: far more than any takes


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. Where plain KeyboardInterrupt ends an `exec`, Python remembers, and kills itself when all is done."""


class _State:
    """Of the process: signals belong to it as a whole."""

    noted: int | None = None
    began = 0.0
    unwinding = False


def numbers() -> list[int]:
    """The signals that end a verb. SIGHUP is left ignored where it is (nohup); Windows has none."""
    found = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, 'SIGHUP', None)
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        found.append(hang_up)
    return found


def end_at_once() -> None:
    """Has a signal end the process from now on, wherever it is."""
    for number in numbers():
        signal.signal(number, _end)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """For the length of a block a signal raises: SIGINT Interrupted, the others SystemExit."""
    _State.noted, _State.unwinding = None, True
    previous = {number: signal.signal(number, _raise) for number in numbers()}
    hook, sys.unraisablehook = sys.unraisablehook, _again
    try:
        yield
    finally:
        _State.unwinding = False
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


def noted() -> int | None:
    """The signal that `unwinding` has raised for last, or None."""
    return _State.noted


def check() -> None:
    """Raises again, within `unwinding`, for a signal whose exception was lost on the way."""
    if _State.unwinding and _State.noted is not None:
        _raise(_State.noted, None)


def warn(text: str) -> None:
    """Writes to standard error from a handler: not by print, which may be what was interrupted."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, text.encode())


def _end(number: int, _: FrameType | None) -> None:
    warn(f'\n{signal.Signals(number).name}: ended; nothing was in progress that needed saving\n')
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    if _State.noted is None:
        _State.began = time.monotonic()
    _State.noted = number
    if _importing(frame) and time.monotonic() - _State.began < IMPORT_SECONDS:
        # jaxlib calls Python while it is imported, and aborts where that raises: given again until it is done.
        _thread.start_new_thread(_give, (number,))
        return
    if number == signal.SIGINT:
        raise Interrupted
    raise SystemExit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == '<frozen importlib._bootstrap>':
            return True
        frame = frame.f_back
    return False


def _again(unraisable: Any) -> None:
    """In place of Python's report on an exception that nobody can catch: for one of a signal, the signal once more."""
    if _State.noted is None or not issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(unraisable)
        return
    # Not here, where it would be lost as well. Not by threading.Thread: its locks may be held by what was interrupted.
    _thread.start_new_thread(_give, (_State.noted,))


def _give(number: int) -> None:
    time.sleep(0.05)
    if _State.unwinding:
        signal.raise_signal(number)
