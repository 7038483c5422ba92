"""Prepared data on disk: token shards, many of them as one long array, and the folder that holds them.

A shard is a flat file of token ids that says what it is:

    bytes 0-7      magic `GPTJAXTK`
    bytes 8-11     format version
    bytes 12-15    dtype code: 2 for uint16, 4 for uint32 (bytes a token)
    bytes 16-23    number of tokens
    bytes 24-31    number of documents that end in it: its end-of-text tokens
    bytes 32-39    vocabulary size
    bytes 40-71    sha256 of the tokenizer
    bytes 72-103   sha256 of the tokens' bytes
    bytes 104-127  zero
    bytes 128-     the tokens

All numbers are little-endian. Tokens are memory-mapped: a shard costs no memory but the pages that are read.

A folder of prepared data holds the shards, `tokenizer.json`, and `manifest.json`, which is written last and names all
shards with their sha256.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import mmap
import os
import pathlib
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

import gpt_jax
from gpt_jax import files
from gpt_jax.data.corpus import SPLITS, Corpus
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.files import replacing

MAGIC = b'GPTJAXTK'
VERSION = 2
HEADER = struct.Struct('<8sIIQQQ32s32s24x')
DTYPES = {2: np.dtype('<u2'), 4: np.dtype('<u4')}
AGAIN = 'delete it and run the command again to make it anew'
PREPARE_AGAIN = 'delete it to prepare the data anew'
FORMAT = 2  # raise it whenever other tokens or files would be written: it is part of every fingerprint
MANIFEST = 'manifest.json'
TOKENIZER = 'tokenizer.json'
VERIFIED = 'verified.json'
STRETCH = 2**22  # tokens that are looked at in one go
WINDOWS, WINDOW = 3, 48  # shown of each split, and their tokens
BAR = 40
MOST_BYTES = 2**30  # of a manifest: a line for each of millions of files


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """What the header of a shard says, and where the file is.

    Attributes:
      path: the file.
      tokens: how many it holds.
      documents: how many of them are end-of-text tokens.
      vocab_size: of the tokenizer that made the ids; every id is below it.
      tokenizer_fingerprint: hex sha256 of that tokenizer.
      sha256: hex, of the tokens' bytes.
    """

    path: pathlib.Path
    tokens: int
    documents: int
    vocab_size: int
    tokenizer_fingerprint: str
    sha256: str

    @property
    def dtype(self) -> np.dtype:
        """uint16 where the vocabulary fits into it, else uint32."""
        return dtype_of(self.vocab_size)


class ShardWriter:
    """Streams token ids into an open file; `shard_writer` makes one.

    Attributes:
      tokens: ids written so far.
      documents: end-of-text ids among them.
    """

    def __init__(self, path: pathlib.Path, file: BinaryIO, tokenizer: Tokenizer):
        self.tokens = self.documents = 0
        self._path, self._file, self._tokenizer = path, file, tokenizer
        self._dtype = dtype_of(tokenizer.vocab_size)
        self._sha256 = hashlib.sha256()
        file.write(bytes(HEADER.size))  # the magic comes last, when the counts are known

    def write(self, ids: Sequence[int] | np.ndarray) -> None:
        """Appends ids, 1-D, of any length. Raises ValueError where one is outside of the vocabulary."""
        ids = np.asarray(ids, np.int64)
        limit = self._tokenizer.vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= limit):
            raise ValueError(f'{self._path}: ids {ids.min()} to {ids.max()} do not fit a vocabulary of {limit}')
        payload = ids.astype(self._dtype).tobytes()
        self._file.write(payload)
        self._sha256.update(payload)
        self.tokens += ids.size
        self.documents += int(np.count_nonzero(ids == self._tokenizer.end_of_text))

    def finish(self) -> ShardInfo:
        """Writes the header. Raises ValueError where nothing was written before."""
        if not self.tokens:
            raise ValueError(f'{self._path}: no tokens to write')
        info = ShardInfo(
            self._path,
            self.tokens,
            self.documents,
            self._tokenizer.vocab_size,
            self._tokenizer.fingerprint,
            self._sha256.hexdigest(),
        )
        self._file.seek(0)
        self._file.write(_pack(info))
        return info


@contextlib.contextmanager
def shard_writer(path: str | os.PathLike, tokenizer: Tokenizer) -> Iterator[ShardWriter]:
    """Opens a new shard; it appears at `path`, whole, when the block ends well after the writer's `finish`."""
    with replacing(path) as file:
        yield ShardWriter(pathlib.Path(path), file, tokenizer)


def write_shard(
    path: str | os.PathLike, chunks: Iterable[Sequence[int] | np.ndarray], tokenizer: Tokenizer
) -> ShardInfo:
    """Streams `chunks` of token ids (each 1-D, any length) into a shard at `path`.

    The file appears at `path` whole or not at all: an exception from `chunks` leaves what was there before.

    Raises ValueError where an id is outside of the tokenizer's vocabulary or there is no token at all.
    """
    with shard_writer(path, tokenizer) as writer:
        for chunk in chunks:
            writer.write(chunk)
        return writer.finish()


