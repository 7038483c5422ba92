"""Saving while training goes on, keeping the latest and the best, and resuming from one of them.

What a kill at any moment leaves, and why it can always be resumed, is told in `committing.py`, for disks and for object
storage. A step that counts was finished, whatever is missing in it now: `recover` goes on from an older one, and sets
the damaged one aside.
orbax's own retention deletes old steps as soon as the new one is committed, when its manifest is not there yet; a kill
in between would leave nothing to resume from. So orbax keeps everything, and old steps go here, after the manifest.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gpt_jax.checkpoints import committing, verifying
from gpt_jax.checkpoints.finding import (
    LATE_LOSS_FILE,
    agreed,
    describe_save,
    finished_steps,
    is_checkpoint,
    is_step_name,
    read_step_meta,
    step_names,
    val_losses,
    way_out,
)
from gpt_jax.checkpoints.loading import check_tree, leaf_name, orbax_path, read_items
from gpt_jax.errors import InputError
from gpt_jax.files import WriteError, as_path, is_address, replacing, system_error
from gpt_jax.storage import reading_by_others

DAMAGED = 'damaged'


def recover(folder: str | os.PathLike, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The record of the checkpoint that a run in `folder` goes on from: the newest one of which every byte is right.

    Newer ones that are damaged are set aside, as `damaged-STEP`, and said; nothing is ever deleted. Only the run that
    writes to `folder` may call this, and of several processes all together.

    Returns:
      its `meta`, or None where there is no checkpoint at all.

    Raises:
      InputError: there is none but damaged ones, a newer gpt_jax wrote it, or something else has the name of a step.
    """
    link, damaged = as_path(folder).expanduser(), {}
    try:
        folder = link.resolve()
    except (OSError, RuntimeError):
        raise InputError(f'{link} is a link in a loop; remove it') from None
    verifying.raise_together(
        _in_the_way(folder, link if link.is_symlink() else None),
        lambda process: InputError(f'{folder}: see the message of process {process}'),
    )
    steps = iter(sorted(step_names(folder), reverse=True))
    while (step := agreed(next(steps, None))) is not None:
        step_folder = folder / str(step)
        try:
            verifying.verify_together(step_folder)
            meta = read_step_meta(step_folder)
        except verifying.DamagedError as error:
            damaged[step] = error
            continue
        for other, error in damaged.items():
            aside = _set_aside(folder / str(other))
            say(f'{error.what}: going on from step {step} instead; the damaged one is set aside as {aside}')
        return meta
    if damaged:
        what = damaged[max(damaged)].what
        raise InputError(
            f'{what}, and there is no good checkpoint beside it; {verifying.COPY_AGAIN}, or remove the folder {folder} '
            'to start anew'
        )
    return None


def _in_the_way(folder: pathlib.Path, link: pathlib.Path | None) -> InputError | None:
    """What to raise where something that is no checkpoint has the name of one, so that a save would fail one day.

    A `link` may lead to storage for checkpoints elsewhere. One that leads to anything else somebody may have planted.
    """
    if not committing.is_taken(folder):
        return link and InputError(f'{link} leads to {folder}, where nothing is; make that folder, or remove the link')
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        return InputError(f'{folder} cannot be used for checkpoints ({error.strerror}); move it elsewhere')
    if link is not None:
        ends = '|'.join(map(re.escape, (committing.REMOVED, committing.TEMPORARY)))
        ours = re.compile(rf'({DAMAGED}-|{committing.SAVING}_)?\d+(-\d+|({ends}).*)?')
        other = next((path.name for path in paths if not ours.fullmatch(path.name)), None)
        if other is not None:
            return InputError(f'{link} leads to {folder}, where other things are ({other}); remove the link')
    foreign = [path for path in paths if is_step_name(path.name) and not is_checkpoint(path)]
    return InputError(f'{foreign[0]} is in the way and no checkpoint: move it elsewhere') if foreign else None


