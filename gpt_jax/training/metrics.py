"""A run's numbers: metrics.jsonl, TensorBoard beside it, and the rates that are reported."""

import contextlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import tensorboardX

from gpt_jax.models import GPTConfig
from gpt_jax.models.config import training_flops_per_token
from gpt_jax.parallel.devices import DEVICES


def model_flops_utilisation(config: GPTConfig, tokens_per_second: float) -> float | None:
    """Share of all devices' peak that the model's arithmetic takes; None where the peak is not known."""
    device = DEVICES.get(jax.devices()[0].device_kind)
    if device is None:
        return None
    return tokens_per_second * training_flops_per_token(config) / (device.peak_flops * jax.device_count())


class Throughput:
    """Tokens per second between rows, time spent elsewhere left out."""

    def __init__(self):
        self._started, self._step = time.perf_counter(), None

    def start(self, step: int) -> None:
        """Counts from here, `step` steps being done."""
        self._started, self._step = time.perf_counter(), step

    def lap(self, step: int, tokens_per_step: int) -> float:
        """Tokens per second since the last lap or start, which this ends."""
        now = time.perf_counter()
        rate = (step - self._step) * tokens_per_step / max(now - self._started, 1e-9)
        self._started, self._step = now, step
        return rate

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Time spent inside is not training's: evaluation, previews, checkpoints."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began


class Waits:
    """How long a loop waited for its batches."""

    def __init__(self):
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """Counts a wait."""
        self._seconds += seconds

    def lap(self) -> float:
        """Milliseconds waited since the last lap or the start."""
        seconds, self._seconds = self._seconds, 0.0
        return 1000 * seconds


def read_rows(path: pathlib.Path, last_step: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to `last_step`; a line torn by a crash ends them."""
    if not path.exists():
        return
    with path.open(encoding='utf-8') as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                return  # only the last line can be torn: each is written whole, in one write
            if last_step is None or row['step'] <= last_step:
                yield row


class MetricsLog:
    """Appends rows to metrics.jsonl and TensorBoard.

    On opening, both are cut back to `last_step`, so that after a resume no step stands there twice. TensorBoard's
    files cannot be cut, so they are written anew from the rows that stay.
    """

    def __init__(self, workdir: pathlib.Path, last_step: int):
        self.path = workdir / 'metrics.jsonl'
        rows = list(read_rows(self.path, last_step))
        temporary = self.path.with_suffix('.tmp')
        temporary.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
        os.replace(temporary, self.path)
        shutil.rmtree(workdir / 'tensorboard', ignore_errors=True)
        self._tensorboard = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))
        for row in rows:
            self._to_tensorboard(row)
        self._file = self.path.open('a', encoding='utf-8')
        self.evaluated = {row['step'] for row in rows if 'val_loss' in row}

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row: `step`, and any numbers; the wall-clock `time` is added to it."""
        row = row | {'time': round(time.time(), 3)}
        self._file.write(json.dumps(row) + '\n')
        self._file.flush()
        self._to_tensorboard(row)
        if 'val_loss' in row:
            self.evaluated.add(row['step'])

    def sync(self) -> None:
        """Makes sure that all rows are on disk: before the checkpoint that they lead up to."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes out what is left."""
        self._file.close()
        self._tensorboard.close()

    def _to_tensorboard(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ('step', 'time') and value is not None:
                group = 'validation' if name.startswith('val_') else 'train'
                self._tensorboard.add_scalar(f'{group}/{name}', value, row['step'], walltime=row['time'])