def read_header(path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> ShardInfo:
    """What a shard says of itself, held against the file's size and, where given, the tokenizer meant to be used.

    Raises InputError, naming the file, where it is missing, no shard, of another version, shorter or longer than its
    header says, or made with another tokenizer. The tokens themselves are not read: see `verify_shard`.
    """
    path = pathlib.Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise InputError(f'{path}: not a token shard of gpt_jax, but a folder, a pipe or a device; {AGAIN}')
        with open(path, 'rb') as file:
            header = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f'{path}: cannot be opened ({error.strerror}); prepare the data again') from None
    if not header.startswith(MAGIC):
        raise InputError(f'{path}: not a token shard of gpt_jax, or a damaged one; {AGAIN}')
    if len(header) < HEADER.size:
        raise InputError(f'{path}: truncated inside its header of {HEADER.size} bytes; {AGAIN}')
    _, version, code, tokens, documents, vocab_size, fingerprint, sha256 = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f'{path}: shard version {version}, this program reads version {VERSION}; {AGAIN}')
    if code not in DTYPES or DTYPES[code] != dtype_of(vocab_size):
        raise InputError(f'{path}: damaged, dtype code {code} with vocabulary {vocab_size}; {AGAIN}')
    info = ShardInfo(path, tokens, documents, vocab_size, fingerprint.hex(), sha256.hex())
    expected = HEADER.size + tokens * code
    if size != expected or not tokens or documents > tokens or header != _pack(info):
        raise InputError(f'{path}: damaged, {size} bytes where {tokens} tokens take {expected}; {AGAIN}')
    if tokenizer is not None and (info.tokenizer_fingerprint, vocab_size) != (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
    ):
        raise InputError(
            f'{path}: made with another tokenizer ({info.tokenizer_fingerprint[:12]} of {vocab_size} tokens, not '
            f'{tokenizer.fingerprint[:12]} of {tokenizer.vocab_size}); {AGAIN}'
        )
    return info


def verify_shard(info: ShardInfo) -> None:
    """Reads all of a shard. Raises InputError where its tokens are not those that were written."""
    digest = hashlib.sha256()
    with open(info.path, 'rb') as file:
        file.seek(HEADER.size)
        while block := file.read(2**22):
            digest.update(block)
    if digest.hexdigest() != info.sha256:
        raise InputError(f'{info.path}: damaged, the sha256 of its tokens is not the recorded one; {AGAIN}')


