"""Which checkpoints a folder holds, and what each says of itself. Reads files only: no orbax, no device."""

import json
import math
import pathlib
from typing import Any

from gpt_jax.checkpoints import manifest

META_FILE = 'meta/metadata'  # where orbax puts the JSON item named `meta`


def finished(folder: pathlib.Path) -> list[int]:
    """The steps under `folder` that were saved to the end, in ascending order; empty where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if is_step_name(path.name) and manifest.exists(path))


def is_step_name(name: str) -> bool:
    """Whether a folder's name is a step as `save` writes it: decimal digits without leading zeros."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def read_meta(step_folder: pathlib.Path) -> dict[str, Any]:
    """The JSON dict saved with a checkpoint, after checking its own sha256.

    Raises InputError, naming the file, when it or the manifest is missing or damaged.
    """
    manifest.verify(step_folder, META_FILE.__eq__, way_out=way_out(step_folder))
    return json.loads((step_folder / META_FILE).read_bytes())


def latest_meta(folder: pathlib.Path) -> dict[str, Any] | None:
    """`read_meta` of the highest finished step under `folder`; None where there is none. Raises InputError as it."""
    there = finished(folder)
    return read_meta(folder / str(there[-1])) if there else None


def val_losses(folder: pathlib.Path) -> dict[int, float]:
    """Validation loss of every finished step that has one. Raises InputError as `read_meta`."""
    losses = {step: read_meta(folder / str(step))['val_loss'] for step in finished(folder)}
    return {step: loss for step, loss in losses.items() if loss is not None}


def finite_or_none(val_loss: float | None) -> float | None:
    """A diverged run's NaN or infinite loss counts as none at all: it can never be the best, and is not JSON."""
    return None if val_loss is None or not math.isfinite(val_loss) else float(val_loss)


def way_out(step_folder: pathlib.Path) -> str:
    """What a user can do about a damaged checkpoint, given what else lies beside it."""
    others = [step for step in finished(step_folder.parent) if str(step) != step_folder.name]
    if is_step_name(step_folder.name) and others:
        return f'remove the folder {step_folder} to go on from step {others[-1]}'
    return f'{manifest.COPY_AGAIN}, or remove the folder {step_folder} to start anew'
