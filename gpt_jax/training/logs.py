"""What a run tells while it goes: metrics.jsonl, TensorBoard, samples.txt, its lines or bar, and loss.png at its end.

Only the first of several processes writes and prints.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import tensorboardX
from matplotlib.figure import Figure
from tqdm import tqdm

from gpt_jax.files import appending, replacing
from gpt_jax.models import GPTConfig
from gpt_jax.models.config import training_flops_per_token
from gpt_jax.parallel.devices import DEVICES

# In place of the last step to keep in a log: a run without a checkpoint starts anew, and writes of step 0 again.
NOTHING = -1


def model_flops_utilisation(config: GPTConfig, tokens_per_second: float) -> float | None:
    """Share of all devices' peak that the model's arithmetic takes; None where the peak is not known."""
    device = DEVICES.get(jax.devices()[0].device_kind)
    if device is None:
        return None
    return tokens_per_second * training_flops_per_token(config) / (device.peak_flops * jax.device_count())


class Throughput:
    """Tokens per second between rows, and how long the loop waited for its batches.

    Time spent on evaluation, previews and checkpoints is left out: it is not training's.
    """

    def __init__(self):
        self._started, self._step, self._waited = time.perf_counter(), 0, 0.0

    def start(self, step: int) -> None:
        """Counts from here, `step` steps being done."""
        self._started, self._step = time.perf_counter(), step

    def waited(self, seconds: float) -> None:
        """Counts a wait for a batch."""
        self._waited += seconds

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Time spent inside is not training's."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def lap(self, step: int, tokens_per_step: int) -> tuple[float, float]:
        """Since the last lap or start, which this ends: tokens per second, and milliseconds waited for batches."""
        now = time.perf_counter()
        rate = (step - self._step) * tokens_per_step / max(now - self._started, 1e-9)
        waited_ms = 1000 * self._waited
        self._started, self._step, self._waited = now, step, 0.0
        return rate, waited_ms


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
        with replacing(self.path) as file:
            file.write(''.join(json.dumps(row) + '\n' for row in rows).encode())
        if (workdir / 'tensorboard').is_symlink():
            (workdir / 'tensorboard').unlink()  # what it leads to is not the run's to remove or to fill
        shutil.rmtree(workdir / 'tensorboard', ignore_errors=True)
        self._tensorboard = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))
        for row in rows:
            self._to_tensorboard(row)
        self._file = appending(self.path)
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


class SampleLog:
    """samples.txt: a heading a step, previews indented below it; cut back to `last_step` on opening.

    Text is indented so that nothing a model writes can look like a heading.
    """

    def __init__(self, workdir: pathlib.Path, last_step: int):
        self._path = workdir / 'samples.txt'
        if self._path.exists():
            kept, keep = [], True
            for line in self._path.read_text(encoding='utf-8').splitlines(keepends=True):
                if not line.startswith(' '):  # a heading, or what a crash left of one
                    keep = line.endswith('\n') and int(line.split()[1]) <= last_step
                if keep:
                    kept.append(line)
            with replacing(self._path) as file:
                file.write(''.join(kept).encode())
        elif self._path.is_symlink():
            self._path.unlink()  # to where nothing is yet

    def write(self, step: int, previews: dict[str, Any]) -> None:
        """Adds the named previews of `step`."""
        lines = [f'step {step}']
        for name, text in previews.items():
            lines.append(f'  {name}:')
            lines += [f'    | {line}' for line in str(text).splitlines()]
        with appending(self._path) as file:
            file.write('\n'.join(lines) + '\n')


class Progress:
    """The progress of steps `start`..`total`, a bar in a terminal and plain lines elsewhere; silent without `show`."""

    def __init__(self, start: int, total: int, show: bool):
        self._start, self._total, self._show = start, total, show
        self._began = time.perf_counter()
        interactive = show and sys.stderr.isatty()
        self._rate: dict[str, str] = {}
        self._bar = None
        if interactive:
            self._bar = tqdm(total=total, initial=start, unit='step', dynamic_ncols=True, file=sys.stderr)

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f'{loss:.3f}', lr=f'{learning_rate:.2e}', refresh=False, **self._rate)
            self._bar.update(step - self._bar.n)

    def row(self, row: dict[str, Any]) -> None:
        """Shows a logged row."""
        self._rate = {'tok/s': f'{row["tokens_per_second"]:,.0f}'}
        if self._bar is None:
            done = row['step'] - self._start
            left = (time.perf_counter() - self._began) / max(done, 1) * (self._total - row['step'])
            self.line(
                f'step {row["step"]}/{self._total}  loss {row["loss"]:.4f}  lr {row["learning_rate"]:.2e}  '
                f'{row["tokens_per_second"]:,.0f} tokens/s  {_clock(left)} left'
            )

    def line(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def plot_loss(workdir: pathlib.Path) -> None:
    """Draws metrics.jsonl as loss.png: training and validation loss over steps."""
    rows = list(read_rows(workdir / 'metrics.jsonl'))
    training = [(row['step'], row['loss']) for row in rows if 'loss' in row]
    validation = [(row['step'], row['val_loss']) for row in rows if 'val_loss' in row]
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color='tab:blue', linewidth=1, alpha=0.7, label='training')
    if validation:
        last = validation[-1][1]
        label = f'validation ({last:.3f} at the end)'
        axes.plot(*zip(*validation, strict=True), color='tab:orange', marker='o', markersize=4, label=label)
    axes.set_xlabel('step')
    axes.set_ylabel('loss, nats per token')
    # A name is no formula, may hold bytes that are no text, and letters that the font has no shape for.
    axes.set_title(workdir.name.encode(errors='replace').decode(), parse_math=False)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    with replacing(workdir / 'loss.png') as file, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from')
        figure.savefig(file, format='png', dpi=120)