class Tokens:
    """The tokens of many shards as one long read-only array, of which only what is read is opened.

    `tokens[a:b]` is an array [b - a] of uint16 or uint32: inside one shard a view of the file, across shards a copy.
    `tokens[i]` is one id. `numpy.asarray(tokens)` reads all of them.

    Attributes:
      shards: what they are made of, in order.
      dtype: of the ids.
    """

    def __init__(self, shards: Sequence[ShardInfo]):
        """Takes one or more shards of one tokenizer."""
        self.shards = tuple(shards)
        self.dtype = self.shards[0].dtype
        self._ends = list(itertools.accumulate(shard.tokens for shard in self.shards))
        self._arrays: list[np.ndarray | None] = [None] * len(self.shards)

    @property
    def documents(self) -> int:
        """How many end-of-text tokens there are."""
        return sum(shard.documents for shard in self.shards)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | slice) -> np.ndarray | np.integer:
        if not isinstance(index, slice):
            place = index + len(self) if index < 0 else index
            if not 0 <= place < len(self):
                raise IndexError(f'token {index} of {len(self)}')
            return self[place : place + 1][0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise IndexError(f'step {step}: tokens are read in stretches, one after another')
        number = bisect.bisect_right(self._ends, start)
        if stop <= start:
            return np.empty(0, self.dtype)
        if stop <= self._ends[number]:  # nearly always, and without a copy
            first = self._ends[number] - self.shards[number].tokens
            return self._open(number)[start - first : stop - first]
        stretches = []
        while start < stop:
            end = min(stop, self._ends[number])
            first = self._ends[number] - self.shards[number].tokens
            stretches.append(self._open(number)[start - first : end - first])
            start, number = end, number + 1
        return np.concatenate(stretches)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = self[:]
        return array if dtype is None else array.astype(dtype)

    def _open(self, number: int) -> np.ndarray:
        array = self._arrays[number]
        if array is None:
            shard = self.shards[number]
            with open(shard.path, 'rb') as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # A plain array of the mapped memory: slicing np.memmap costs ten times as much.
            array = np.frombuffer(memory, shard.dtype, count=shard.tokens, offset=HEADER.size)
            self._arrays[number] = array
        return array


def _pack(info: ShardInfo) -> bytes:
    fingerprints = bytes.fromhex(info.tokenizer_fingerprint), bytes.fromhex(info.sha256)
    code = info.dtype.itemsize
    return HEADER.pack(MAGIC, VERSION, code, info.tokens, info.documents, info.vocab_size, *fingerprints)


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id of a vocabulary."""
    return DTYPES[2 if vocab_size <= 2**16 else 4]


def shard_path(folder: pathlib.Path, split: str, number: int) -> pathlib.Path:
    """Where the shard of a part is."""
    return folder / f'{split}-{number:05}.bin'


def digest(*parts: str) -> str:
    """Hex sha256 of `parts` and the format."""
    return hashlib.sha256('\n'.join((f'gpt_jax data {FORMAT}', *parts)).encode()).hexdigest()


def is_complete(folder: pathlib.Path) -> bool:
    """Whether all of the folder was finished, and no file that it names is missing."""
    if not all(os.path.isfile(folder / name) for name in (MANIFEST, TOKENIZER)):
        return False
    shards = read_manifest(folder)['shards']
    present = {path.name for path in folder.iterdir()}
    return all(shard['file'] in present for split in SPLITS for shard in shards[split])


def write_manifest(
    folder: pathlib.Path, corpus: Corpus, tokenizer: Tokenizer, reports: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Completes a folder whose parts are all finished; returns the manifest.

    Args:
      folder: of the prepared data.
      corpus: resolved.
      tokenizer: that made the tokens.
      reports: of every part, as `parts` writes them.

    Raises InputError where a split is empty.
    """
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for number, report in enumerate(reports):
        for split, counts in report['splits'].items():
            shards[split].append({'file': shard_path(folder, split, number).name, **counts})
    for split in SPLITS:
        if not shards[split]:
            raise corpus.empty_split(split)
    content = {
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
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(content, indent=2).encode())
    return content


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
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
            names += [content[name] for name in ('corpus', 'split')]
            damaged = damaged or not all(isinstance(name, str) for name in names)
            damaged = damaged or not isinstance(content['source'], dict) or content['replaced_bytes'] < 0
            if damaged:
                break
    except (KeyError, TypeError):
        damaged = True
    if damaged:
        raise InputError(f'{folder / MANIFEST}: damaged; {PREPARE_AGAIN}')
    return content


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, from a file of the folder. Raises InputError where it is none."""
    try:
        content = files.read_json(path, most=MOST_BYTES)
    except InputError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f'{path}: damaged; {PREPARE_AGAIN}')
    return content


def check_manifest(folder: pathlib.Path, content: dict[str, Any], corpus: Corpus | None, tokenizer: Tokenizer) -> None:
    """Raises InputError where the folder is not of that corpus (where one is given), or not of that tokenizer."""
    if content['tokenizer_fingerprint'] != tokenizer.fingerprint:
        raise InputError(f'{folder / TOKENIZER}: not the tokenizer of this data; {PREPARE_AGAIN}')
    fingerprint = digest(content['corpus_fingerprint'], tokenizer.fingerprint)
    known = corpus is not None and corpus.fingerprint
    if content['fingerprint'] != fingerprint or (known and known != content['corpus_fingerprint']):
        raise InputError(f'{folder / MANIFEST}: of other data; {PREPARE_AGAIN}')


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
    try:
        remembered = read_json(folder / VERIFIED)
    except InputError:
        remembered = {}  # none yet, or damaged: the shards are read again
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
            verify_shard(info)
        remember(folder, remembered | {name: mtime_ns for name, (_, mtime_ns) in changed.items()})
    return shards


def remember(folder: pathlib.Path, verified: dict[str, int]) -> None:
    """Notes shards that were verified, by their name and time of change, in `verified.json`."""
    try:
        with replacing(folder / VERIFIED) as file:
            file.write(json.dumps(verified).encode())
    except OSError:
        return  # a folder that others own: then it is verified at every start


def inspect(folder: str | os.PathLike) -> Iterator[str]:
    """The lines of a report: counts, use of the vocabulary, lengths of documents, the first windows.

    Every shard is read and held against its sha256, first of all.

    Raises InputError, naming the file, where the folder is not finished or a file in it is damaged.
    """
    folder = pathlib.Path(folder)
    if not os.path.isfile(folder / MANIFEST):
        raise InputError(f'--inspect={folder}: no finished data there, {MANIFEST} is missing; prepare it')
    content = read_manifest(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    check_manifest(folder, content, None, tokenizer)
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
            check_shard(info, shard)
            verify_shard(info)
        yield ''
        yield from _describe_split(split, Tokens(infos), content['bytes'][split], tokenizer)


def _describe_split(split: str, tokens: Tokens, bytes_: int, tokenizer: Tokenizer) -> Iterator[str]:
    yield f'{split}: {tokens.documents:,} documents, {len(tokens):,} tokens, {bytes_:,} bytes'
    yield f'  {len(tokens.shards)} shards, every sha256 verified; {bytes_ / len(tokens):.2f} bytes a token'
    counts, lengths = _count_tokens(tokens, tokenizer)
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


def _count_tokens(tokens: Tokens, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
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
