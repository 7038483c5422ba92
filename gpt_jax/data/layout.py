"""Which parquet files of a hub's dataset are which split: by the dataset's card, else by their names."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.errors import InputError

# A word of a file's path that tells its split; of the others ('test') nothing is read.
_SPLIT_WORDS = {'train': 'train', 'validation': 'validation', 'valid': 'validation', 'val': 'validation'}
_SPLIT_WORDS |= {'dev': 'validation', 'test': 'test', 'testing': 'test', 'eval': 'test'}
_WORDS = re.compile(r'[a-z]+')


def splits(
    files: Sequence[str], configs: Sequence[Mapping[str, Any]], config: str | None, where: str
) -> dict[str, list[str]]:
    """Split -> its parquet files, sorted; without 'train' where there is none.

    Args:
      files: the paths of all files of the dataset.
      configs: the entry `configs` of its card, which may be empty.
      config: the one that is asked for; None: the default, or the only one.
      where: the dataset, in messages.

    Raises InputError where the config is unknown, or there are several and none is asked for.
    """
    parquet = sorted(path for path in files if path.endswith('.parquet'))
    if not configs:
        return _by_name(_in_folder(parquet, config, where))
    names = [str(entry.get('config_name', 'default')) for entry in configs]
    chosen = _choose(names, [bool(entry.get('default')) for entry in configs], config, where)
    entry = configs[chosen]
    patterns = _patterns(entry.get('data_files'))
    if not patterns:
        folder = str(entry.get('data_dir') or '')
        return _by_name([path for path in parquet if path.startswith(folder)])
    found: dict[str, list[str]] = {}
    for split, pattern in patterns:
        name = _SPLIT_WORDS.get(split)
        matching = [path for path in parquet if fnmatch.fnmatchcase(path, pattern)]
        if name and matching:
            found[name] = sorted({*found.get(name, ()), *matching})
    return found


def _choose(names: Sequence[str], defaults: Sequence[bool], config: str | None, where: str) -> int:
    if config is not None and config in names:
        return names.index(config)
    if config is None and len(names) == 1:
        return 0
    if config is None and True in defaults:
        return defaults.index(True)
    if config is None and 'default' in names:
        return names.index('default')
    raise _unknown(config, names, where)


def _unknown(config: str | None, names: Sequence[str], where: str) -> InputError:
    what = f'no config {config!r}' if config else 'several configs'
    shown = ', '.join(names[:20]) + (', ...' if len(names) > 20 else '')
    return InputError(f'{where} has {what}; name one as hub:REPO[@REVISION]:CONFIG: {shown or "there is none"}')


def _patterns(data_files: Any) -> list[tuple[str, str]]:
    """(split, pattern) of the forms that a card may give them in."""
    if data_files is None:
        return []
    if isinstance(data_files, str):
        return [('train', data_files)]
    found = []
    for entry in data_files:
        split, paths = ('train', entry) if isinstance(entry, str) else (entry.get('split', 'train'), entry['path'])
        found += [(split, path) for path in ([paths] if isinstance(paths, str) else paths)]
    return found


def _in_folder(parquet: Sequence[str], config: str | None, where: str) -> list[str]:
    """The files of a config, which is a folder where no card says otherwise."""
    folders = sorted({path.split('/')[0] for path in parquet if '/' in path})
    if config is not None:
        inside = [path for path in parquet if path.startswith(f'{config}/')]
        if parquet and not inside:
            raise _unknown(config, folders, where)
        return inside
    if len(folders) > 1 and not any(_split_of_name(folder) for folder in folders) and 'default' not in folders:
        raise _unknown(None, folders, where)
    if 'default' in folders:
        return [path for path in parquet if path.startswith('default/')]
    return list(parquet)


def _by_name(parquet: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in parquet:
        # The name tells, or the folder: raw/train-00000-of-00002.parquet, plain_text/train/0000.parquet.
        split = _split_of_name(path.rpartition('/')[2]) or _split_of_name(path.rpartition('/')[0]) or 'train'
        found.setdefault(split, []).append(path)
    found.pop('test', None)
    return found


def _split_of_name(name: str) -> str | None:
    return next((_SPLIT_WORDS[word] for word in reversed(_WORDS.findall(name.lower())) if word in _SPLIT_WORDS), None)
