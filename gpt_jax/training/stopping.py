"""Ctrl-C, SIGTERM and SIGHUP during training: finish the step, save, leave."""

import os
import signal
import threading
from types import FrameType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax import signals


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted instead of ending the process; a second one ends it at once.

    Only the main thread may take signals; elsewhere (some notebooks) nothing is changed. jax and orbax handle SIGTERM
    where jax.distributed is initialised, and then alone, so one process needs this handler of its own.

    Attributes:
      signal: the number of the signal received, or None.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in signals.numbers():
                self._previous[number] = signal.signal(number, self._note)
            try:
                signals.check()  # one that came while the run started, and was lost
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal is not None:
            signals.warn(f'\n{name} again: stopping at once, nothing more is saved\n')
            os._exit(128 + number)
        self.signal = number
        signals.warn(f'\n{name}: saving after this step (once more: stop at once)\n')

    def agreed(self) -> int | None:
        """The signal that any process received; called by all of them at the same step."""
        if jax.process_count() == 1:
            return self.signal
        highest = int(np.max(multihost_utils.process_allgather(np.array(self.signal or 0))))
        self.signal = highest or None
        return self.signal
