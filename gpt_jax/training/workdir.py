"""The folder of a run: whose it is, and where its files are."""

import json
import os
import pathlib
from typing import Any

from gpt_jax.config import RunConfig, as_record, differing_keys
from gpt_jax.errors import InputError

# In place of the last step to keep in a log: a run without a checkpoint starts anew, and writes of step 0 again.
NOTHING = -1


def check(workdir: pathlib.Path, run: RunConfig) -> None:
    """Lets a run into its folder.

    Raises:
      InputError: the folder holds a run whose config differs in more than a resumed run may change, or is a file.
    """
    path = workdir / 'config.json'
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f'--workdir={workdir} is a file; name a folder')
    if not path.exists():
        return
    try:
        recorded = json.loads(path.read_text(encoding='utf-8'))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f'{path} is not JSON; choose another --workdir, or restore that file') from None
    if lines := differing_keys(recorded, run, str(path)):
        raise InputError(
            f'--workdir={workdir} holds a run of another config ({"; ".join(lines)}); '
            'choose another --workdir or give these keys their old values'
        )


def write_config(workdir: pathlib.Path, run: RunConfig) -> None:
    """Records the resolved experiment in config.json."""
    _write(workdir / 'config.json', json.dumps(as_record(run), indent=2) + '\n')


def _write(path: pathlib.Path, text: str) -> None:
    """To a temporary name first, so that no crash leaves half a file."""
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)


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
            _write(self._path, ''.join(kept))

    def write(self, step: int, previews: dict[str, Any]) -> None:
        """Adds the named previews of `step`."""
        lines = [f'step {step}']
        for name, text in previews.items():
            lines.append(f'  {name}:')
            lines += [f'    | {line}' for line in str(text).splitlines()]
        with self._path.open('a', encoding='utf-8') as file:
            file.write('\n'.join(lines) + '\n')