def _set_aside(step_folder: pathlib.Path) -> pathlib.Path:
    """Renames a step, in process 0, to a name that no reader counts and nothing overwrites; its new place."""
    suffixes = itertools.chain([''], (f'-{number}' for number in itertools.count(2)))
    paths = (step_folder.with_name(f'{DAMAGED}-{step_folder.name}{suffix}') for suffix in suffixes)
    aside, problem = next(path for path in paths if not committing.is_taken(path)), None
    try:
        if jax.process_index() == 0:
            committing.set_aside(step_folder, aside)
    except OSError as error:
        problem = InputError(f'{step_folder} is damaged and cannot be renamed ({error.strerror}); move it elsewhere')
    verifying.raise_together(
        problem, lambda process: InputError(f'{step_folder} is damaged: see the message of process {process}')
    )
    return aside


class Checkpoints:
    """The checkpoints of one run: `folder/STEP` each, saved in the background.

    A finished step is kept while it is one of the `keep_latest` newest or of the `keep_best` lowest in validation loss
    (the earlier of two equals), or its number is a multiple of `keep_every_steps` (0: of none); the step just saved
    always stays. Nothing on disk changes before the first `save`. In a run of several processes every process makes the
    same calls, and `folder` is on storage they share.
    Raises InputError for keep_latest < 1 or keep_best < 0.
    """

    def __init__(self, folder: str | os.PathLike, keep_latest: int = 1, keep_best: int = 1, keep_every_steps: int = 0):
        if keep_latest < 1:
            raise InputError(f'keep_latest={keep_latest}: at least 1 checkpoint must be kept to resume from')
        if keep_best < 0:
            raise InputError(f'keep_best={keep_best}: give 0 or more')
        self.folder = as_path(folder).expanduser().resolve()
        self.keep_latest, self.keep_best, self.keep_every_steps = keep_latest, keep_best, keep_every_steps
        self._orbax: ocp.CheckpointManager | None = None
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._pending: concurrent.futures.Future | None = None
        self._failed = self._lost = False
        # The validation losses of steps in a bucket, where to read a record takes many requests; None where one has
        # none. Nobody else writes to the folder. Which steps there are is asked each time.
        self._losses: dict[int, float | None] = {}
        self._at_the_end = contextlib.ExitStack()

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        meta: dict[str, Any],
        val_loss: float | None = None,
        ema: Any = None,
    ) -> bool:
        """Start saving `step`; returns once the arrays may be donated, after waiting for the previous save.

        `params`, `optimizer` and `ema` (the parameters' average) are pytrees of arrays; without any (None) the latter
        two are left out. `meta` is a JSON dict; `format`, `step`, `val_loss` (None where not finite) and `versions` are
        added to it. A step that is already saved is left as it is, and False returned. A damaged checkpoint in its
        place is set aside. Raises what the previous save failed with (but for the first time in a row that object
        storage cannot be reached), TypeError for a leaf or a meta that cannot be stored, InputError where `folder/STEP`
        is something else or the disk is full or cannot be written to.
        """
        self._wait_or_go_on()
        if self._has(step):
            return False
        self._losses.pop(step, None)
        params, optimizer = _storable(params), _storable(optimizer)
        meta = {**meta, **describe_save(step, val_loss)}
        json.dumps(meta)  # a meta that is not JSON is refused here, not later in the background
        with self._told(step):
            self._start(step, params, optimizer, meta, _storable(ema))
        self._pending = self._finisher.submit(self._finish, step, meta['val_loss'])
        return True

    def _start(self, step: int, params: Any, optimizer: Any, meta: dict[str, Any], ema: Any) -> None:
        orbax = self._open()
        place = self.folder / str(step)
        if committing.is_taken(place) and committing.counts(place):
            if not is_checkpoint(place):
                raise InputError(f'{place} is in the way and no checkpoint: move it elsewhere')
            _set_aside(place)
            orbax.reload()  # it would remember a step that it has saved itself
        items = {'params': ocp.args.StandardSave(params), 'meta': ocp.args.JsonSave(meta)}
        if jax.tree.leaves(optimizer):
            items['optimizer'] = ocp.args.StandardSave(optimizer)
        if jax.tree.leaves(ema):
            items['ema'] = ocp.args.StandardSave(ema)
        if jax.process_index() == 0:
            committing.begin(self.folder, step)
        orbax.save(step, args=ocp.args.Composite(**items), force=True)

    def _wait_or_go_on(self) -> None:
        """`wait`; where object storage was out of reach, says so, and leaves it to this save to come through.

        The libraries have tried again for minutes by then. One save in a run of weeks is not worth its end; a second
        one in a row is.
        """
        try:
            self.wait()
            self._lost = False
        except InputError as error:
            if not is_address(self.folder) or self._lost:
                raise
            self._lost = True
            if jax.process_index() == 0:
                print(f'warning: {error}; the run goes on to the next save', file=sys.stderr, flush=True)
            # It would raise the same at its next save. Another one clears away what there is of the failed step.
            orbax, self._orbax = self._orbax, None
            with contextlib.suppress(Exception):  # told of already
                orbax.close()

    @contextlib.contextmanager
    def _told(self, step: int):
        """What the system refuses in the block, in one line: which step, why, and that nothing is lost."""
        try:
            with reading_by_others(self.folder / str(step)):
                yield
        except Exception as error:
            self._failed = True
            cause = system_error(error)
            if cause is None or isinstance(error, InputError):
                raise
            last = self.latest_step()
            kept = 'no checkpoint was there yet' if last is None else f'the last checkpoint, step {last}, is whole'
            way_out = f'{kept}; make room, and the same command goes on from there'
            raise WriteError(self.folder / str(step), cause, way_out) from None

    def restore(self, step: int, params: Any, optimizer: Any, verify: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        """Read a finished step back: `(params, optimizer, meta)`, whole or not at all.

        `params` and `optimizer` are the trees to fill, with a jax.ShapeDtypeStruct for every array; arrays go to its
        `sharding`, or to the default device where it has none. `verify=False` is for a step that `recover` has just
        verified. Raises InputError in one line, naming the file or the array, when the step is not there, a file is
        missing or damaged, or structure, a shape or a dtype differs.
        """
        self.wait()
        if not self._has(step):
            available = ', '.join(map(str, self.steps())) or 'none'
            raise InputError(f'{self.folder} has no checkpoint of step {step}: it has {available}')
        step_folder = self.folder / str(step)
        if verify:
            verifying.verify_together(step_folder, way_out=lambda: way_out(step_folder))
        check_tree(step_folder, 'params', params)
        check_tree(step_folder, 'optimizer', optimizer)
        meta = self.read_meta(step)
        restored = read_items(step_folder, params=params, optimizer=optimizer)
        return restored['params'], restored['optimizer'], meta

    def record_loss(self, step: int, val_loss: float) -> None:
        """Adds the validation loss of a finished step that was saved before it was known; in process 0."""
        self._losses.pop(step, None)
        if jax.process_index() == 0 and self.read_meta(step)['val_loss'] is None:
            with replacing(self.folder / str(step) / LATE_LOSS_FILE) as file:
                file.write(json.dumps({'val_loss': val_loss}).encode())

    def steps(self) -> list[int]:
        """The finished steps on disk, in ascending order; a save still in flight is not among them."""
        return finished_steps(self.folder)

    def latest_step(self) -> int | None:
        """The highest finished step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The finished step of the lowest validation loss, the earlier of two equals; None where no step has one."""
        losses = self._val_losses(self.steps())
        return min(losses, key=losses.get, default=None)

    def best_loss(self) -> float | None:
        """The lowest validation loss (nats a token, as given to `save`) of the finished steps, or None."""
        return min(self._val_losses(self.steps()).values(), default=None)

    def _has(self, step: int) -> bool:
        """Whether `step` is one of `steps`."""
        if is_address(self.folder):  # where to list the others would be a request for each
            return is_step_name(str(step)) and verifying.exists(self.folder / str(step))
        return step in self.steps()

    def _val_losses(self, finished: list[int]) -> dict[int, float]:
        return val_losses(self.folder, finished, self._losses if is_address(self.folder) else {})

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON dict of a finished step. Raises InputError where it is missing or damaged."""
        return read_step_meta(self.folder / str(step))

    def wait(self) -> None:
        """Return when every save is on disk with its manifest and old steps are gone; raise what a save failed with."""
        if self._pending is None:
            return
        problem = None
        try:
            self._pending.result()
        except Exception as error:
            problem = error
        finally:
            if self._pending.done():  # not so when Ctrl-C ends the waiting: the save is still in flight then
                self._pending = None
        # Process 0 writes the manifest and removes old steps, and the others are done before it.
        verifying.raise_together(
            problem,
            lambda process: InputError(
                f'a checkpoint in {self.folder} was not saved: see the message of process {process}'
            ),
        )

    def close(self) -> None:
        """Wait, then let go of threads. Raises what the last save failed with."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            if self._orbax is not None:
                orbax, self._orbax = self._orbax, None
                try:
                    with self._at_the_end:
                        orbax.close()
                except Exception:
                    if not self._failed:  # else it is what `wait` has raised already
                        raise
                if self._failed and jax.process_index() == 0:
                    # Now, since the disk may be full of it; what cannot be removed, the next run will.
                    committing.clear_failed(self.folder)

    def _open(self) -> ocp.CheckpointManager:
        if self._orbax is None:
            if jax.process_index() == 0:
                committing.clear(self.folder, is_step_name)
            # making the manager is a barrier between the processes: none looks at the folder before it is swept
            name = ocp.path.step.standard_name_format(step_prefix=committing.prefix(self.folder))
            options = ocp.CheckpointManagerOptions(create=True, step_name_format=name)
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._at_the_end.enter_context(orbax_path(self.folder))
            self._orbax = ocp.CheckpointManager(path, options=options)
        return self._orbax

    def _finish(self, step: int, val_loss: float | None) -> None:
        with self._told(step):
            self._orbax.wait_until_finished()
            verifying.write(committing.place_of(self.folder, step))
            self._losses[step] = val_loss
            if jax.process_index() == 0:
                committing.commit(self.folder, step)
                for old in self._outdated(step):
                    self._losses.pop(old, None)
                    committing.remove(self.folder / str(old))

    def _outdated(self, saved: int) -> list[int]:
        finished = self.steps()
        losses = self._val_losses(finished)
        best = sorted(losses, key=lambda step: (losses[step], step))[: self.keep_best]
        every = [step for step in finished if self.keep_every_steps and step % self.keep_every_steps == 0]
        keep = {saved, *finished[-self.keep_latest :], *best, *every}
        return [step for step in finished if step not in keep]


def _storable(tree: Any) -> Any:
    """`tree` with its Python numbers as arrays, as `jax.eval_shape` would describe them.

    Raises TypeError, naming the leaf, for what would come back changed: no number, or 64 bits while jax works in 32.
    """

    def leaf(path: tuple, value: Any) -> Any:
        if isinstance(value, jax.Array):
            if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                raise TypeError(f'{leaf_name(path)} is a typed random key and cannot be saved: use jax.random.key_data')
            return value
        if type(value) in (bool, int, float):
            return jnp.asarray(value)
        array = np.asarray(value)
        numeric = jnp.issubdtype(array.dtype, np.number) or array.dtype == bool
        if not numeric or jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise TypeError(f'{leaf_name(path)} is {array.dtype} and cannot be saved: make it a jax array')
        return array

    return jax.tree_util.tree_map_with_path(leaf, tree)
