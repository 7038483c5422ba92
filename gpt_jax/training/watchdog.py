"""Says where a run hangs: a lost device or network makes no error, it only never answers."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import Self

from gpt_jax import signals


class Watchdog:
    """A thread that complains, on standard error, where the run has been at one thing for too long.

    It names what that is and the last step that was finished, and shows what each thread of Python is at: most often
    one waits for a device. With `ends` it then ends the process, with status 1: where several wait for each other that
    is what lets the rest of them end, and whatever started them start them again.
    """

    def __init__(self, seconds: float, ends: bool = False):
        """Waits `seconds`, 0: for ever."""
        self._seconds, self._ends = seconds, ends
        self._doing, self._step, self._since = 'starting', 0, time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def at(self, doing: str) -> None:
        """The run begins something else, such as 'evaluation'."""
        self._doing, self._since = doing, time.monotonic()

    def finished(self, step: int) -> None:
        """A step's result is there."""
        self._step = step
        self.at('a step')

    def _watch(self) -> None:
        while not self._done.wait(max(0.0, self._since + self._seconds - time.monotonic())):
            passed = time.monotonic() - self._since
            if passed < self._seconds:
                continue
            ends = '; ending' if self._ends else ''
            signals.warn(
                f'\nno progress for {passed:.0f} s (train.hang_seconds): the run is at {self._doing}, and its last '
                f'finished step is {self._step}{ends}. What its threads are at:\n'
            )
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a standard error that is no file
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            if self._ends:
                os._exit(1)
            self._since = time.monotonic()  # and again as long after
