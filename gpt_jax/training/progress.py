"""What a run shows while it goes: a bar in a terminal, plain lines elsewhere, and the picture at its end."""

import pathlib
import sys
import time
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from gpt_jax.training.metrics import read_rows


class Progress:
    """The progress of steps `start`..`total`; silent in all processes but the first (`show`)."""

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
    axes.set_title(workdir.name)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    figure.savefig(workdir / 'loss.png', dpi=120)
