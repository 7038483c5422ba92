"""Which checkpoints there are, what a user may name as one, and what each says of itself (its record, `meta`).

Reading never writes: it works on a read-only folder, beside a running training, and on a copied step folder alone. That
training may remove a step at any moment, when newer or better ones take its place. So a name is resolved once, all that
follows is given the `Resolved`, and `while_there` chooses anew where the step went away before it was read. It does so,
too, where the step turns out to be damaged, and says so: one good step is worth more than none.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Collection, MutableMapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax import __version__
from gpt_jax.checkpoints import committing, verifying
from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import gpt2
from gpt_jax.errors import InputError
from gpt_jax.files import as_path, cache_folder, is_address, listing, read_json, sha256
from gpt_jax.models import GPTConfig, huggingface
from gpt_jax.storage import Address, StorageError, check_reachable, local_copy

META_FILE = 'meta/metadata'  # where orbax puts the JSON item named `meta`
ITEMS = ('params', 'optimizer', 'ema', 'meta')
# Beside the items of a step that was saved before its evaluation was done, by a signal: its validation loss.
LATE_LOSS_FILE = 'val_loss.json'
META_FORMAT = 1  # raised when an older gpt_jax would misread a record; records without a `format` are of format 1
NAME_ONE = 'give a workdir, a checkpoints/STEP folder or a Hugging Face directory'
NAME_A_RUN = 'give the workdir of another run, or a checkpoints/STEP folder'
HAS_NO_OPTIMIZER = 'with no state of an optimizer to go on with: start from it with train.init_from'
TRIES = 5

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Resolved:
    """One checkpoint on disk.

    Attributes:
      folder: its step folder, or the Hugging Face directory; absolute.
      step: 0 for a Hugging Face directory.
      workdir: the workdir around it, where there is one.
      chosen_from: the folder of which it is the best or the latest step; None where the user named the step itself.
      weights: which are read of it: 'raw', or 'ema', their average (`optimizer.ema_decay`).
      asked_with: the flag or key that says which, for messages.
    """

    folder: pathlib.Path
    step: int
    workdir: pathlib.Path | None
    chosen_from: pathlib.Path | None = dataclasses.field(default=None, compare=False)
    weights: str = 'raw'
    asked_with: str = dataclasses.field(default='--weights', compare=False)

    @property
    def huggingface(self) -> bool:
        """Whether it is a Hugging Face directory."""
        if is_address(self.folder):
            return False  # `resolve` has fetched such a one
        return not verifying.exists(self.folder) and huggingface.is_directory(self.folder)


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedWeights:
    """Weights that a run may start from, found and described, but not read yet: `load(weights.found)` reads them.

    Attributes:
      path: as the user named them.
      found: where they are; None where a run was already begun with them.
      model: their architecture.
      tokenizer: the one they belong to.
      meta: the record of the run that they are the state of, where all of it is to be taken (`find_run`), else None.
    """

    path: str
    found: Resolved | None
    model: GPTConfig
    tokenizer: Tokenizer
    meta: dict[str, Any] | None = None


def resolve(
    path: str | os.PathLike, step: int | None = None, weights: str = 'raw', asked_with: str = '--weights'
) -> Resolved:
    """Find the checkpoint that `path` names.

    That is a workdir, its `checkpoints` folder, a step folder anywhere, or a Hugging Face directory.

    Of several steps, the one of the lowest validation loss is taken, where any has one, else the latest; `step` names
    another. Steps whose record is damaged are left out, with a warning. `weights` are 'raw', or 'ema': the average that
    a run with `optimizer.ema_decay` keeps; `asked_with` is the flag or key that said which, for messages. Raises
    InputError when the path does not exist, is an address, holds no good checkpoint, or lacks that step or these
    weights.
    """
    found = _resolve(path, step)
    if weights != 'raw':
        found = dataclasses.replace(found, weights=weights, asked_with=asked_with)
        check_weights(found)
    return found


def check_weights(found: Resolved) -> None:
    """Raises InputError where a checkpoint does not have the weights that are to be read of it."""
    if found.weights != 'raw' and not (found.folder / found.weights).is_dir():
        raise InputError(
            f'{found.folder} holds no average of its parameters (a run keeps one with optimizer.ema_decay): '
            f'leave {found.asked_with}={found.weights} out, or name another step'
        )


def _resolve(path: str | os.PathLike, step: int | None) -> Resolved:
    given, path = path, _absolute(path)
    if is_address(path) and not verifying.exists(path) and _is_huggingface(path):
        path = _fetched(path, given, lambda name: '/' not in name)
    if _is_step_folder(path):
        own_step = read_step_meta(path)['step']
        if step not in (None, own_step):
            raise InputError(f'checkpoint {given} is step {own_step}, not {step}: give its workdir to choose a step')
        return _readable(Resolved(path, own_step, _workdir(path.parent)), given)
    if not is_address(path) and huggingface.is_directory(path):
        if step is not None:
            raise InputError(f'checkpoint {given} is a Hugging Face directory, which has no steps: leave --step out')
        return Resolved(path, 0, None)
    folder = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
    if step is None:
        chosen, damaged = _choose(folder, given)
        for problem in damaged:
            _warn(f'{problem.what}; step {chosen.step} is used instead')
        return _readable(chosen, given)
    steps = step_names(folder)
    if step not in steps:
        available = ', '.join(map(str, steps)) or 'none'
        raise InputError(f'{given} has no checkpoint of step {step}: it has {available}')
    return _readable(Resolved(folder / str(step), step, _workdir(folder)), given)


def _readable(found: Resolved, given: str | os.PathLike) -> Resolved:
    """Where orbax can read the step: there, or from a local copy if it does not know the store."""
    if not is_address(found.folder) or found.folder.scheme == 'gs':
        return found
    folder = _fetched(found.folder, given, lambda name: not name.startswith('optimizer/'))
    return Resolved(folder, found.step, None)


def _choose(
    folder: pathlib.Path, given: str | os.PathLike, without: Collection[int] = ()
) -> tuple[Resolved, list[verifying.DamagedError]]:
    """The best step of `folder`, else the latest, and what is wrong with records of others; none of `without`.

    Raises:
      InputError: there is no good one; `given` names the folder in the message.
    """
    # Again: between listing the folder and looking at a step, a training may have put another in its place.
    for _ in range(TRIES):
        losses, damaged = {}, []
        for step in step_names(folder):
            if step in without:
                continue
            try:
                losses[step] = read_step_meta(folder / str(step))['val_loss']
            except verifying.DamagedError as error:
                if _is_there(folder / str(step)):
                    damaged.append(error)
        if losses:
            measured = {step: loss for step, loss in losses.items() if loss is not None}
            step = min(measured, key=measured.get) if measured else max(losses)
            return Resolved(folder / str(step), step, _workdir(folder), chosen_from=folder), damaged
        if damaged:
            raise InputError(f'{given} holds no good checkpoint: {damaged[-1].what}; {verifying.COPY_AGAIN}')
    raise InputError(f'{given} holds no finished checkpoint: {NAME_ONE}')


def while_there(found: Resolved, read: Callable[[Resolved], T]) -> T:
    """`read(found)`; where the training beside it removed that step, or it is damaged, of the step that is chosen then.

    Raises what `read` raises, and InputError where the step is gone and the user named that step and no other.
    """
    tries, damaged = TRIES, {}
    while tries:
        try:
            return read(found)
        except Exception as error:
            # `Checkpoints` names a step when all its files are there, and renames it before they go: it is there as a
            # whole or not at all. Several processes would each choose for themselves: they give up together instead.
            there, folder = _is_there(found.folder), found.chosen_from
            if jax.process_count() > 1 or (there and not (folder and isinstance(error, verifying.DamagedError))):
                raise
            problem = error
        if folder is None:
            break
        if there:
            damaged[found.step] = problem
        else:
            tries -= 1
        try:
            found = dataclasses.replace(
                _choose(folder, folder, damaged)[0], weights=found.weights, asked_with=found.asked_with
            )
        except InputError:
            if not damaged:
                raise
            what = damaged[max(damaged)].what
            raise InputError(f'{folder} holds no good checkpoint: {what}; {verifying.COPY_AGAIN}') from None
        if there:
            _warn(f'{problem.what}; step {found.step} is used instead')
    raise InputError(
        f'{found.folder} was removed while it was read: the training there keeps its newest and best steps; '
        'name another step, or let it keep more (checkpoint.keep_latest)'
    )


def find_weights(path: str | os.PathLike, weights: str = 'raw', asked_with: str = '--weights') -> PretrainedWeights:
    """The weights that `path` names, as `resolve` finds them, with architecture and tokenizer; no array is read.

    In a run of several processes every process makes this call, and all are given the step that process 0 chose.
    Raises InputError as `resolve` and `read_meta`, and `read_model_config`.
    """
    found = resolve(path, None, weights, asked_with)
    if jax.distributed.is_initialized() and found.chosen_from is not None:
        found = resolve(path, int(multihost_utils.broadcast_one_to_all(np.int32(found.step))), weights, asked_with)

    def describe(found: Resolved) -> PretrainedWeights:
        meta = read_meta(found)
        return PretrainedWeights(
            str(path), found, read_model_config(meta, found.folder), Tokenizer.from_json(meta['tokenizer'])
        )

    return while_there(found, describe)


def find_run(path: str | os.PathLike, verify: bool = True) -> PretrainedWeights:
    """The checkpoint of another run that a new one goes on from, with its record; no array is read.

    Of a workdir that is the newest step, not the best: the state of a run is where it has come to. Newer ones that are
    damaged are left out, with a warning, and left as they are.

    Args:
      path: a workdir, its `checkpoints` folder, or a step folder anywhere.
      verify: whether every byte of it is held against its sha256; else the record alone. In a run of several processes
        every process then makes this call: each verifies a share, and all are given the same step.

    Raises:
      InputError: nothing is there, it is damaged, of a newer gpt_jax, or has no optimizer to go on with.
    """
    problem = None
    try:
        place, is_step = _place_of_run(path)
    except InputError as error:
        problem = error
    if verify:
        verifying.raise_together(problem, lambda process: InputError(f'see the message of process {process}'))
    elif problem is not None:
        raise problem

    def read(step_folder: pathlib.Path) -> dict[str, Any]:
        if verify:
            verifying.verify_together(step_folder)
        return read_step_meta(step_folder)

    if is_step:
        try:
            return _described(path, place, read(place), None)
        except verifying.DamagedError as error:
            raise InputError(f'{error.what}: name another step of that run, or {verifying.COPY_AGAIN}') from None
    damaged = {}
    # Again: a training there may put others in the place of all steps that were listed.
    for _ in range(TRIES):
        steps = iter(sorted(step_names(place), reverse=True))
        while (step := agreed(next(steps, None)) if verify else next(steps, None)) is not None:
            try:
                meta = read(place / str(step))
            except verifying.DamagedError as error:
                if _is_there(place / str(step)):
                    damaged[step] = error.what
                continue
            for what in damaged.values():
                _warn(f'{what}; step {step} is used instead')
            return _described(path, place / str(step), meta, place)
        if damaged:
            raise InputError(f'{path} holds no good checkpoint: {damaged[max(damaged)]}; {verifying.COPY_AGAIN}')
    raise InputError(f'{path} holds no finished checkpoint: {NAME_A_RUN}')


def _place_of_run(path: str | os.PathLike) -> tuple[pathlib.Path, bool]:
    """The step folder that `path` is, and True; or the folder of steps that it has, and False.

    Raises:
      InputError: it does not exist, or is a Hugging Face directory.
    """
    place = _absolute(path, NAME_A_RUN)
    if _is_step_folder(place):
        return place, True
    if _is_huggingface(place) if is_address(place) else huggingface.is_directory(place):
        raise InputError(f'{path} is a Hugging Face directory, {HAS_NO_OPTIMIZER}')
    return (place / 'checkpoints' if (place / 'checkpoints').is_dir() else place), False


def _described(
    path: str | os.PathLike, place: pathlib.Path, meta: dict[str, Any], chosen_from: pathlib.Path | None
) -> PretrainedWeights:
    if not (place / 'optimizer').is_dir() or 'lengths' not in meta:
        raise InputError(f'{place} has parameters alone, {HAS_NO_OPTIMIZER}')
    model, tokenizer = read_model_config(meta, place), Tokenizer.from_json(meta['tokenizer'])
    if is_address(place) and place.scheme != 'gs':
        place, chosen_from = _fetched(place, path, lambda name: True), None
    found = Resolved(place, meta['step'], _workdir(place.parent), chosen_from)
    return PretrainedWeights(str(path), found, model, tokenizer, meta)


def agreed(step: int | None) -> int | None:
    """What process 0 has: others may see a shared folder late."""
    if jax.process_count() == 1:
        return step
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if step < 0 else step


def fingerprint(found: Any) -> str:
    """A hex sha256: of a checkpoint's manifest, which has that of every file, or of a directory's safetensors.

    `found` is a `Resolved`, or the `Loaded` that was read from it.
    """
    own = found.folder / verifying.NAME
    files = [own] if own.is_file() else sorted(found.folder.glob('*.safetensors'))
    digest = hashlib.sha256()
    for path in files:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def finished_steps(folder: pathlib.Path) -> list[int]:
    """The steps under `folder` that have their manifest, in ascending order; empty where there is no such folder."""
    # What is in a bucket costs a request over the network: one with a manifest is a checkpoint, and counts.
    steps = map(int, _numbers(folder)) if is_address(folder) else step_names(folder)
    return sorted(step for step in steps if verifying.exists(folder / str(step)))


def step_names(folder: pathlib.Path) -> list[int]:
    """The steps under `folder` by the names of their folders alone, damaged or not, in ascending order."""
    paths = (folder / name for name in _numbers(folder))
    return sorted(int(path.name) for path in paths if is_checkpoint(path) and committing.counts(path))


def _numbers(folder: pathlib.Path) -> list[str]:
    """What in `folder` has the name of a step."""
    try:
        return [path.name for path in folder.iterdir() if is_step_name(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f'{folder} cannot be read ({error.strerror})') from None


def is_step_name(name: str) -> bool:
    """Whether a folder's name is a step as `save` writes it: decimal digits without leading zeros."""
    # No run is so long; and Python refuses to read a number of thousands of digits.
    return len(name) < 19 and name.isascii() and name.isdigit() and str(int(name)) == name


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether `path` is a checkpoint or the remains of one: an empty folder, or one with something of a save."""
    try:
        names = {entry.name for entry in path.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        if is_address(path):
            raise
        return False
    return not names or not names.isdisjoint({verifying.NAME, '_CHECKPOINT_METADATA', *ITEMS})


def val_losses(
    folder: pathlib.Path, steps: Collection[int], known: MutableMapping[int, float | None]
) -> dict[int, float]:
    """Validation loss of each of these finished steps that has one; a step whose record is damaged has none.

    Those in `known`, None where a step has none, are not read again; those that are read are added to it.
    """
    for step in steps:
        if step not in known:
            with contextlib.suppress(verifying.DamagedError):  # or the training removed it since it was listed
                known[step] = read_step_meta(folder / str(step))['val_loss']
    return {step: loss for step in steps if (loss := known.get(step)) is not None}


def read_meta(found: Resolved) -> dict[str, Any]:
    """What a checkpoint says of itself: `Loaded.meta`, without its parameters. Raises InputError as `load`."""
    return describe_huggingface(found.folder) if found.huggingface else read_step_meta(found.folder)


def read_step_meta(step_folder: pathlib.Path) -> dict[str, Any]:
    """The JSON dict saved with a checkpoint, after checking its own sha256.

    Raises DamagedError, naming the file, when it or the manifest is missing or damaged, and InputError when a newer
    gpt_jax wrote it.
    """
    verifying.verify(step_folder, META_FILE.__eq__, way_out=lambda: way_out(step_folder))
    try:
        meta = json.loads((step_folder / META_FILE).read_bytes())
    except StorageError:
        raise
    except OSError as error:
        raise verifying.DamagedError(
            f'{step_folder / META_FILE} cannot be read ({error.strerror})', way_out(step_folder)
        ) from None
    written = meta.get('format', 1)
    if not isinstance(written, int) or written > META_FORMAT:
        raise InputError(f'{step_folder}: format={written!r} of its record is unknown; {_update(meta)}')
    if meta.get('val_loss') is None and (late := _late_loss(step_folder)) is not None:
        meta['val_loss'] = late
    return meta


def _late_loss(step_folder: pathlib.Path) -> float | None:
    """What `Checkpoints.record_loss` has written; None where it has not, or the file is damaged."""
    path = step_folder / LATE_LOSS_FILE
    try:
        loss = read_json(path)['val_loss'] if path.is_file() else None
    except StorageError:
        raise
    except (InputError, KeyError, TypeError):  # a loss is no more than what tells the best of several steps
        return None
    return loss if isinstance(loss, float) else None


def read_model_config(meta: dict[str, Any], where: str | os.PathLike = 'the checkpoint') -> GPTConfig:
    """The architecture in a record that this or an older gpt_jax wrote.

    A key that it lacks did not exist yet: the default of GPTConfig is what the model did without it.

    Args:
      meta: the record, of which `model` is read, and `versions` for the message.
      where: names it in errors.

    Raises:
      InputError: in one line, for a key that only a newer gpt_jax knows, or a description that makes no model.
    """
    described = meta.get('model')
    if not isinstance(described, dict):
        raise InputError(f'{where} does not describe a model; was it saved by gpt_jax.main? {NAME_ONE}')
    fields = {field.name: field for field in dataclasses.fields(GPTConfig)}
    for key, value in described.items():
        if key not in fields:
            raise InputError(f'{where}: model.{key}={value!r} is unknown; {_update(meta)}')
    for name, field in fields.items():
        if name not in described and field.default is dataclasses.MISSING:
            raise InputError(f'{where}: model.{name} is missing from its record; {verifying.COPY_AGAIN}')
    try:
        return GPTConfig(**described)
    except InputError as error:
        raise InputError(f'{where}: {error}') from None


def describe_save(step: int, val_loss: float | None = None) -> dict[str, Any]:
    """What every record says of its saving: `format`, `step`, `val_loss` and `versions`.

    A diverged run's NaN or infinite loss becomes None: it can never be the best, and is not JSON.
    """
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        'format': META_FORMAT,
        'step': int(step),
        'val_loss': None if val_loss is None or not math.isfinite(val_loss) else float(val_loss),
        'versions': {'gpt_jax': __version__, 'python': platform.python_version(), **versions},
    }


def describe_huggingface(folder: pathlib.Path) -> dict[str, Any]:
    """A Hugging Face directory's `model`, `tokenizer`, its fingerprint, and `token_ids`: as a checkpoint's record.

    Raises InputError, naming the file, where config.json cannot be used, or there is no tokenizer for its vocabulary.
    """
    config = huggingface.read_config(folder)

    def has(*names: str) -> bool:
        return any((folder / name).is_file() for name in names)

    if not has('tokenizer.json') and not (has('vocab.json', 'encoder.json') and has('merges.txt', 'vocab.bpe')):
        raise InputError(
            f'{folder} has no tokenizer; put tokenizer.json there, or vocab.json with merges.txt, from where the '
            'weights came'
        )
    tokenizer = gpt2(folder, config.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f'{folder}: the tokenizer has {tokenizer.vocab_size} tokens and vocab_size={config.vocab_size} in '
            "config.json has no room for them; put the model's own tokenizer there"
        )
    return {
        'model': dataclasses.asdict(config),
        'tokenizer': tokenizer.to_json(),
        'tokenizer_fingerprint': tokenizer.fingerprint,
        'token_ids': huggingface.read_token_ids(folder),
    }


def way_out(step_folder: pathlib.Path) -> str:
    """What a user can do about a damaged checkpoint, given what else lies beside it."""
    others = [step for step in finished_steps(step_folder.parent) if str(step) != step_folder.name]
    if is_step_name(step_folder.name) and others:
        return f'remove the folder {step_folder} to go on from step {others[-1]}'
    return f'{verifying.COPY_AGAIN}, or remove the folder {step_folder} to start anew'


def _update(meta: dict[str, Any]) -> str:
    writer = meta.get('versions', {}).get('gpt_jax', 'of an unknown version')
    return f'it was written by gpt_jax {writer}, this is {__version__}: update gpt_jax'


def _absolute(path: str | os.PathLike, way_out: str = NAME_ONE) -> pathlib.Path:
    """Where `path` is, through its links. Raises InputError, with `way_out`, where nothing is, or it can be no path."""
    place = as_path(path, f'checkpoint {path}')
    if is_address(place):
        check_reachable(place, f'checkpoint {path}')
        if not place.exists():
            raise InputError(f'checkpoint {path} does not exist: {way_out}')
        return place
    if not os.fspath(path):
        raise InputError(f'the name of the checkpoint is empty: {way_out}')
    try:
        absolute = pathlib.Path(path).expanduser().resolve()
        absolute.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f'checkpoint {path} does not exist: {way_out}') from None
    except OSError as error:  # links in a loop, a name too long, no permission
        raise InputError(f'checkpoint {path} cannot be read ({error.strerror}): {way_out}') from None
    except (ValueError, RuntimeError) as error:  # a NUL in the name; Python before 3.13 on links in a loop
        raise InputError(f'checkpoint {path} cannot be read ({error}): {way_out}') from None
    return absolute


def _fetched(folder: Address, given: str | os.PathLike, wanted: Callable[[str], bool]) -> pathlib.Path:
    """A local copy of a folder's objects, for readers that take files alone."""
    try:
        return local_copy(folder, filter(wanted, listing(folder)), cache_folder('objects'))
    except OSError as error:
        raise InputError(f'checkpoint {given} cannot be fetched ({error.strerror or error})') from None


