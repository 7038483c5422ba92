"""Services that show a run elsewhere: each is imported where `train.trackers` names it, and told every row.

TensorBoard, which writes to the workdir, is in `logs.py`. A tracker only shows a run: where it fails the run goes on.
"""

import importlib.util
import json
import pathlib
import secrets
from typing import Any, Protocol

from gpt_jax.errors import InputError
from gpt_jax.files import is_address, read_json, replacing

TENSORBOARD = 'tensorboard'


class Tracker(Protocol):
    """What is told the rows of metrics.jsonl."""

    def write(self, row: dict[str, Any]) -> None:
        """Takes a row: `step`, `time`, and numbers or None."""

    def sync(self) -> None:
        """What it was told is to last: a checkpoint is about to be saved."""

    def close(self) -> None:
        """The run has ended."""


def parse_trackers(text: str) -> list[str]:
    """The names in `train.trackers`, such as 'tensorboard,wandb'; 'none' names none.

    Raises:
      InputError: one is unknown, given twice, or not installed.
    """
    names = [] if text == 'none' else [name.strip() for name in text.split(',')]
    for name in names:
        if name not in (TENSORBOARD, *_SERVICES) or names.count(name) > 1:
            known = ', '.join((TENSORBOARD, *_SERVICES))
            raise InputError(f'train.trackers={text}: {name!r} is not one of {known}, each given once')
        if name != TENSORBOARD and importlib.util.find_spec(name) is None:
            raise InputError(f'train.trackers={text}: {name} is not installed: pip install {name}; or leave it out')
    return names


def open_tracker(name: str, workdir: pathlib.Path, config: dict[str, Any]) -> Tracker:
    """A service called `name`, which goes on with what it has of the run in `workdir`; `config` is what it shows."""
    return _Service(_SERVICES[name](workdir, config))


def _identity(workdir: pathlib.Path) -> str:
    """What a service knows the run by: the same after every restart, another one for another run of that name."""
    path = workdir / 'tracker.json'
    try:
        return str(read_json(path)['id'])
    except (InputError, KeyError, TypeError):
        identity = f'{workdir.name[:48]}-{secrets.token_hex(4)}'
        with replacing(path) as file:
            file.write(json.dumps({'id': identity}).encode())
        return identity


def in_groups(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a row as trackers name them: 'train/loss', 'validation/val_loss', 'norms/gradient/wte'."""
    numbers = {name: value for name, value in row.items() if name not in ('step', 'time') and value is not None}
    return {
        name if name.startswith('norms/') else f'{"validation" if name.startswith("val_") else "train"}/{name}': value
        for name, value in numbers.items()
    }


class _Service:
    """A run of a library that sends it on from a process or thread of its own."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, row: dict[str, Any]) -> None:
        self._run.log(in_groups(row), step=row['step'])

    def sync(self) -> None:
        pass  # it does so by itself

    def close(self) -> None:
        self._run.finish()


def _wandb(workdir: pathlib.Path, config: dict[str, Any]) -> Any:
    """Weights & Biases. Its own variables, such as WANDB_PROJECT and WANDB_MODE, are heeded."""
    import wandb

    folder = None if is_address(workdir) else str(workdir)
    return wandb.init(id=_identity(workdir), name=workdir.name, dir=folder, config=config, resume='allow')


def _trackio(workdir: pathlib.Path, config: dict[str, Any]) -> Any:
    """Trackio, which keeps its runs in a local folder or a Hugging Face space."""
    import trackio

    return trackio.init('gpt_jax', name=_identity(workdir), config=config, resume='allow', embed=False)


_SERVICES = {'wandb': _wandb, 'trackio': _trackio}
