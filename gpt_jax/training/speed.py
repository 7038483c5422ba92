"""How fast a run is, and what it takes: the numbers of a row that a clock or a device tells."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gpt_jax.models import GPTConfig
from gpt_jax.models.config import training_flops_per_token
from gpt_jax.parallel.devices import DEVICES, GIB

# The rest of a row of metrics.jsonl is the same whenever and wherever the same run is made.
OF_THE_CLOCK = (
    'time',
    'tokens_per_second',
    'mfu',
    'mfu_6n',
    'step_ms_median',
    'step_ms_p90',
    'step_ms_max',
    'data_wait_ms',
    'compile_seconds',
    'memory_gib',
    'peak_memory_gib',
)


class Throughput:
    """Tokens per second between rows, how long steps took, and how long the loop waited for batches and compilers.

    Time spent on evaluation, previews, checkpoints and compiling is left out of the rates: it is not training's.
    """

    def __init__(self):
        self.start()

    def start(self) -> None:
        """Counts from here."""
        self._began = self._finished = time.perf_counter()
        self._waited = self._compiled = 0.0
        self._steps: list[float] = []

    def waited(self, seconds: float) -> None:
        """Counts a wait for a batch."""
        self._waited += seconds

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Time spent inside is not training's."""
        began = time.perf_counter()
        yield
        self._leave_out(time.perf_counter() - began)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Time spent inside is the compiler's."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._compiled += seconds
        self._leave_out(seconds)

    def _leave_out(self, seconds: float) -> None:
        self._began += seconds
        self._finished += seconds

    def finished(self) -> None:
        """Counts a step, whose result is there."""
        now = time.perf_counter()
        self._steps.append(1000 * (now - self._finished))
        self._finished = now

    def lap(self, tokens: int, config: GPTConfig) -> dict[str, Any]:
        """The numbers of a row, since the last one or the start: of a `config` that has learned from `tokens` since."""
        now = time.perf_counter()
        rate = tokens / max(now - self._began, 1e-9)
        median, p90, most = np.percentile(self._steps or [0.0], [50, 90, 100]).tolist()
        row = {'tokens_per_second': rate, **model_flops_utilisation(config, rate)}
        row |= {'step_ms_median': median, 'step_ms_p90': p90, 'step_ms_max': most}
        row |= {'data_wait_ms': 1000 * self._waited, 'compile_seconds': self._compiled, **memory_in_use()}
        self.start()
        return row


def model_flops_utilisation(config: GPTConfig, tokens_per_second: float) -> dict[str, float | None]:
    """Share of all devices' peak that the model's arithmetic takes, by both conventions in use.

    `mfu` counts 6 N + 12 L D T for a token (Chowdhery et al. 2022, "PaLM", appendix B), banded layers by what they
    see; `mfu_6n` the products with parameters alone (Kaplan et al. 2020, section 2.1). N leaves position embeddings
    out. None where the peak is not known.
    """
    device = DEVICES.get(jax.devices()[0].device_kind)
    if device is None:
        return {'mfu': None, 'mfu_6n': None}
    share = tokens_per_second / (device.peak_flops * jax.device_count())
    weights = config.num_parameters - config.block_size * config.d_model
    return {'mfu': share * training_flops_per_token(config), 'mfu_6n': share * 6 * weights}


def memory_in_use() -> dict[str, float | None]:
    """Of the fullest device here, in GiB, now and at most so far; of CPU devices, the process's. None where unknown."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        now, peak = (max(one.get(name, 0) for one in stats) for name in ('bytes_in_use', 'peak_bytes_in_use'))
    else:
        now, peak = _resident()
    return {
        'memory_gib': None if now is None else now / GIB,
        'peak_memory_gib': None if peak is None else peak / GIB,
    }


def _resident() -> tuple[int | None, int | None]:
    """Bytes of host memory that this process has, and has had at most."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None, None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    try:
        with open('/proc/self/statm', encoding='ascii') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE'), most
    except OSError:  # Linux alone has it
        return None, most
