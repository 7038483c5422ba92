"""What a user may name as a checkpoint, and loading the parameters of what was named.

Reading never writes: it works on a read-only folder, beside a running training, and on a copied step folder alone.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from gpt_jax.checkpoints import foreign, manifest, steps, trees
from gpt_jax.errors import InputError
from gpt_jax.files import sha256
from gpt_jax.models import huggingface

NAME_ONE = 'give a workdir, a checkpoints/STEP folder or a Hugging Face directory'


@dataclasses.dataclass(frozen=True)
class Resolved:
    """One checkpoint on disk.

    Attributes:
      folder: its step folder, or the Hugging Face directory; absolute.
      step: 0 for a Hugging Face directory.
      workdir: the workdir around it, where there is one.
    """

    folder: pathlib.Path
    step: int
    workdir: pathlib.Path | None

    @property
    def huggingface(self) -> bool:
        """Whether it is a Hugging Face directory."""
        return not manifest.exists(self.folder)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """One checkpoint's parameters (nested dicts of jax arrays), its `meta`, its step and its folder.

    `meta` has `model` (the fields of GPTConfig), `tokenizer` (the text of a tokenizer.json) and
    `tokenizer_fingerprint`. What training saved has the experiment besides, under `config`.
    """

    params: Any
    meta: dict[str, Any]
    step: int
    folder: pathlib.Path


def resolve(path: str | os.PathLike, step: int | None = None) -> Resolved:
    """Find the checkpoint that `path` names.

    That is a workdir, its `checkpoints` folder, a step folder anywhere, or a Hugging Face directory.

    Of several steps, the one of the lowest validation loss is taken, where any has one, else the latest; `step` names
    another. Raises InputError when the path does not exist, holds no finished checkpoint, or lacks that step.
    """
    given, path = path, pathlib.Path(path).expanduser().resolve()
    if not path.exists():
        raise InputError(f'checkpoint {given} does not exist: {NAME_ONE}')
    if manifest.exists(path):
        own_step = steps.read_meta(path)['step']
        if step not in (None, own_step):
            raise InputError(f'checkpoint {given} is step {own_step}, not {step}: give its workdir to choose a step')
        return Resolved(path, own_step, _workdir(path.parent))
    if huggingface.is_directory(path):
        if step is not None:
            raise InputError(f'checkpoint {given} is a Hugging Face directory, which has no steps: leave --step out')
        return Resolved(path, 0, None)
    folder = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
    finished = steps.finished(folder)
    if not finished:
        raise InputError(f'{given} holds no finished checkpoint: {NAME_ONE}')
    if step is None:
        losses = steps.val_losses(folder)
        step = min(losses, key=losses.get) if losses else finished[-1]
    elif step not in finished:
        raise InputError(f'{given} has no checkpoint of step {step}: it has {", ".join(map(str, finished))}')
    return Resolved(folder / str(step), step, _workdir(folder))


def read_meta(found: Resolved) -> dict[str, Any]:
    """What a checkpoint says of itself: `Loaded.meta`, without its parameters. Raises InputError as `load`."""
    return foreign.read_meta(found.folder) if found.huggingface else steps.read_meta(found.folder)


def fingerprint(found: Resolved) -> str:
    """A hex sha256: of a checkpoint's manifest, which has that of every file, or of a directory's safetensors."""
    files = sorted(found.folder.glob('*.safetensors')) if found.huggingface else [found.folder / manifest.NAME]
    digest = hashlib.sha256()
    for path in files:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def load(
    path: str | os.PathLike,
    step: int | None = None,
    sharding: jax.sharding.Sharding | Callable[[Any], Any] | None = None,
) -> Loaded:
    """Load the parameters of the checkpoint that `path` (and `step`) name, as `resolve` finds it; not the optimizer.

    The tree is the checkpoint's own, whatever devices it was saved from. Arrays go to the default device, or where
    `sharding` says: one sharding for all, or a function from the abstract tree (jax.ShapeDtypeStruct) to a tree of
    shardings. Raises InputError as `resolve`, and when a file is missing or damaged.
    """
    found = resolve(path, step)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(trees.default_device())
    if found.huggingface:
        meta = read_meta(found)
        return Loaded(foreign.read_params(found.folder, sharding), meta, found.step, found.folder)
    manifest.verify(found.folder, lambda name: not name.startswith('optimizer/'), way_out=steps.way_out(found.folder))
    abstract = trees.stored(found.folder, 'params')
    shardings = sharding(abstract) if callable(sharding) else jax.tree.map(lambda _: sharding, abstract)
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
    )
    params = trees.read(found.folder, params=placed)['params']
    return Loaded(params, steps.read_meta(found.folder), found.step, found.folder)


def _workdir(folder: pathlib.Path) -> pathlib.Path | None:
    return folder.parent if folder.name == 'checkpoints' else None
