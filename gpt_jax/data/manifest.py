"""What a folder of prepared data says of itself: `manifest.json`, which is written last."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gpt_jax
from gpt_jax.data.building import shard_path
from gpt_jax.data.corpus import SPLITS, Corpus
from gpt_jax.data.shards import ShardInfo, read_header, verify
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.files import replacing

FORMAT = 2  # raise it whenever this room would write other tokens or files: it is part of every fingerprint
MANIFEST = 'manifest.json'
TOKENIZER = 'tokenizer.json'
SOURCE = 'source.json'
VERIFIED = 'verified.json'
AGAIN = 'delete it to prepare the data anew'


def digest(*parts: str) -> str:
    """Hex sha256 of `parts` and the format."""
    return hashlib.sha256('\n'.join((f'gpt_jax data {FORMAT}', *parts)).encode()).hexdigest()


def complete(folder: pathlib.Path) -> bool:
    """Whether all of the folder was finished, and no file that it names is missing."""
    if not all((folder / name).is_file() for name in (MANIFEST, TOKENIZER)):
        return False
    shards = read(folder)['shards']
    present = {path.name for path in folder.iterdir()}
    return all(shard['file'] in present for split in SPLITS for shard in shards[split])


def make(corpus: Corpus, tokenizer: Tokenizer, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a corpus whose parts are all finished.

    Args:
      corpus: resolved.
      tokenizer: that made the tokens.
      reports: of every part, as `building` writes them.
    """
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for number, report in enumerate(reports):
        for split, counts in report['splits'].items():
            shards[split].append({'file': shard_path(pathlib.Path(), split, number).name, **counts})
    return {
        'format': FORMAT,
        'version': gpt_jax.__version__,
        'corpus': corpus.name,
        'corpus_fingerprint': corpus.fingerprint,
        'source': corpus.source(),
        'split': corpus.split_rule,
        'tokenizer': tokenizer.kind,
        'tokenizer_fingerprint': tokenizer.fingerprint,
        'vocab_size': tokenizer.vocab_size,
        'fingerprint': digest(corpus.fingerprint, tokenizer.fingerprint),
        'replaced_bytes': sum(report['replaced_bytes'] for report in reports),
        **{
            name: {split: sum(shard[name] for shard in shards[split]) for split in SPLITS}
            for name in ('documents', 'bytes', 'tokens')
        },
        'shards': shards,
    }


def write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Completes the folder."""
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(content, indent=2).encode())


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest, checked to have every entry that is read from it. Raises InputError where it has not."""
    content = read_json(folder / MANIFEST)
    try:
        for split in SPLITS:
            shards = content['shards'][split]
            names = [shard[name] for shard in shards for name in ('file', 'sha256')]
            counts = [shard[name] for shard in shards for name in ('tokens', 'mtime_ns')]
            added = sum(shard['tokens'] for shard in shards)
            damaged = added != content['tokens'][split] or min(*counts, content['bytes'][split]) < 0
            names += [content[name] for name in ('fingerprint', 'corpus_fingerprint', 'tokenizer_fingerprint')]
            damaged = damaged or not all(isinstance(name, str) for name in names)
            if damaged:
                break
    except (KeyError, TypeError):
        damaged = True
    if damaged:
        raise InputError(f'{folder / MANIFEST}: damaged; {AGAIN}')
    return content


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file of the folder. Raises InputError where it is none."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        raise InputError(f'{path}: damaged; {AGAIN}') from None


def check(folder: pathlib.Path, content: dict[str, Any], corpus: Corpus | None, tokenizer: Tokenizer) -> None:
    """Raises InputError where the folder is not of that corpus (where one is given), or not of that tokenizer."""
    if content['tokenizer_fingerprint'] != tokenizer.fingerprint:
        raise InputError(f'{folder / TOKENIZER}: not the tokenizer of this data; {AGAIN}')
    fingerprint = digest(content['corpus_fingerprint'], tokenizer.fingerprint)
    known = corpus is not None and corpus.fingerprint
    if content['fingerprint'] != fingerprint or (known and known != content['corpus_fingerprint']):
        raise InputError(f'{folder / MANIFEST}: of other data; {AGAIN}')


def check_shard(info: ShardInfo, entry: dict[str, Any]) -> None:
    """Raises InputError where a shard is not the one that the manifest has this `entry` for."""
    if (info.tokens, info.sha256) != (entry['tokens'], entry['sha256']):
        raise InputError(f'{info.path}: not the shard that {MANIFEST} names; delete it to make it anew')


def open_shards(
    folder: pathlib.Path, content: dict[str, Any], tokenizer: Tokenizer, log: Callable[[str], None]
) -> dict[str, list[ShardInfo]]:
    """Split -> its shards, each held against the manifest.

    The sha256 is computed of shards whose time of change is not the recorded one: those that were copied here or
    changed. `verified.json` remembers them, where the folder can be written.

    Raises InputError, naming the file, where a shard is damaged or of another tokenizer.
    """
    shards: dict[str, list[ShardInfo]] = {}
    changed: dict[str, tuple[ShardInfo, int]] = {}
    remembered = read_json(folder / VERIFIED) if (folder / VERIFIED).is_file() else {}
    for split in SPLITS:
        shards[split] = []
        for entry in content['shards'][split]:
            info = read_header(folder / entry['file'], tokenizer)
            check_shard(info, entry)
            shards[split].append(info)
            mtime_ns = os.stat(info.path).st_mtime_ns
            if mtime_ns not in (entry['mtime_ns'], remembered.get(entry['file'])):
                changed[entry['file']] = info, mtime_ns
    if changed:
        size = sum(info.tokens * info.dtype.itemsize for info, _ in changed.values())
        log(f'data: verifying {len(changed)} shards that were copied or changed, {size / 1e6:.1f} MB')
        for info, _ in changed.values():
            verify(info)
        _remember(folder, remembered | {name: mtime_ns for name, (_, mtime_ns) in changed.items()})
    return shards


def _remember(folder: pathlib.Path, verified: dict[str, int]) -> None:
    try:
        with replacing(folder / VERIFIED) as file:
            file.write(json.dumps(verified).encode())
    except OSError:
        return  # a folder that others own: then it is verified at every start
