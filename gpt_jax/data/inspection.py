"""What is in a folder of prepared data, for a reader; and whether it is what was written."""

import os
import pathlib
from collections.abc import Iterator

import numpy as np

from gpt_jax.data import manifest
from gpt_jax.data.corpus import SPLITS
from gpt_jax.data.shards import Tokens, read_header, verify
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import InputError

STRETCH = 2**22  # tokens that are looked at in one go
WINDOWS, WINDOW = 3, 48  # shown of each split, and their tokens
BAR = 40


def inspect(folder: str | os.PathLike) -> Iterator[str]:
    """The lines of a report: counts, use of the vocabulary, lengths of documents, the first windows.

    Every shard is read and held against its sha256, first of all.

    Raises InputError, naming the file, where the folder is not finished or a file in it is damaged.
    """
    folder = pathlib.Path(folder)
    if not (folder / manifest.MANIFEST).is_file():
        raise InputError(f'--inspect={folder}: no finished data there, for want of {manifest.MANIFEST}; prepare it')
    content = manifest.read(folder)
    tokenizer = Tokenizer.load(folder / manifest.TOKENIZER)
    manifest.check(folder, content, None, tokenizer)
    source = {name: value for name, value in content['source'].items() if name != 'files' and value is not None}
    source['files'] = len(content['source'].get('files', ()))
    yield f'corpus: {content["corpus"]} ({", ".join(f"{name} {value}" for name, value in source.items())})'
    yield f'split: {content["split"]}'
    yield f'tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint[:12]}'
    yield f'fingerprint: {content["fingerprint"]}'
    if content['replaced_bytes']:
        yield f'invalid bytes: {content["replaced_bytes"]:,} times U+FFFD in their place'
    for split in SPLITS:
        infos = [read_header(folder / shard['file'], tokenizer) for shard in content['shards'][split]]
        for info, shard in zip(infos, content['shards'][split], strict=True):
            manifest.check_shard(info, shard)
            verify(info)
        yield ''
        yield from _of_split(split, Tokens(infos), content['bytes'][split], tokenizer)


def _of_split(split: str, tokens: Tokens, bytes_: int, tokenizer: Tokenizer) -> Iterator[str]:
    yield f'{split}: {tokens.documents:,} documents, {len(tokens):,} tokens, {bytes_:,} bytes'
    yield f'  {len(tokens.shards)} shards, every sha256 verified; {bytes_ / len(tokens):.2f} bytes a token'
    counts, lengths = _count(tokens, tokenizer)
    used = int(np.count_nonzero(counts))
    yield f'  vocabulary: {used:,} of {tokenizer.vocab_size:,} tokens are used ({used / tokenizer.vocab_size:.1%})'
    common = np.argsort(-counts, kind='stable')[:8]
    yield '  the most common: ' + ', '.join(f'{tokenizer.decode([id_])!r}' for id_ in common if counts[id_])
    yield '  documents by their tokens:'
    for place in np.flatnonzero(lengths):
        low, high = (2**place, 2 ** (place + 1) - 1) if place else (0, 1)
        bar = '#' * round(BAR * lengths[place] / lengths.max())
        yield f'  {low:>10,} to {high:<10,} {lengths[place]:>10,}  {bar}'.rstrip()
    for start in range(0, min(WINDOWS * WINDOW, len(tokens)), WINDOW):
        yield f'  tokens {start} on: {tokenizer.decode(tokens[start : start + WINDOW])!r}'


def _count(tokens: Tokens, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Uses of every id [vocab], and documents by the logarithm of their length [64], end of text not counted."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    lengths = np.zeros(64, np.int64)
    before = -1  # where the end of the document before is
    for start in range(0, len(tokens), STRETCH):
        stretch = tokens[start : start + STRETCH]
        counts += np.bincount(stretch, minlength=tokenizer.vocab_size)
        ends = start + np.flatnonzero(stretch == tokenizer.end_of_text)
        if ends.size:
            sizes = np.diff(ends, prepend=before) - 1
            lengths += np.bincount(np.log2(np.maximum(sizes, 1)).astype(int), minlength=64)
            before = int(ends[-1])
    return counts, lengths