def _is_huggingface(folder: Address) -> bool:
    """`huggingface.is_directory`, of objects."""
    try:
        names = {entry.name for entry in folder.iterdir()}
        if not names.isdisjoint({huggingface.SINGLE, huggingface.INDEX, *huggingface.PICKLED}):
            return True
        document = read_json(folder / 'config.json') if 'config.json' in names else None
    except (InputError, OSError) as error:
        if isinstance(error, StorageError):
            raise
        return False
    return isinstance(document, dict) and 'model_type' in document


def _is_there(step_folder: pathlib.Path) -> bool:
    return step_folder.exists() and committing.counts(step_folder)


def _is_step_folder(path: pathlib.Path) -> bool:
    """Whether `path` is a single checkpoint, be it damaged, and not a folder with several."""
    if is_address(path):
        return verifying.exists(path) or (path / '_CHECKPOINT_METADATA').is_file()
    return verifying.exists(path) or ((path / '_CHECKPOINT_METADATA').is_file() and not huggingface.is_directory(path))


def _warn(line: str) -> None:
    if jax.process_index() == 0 and sys.stderr is not None:
        print(f'warning: {line}', file=sys.stderr, flush=True)


def _workdir(folder: pathlib.Path) -> pathlib.Path | None:
    return folder.parent if folder.name == 'checkpoints' else None
