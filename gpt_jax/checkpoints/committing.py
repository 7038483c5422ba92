"""How a step comes to be there, goes away and is set aside, so that a kill at any moment leaves what can be resumed.

On disk a rename is one event:
  while orbax writes        `saving_STEP.orbax-checkpoint-tmp`
  before the manifest       `saving_STEP`, which becomes `STEP` when the manifest is in it
  while an old step goes    `STEP.removed`, renamed before its files go
None of these counts, and the next save clears them away. So a folder `STEP` was finished, whatever is missing in it
now, and is never deleted as if it had not been.

On object storage there is no rename. An object `STEP.unfinished` beside the folder says the same:
  while orbax writes        `STEP.unfinished`, then objects below `STEP`
  before the manifest       the same; the manifest makes it count, and `STEP.unfinished` goes
  while an old step goes    `STEP.unfinished`, then the manifest goes, then the other objects, then `STEP.unfinished`
Where there is a manifest all other objects are there, so that a step with both is whole. One with neither has lost its
manifest: it is damaged, as on disk, and never deleted. To set a step aside is to copy it; a kill on the way leaves a
damaged step and a part of its copy, and the next run sets it aside once more.
"""

import os
import pathlib
import shutil
from collections.abc import Callable

from gpt_jax import files
from gpt_jax.checkpoints import verifying

REMOVED = '.removed'
UNFINISHED = '.unfinished'
SAVING = 'saving'
TEMPORARY = '.orbax-checkpoint-tmp'


def prefix(folder: pathlib.Path) -> str | None:
    """What orbax is to put before the names of steps that it writes to `folder`; None: nothing."""
    return None if files.is_address(folder) else SAVING


def place_of(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where orbax writes `step`, until `commit`."""
    return folder / (str(step) if files.is_address(folder) else f'{SAVING}_{step}')


def begin(folder: pathlib.Path, step: int) -> None:
    """Makes known that what will be written for `step` does not count yet. One process calls this."""
    if files.is_address(folder):
        _mark(folder / str(step))


def commit(folder: pathlib.Path, step: int) -> None:
    """Has `step`, which is whole and has its manifest, count."""
    if files.is_address(folder):
        _marker(folder / str(step)).unlink(missing_ok=True)
    else:
        os.rename(place_of(folder, step), folder / str(step))


def counts(step_folder: pathlib.Path) -> bool:
    """Whether the folder, which is there, was finished once."""
    return not files.is_address(step_folder) or verifying.exists(step_folder) or not _marker(step_folder).is_file()


def remove(step_folder: pathlib.Path) -> None:
    """Removes a finished step: it counts as a whole, or no more."""
    if files.is_address(step_folder):
        _mark(step_folder)
        (step_folder / verifying.NAME).unlink(missing_ok=True)
        step_folder.rmtree()
        _marker(step_folder).unlink(missing_ok=True)
        return
    removed = step_folder.with_name(step_folder.name + REMOVED)
    os.replace(step_folder, removed)
    shutil.rmtree(removed)


def set_aside(step_folder: pathlib.Path, aside: pathlib.Path) -> None:
    """Gives a step, in process 0, the name `aside`, which is free. Raises OSError."""
    if files.is_address(step_folder):
        from gpt_jax import storage

        storage.move(step_folder, aside)
    else:
        os.rename(step_folder, aside)


def is_taken(path: pathlib.Path) -> bool:
    """Whether anything has this name, be it a link that leads nowhere."""
    return path.exists() if files.is_address(path) else os.path.lexists(path)


def clear(folder: pathlib.Path, is_step: Callable[[str], bool]) -> None:
    """Removes what saves and removals that were killed have left. Only the run that writes to `folder` calls this."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        name = path.name.removesuffix(TEMPORARY)
        if name == path.name:
            name = name.removesuffix(REMOVED) if name.endswith(REMOVED) else name.removeprefix(f'{SAVING}_')
        if files.is_address(path):
            if path.name.endswith(UNFINISHED) and is_step(path.name.removesuffix(UNFINISHED)):
                step_folder = path.with_name(path.name.removesuffix(UNFINISHED))
                if not verifying.exists(step_folder):
                    step_folder.rmtree()
                path.unlink(missing_ok=True)
        elif name != path.name and is_step(name.removeprefix(f'{SAVING}_')):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()  # somebody's link, which orbax would follow


def clear_failed(folder: pathlib.Path) -> None:
    """Removes what saves that failed have left, as far as that is possible: the disk may be full of it."""
    if not files.is_address(folder):  # there it takes no room that anybody needs, and the next run clears it away
        for path in folder.glob(f'{SAVING}_*'):
            files.remove_folder(path)


def _marker(step_folder: pathlib.Path) -> pathlib.Path:
    return step_folder.with_name(step_folder.name + UNFINISHED)


def _mark(step_folder: pathlib.Path) -> None:
    _marker(step_folder).write_bytes(b'This step is being written or removed, and does not count.\n')
