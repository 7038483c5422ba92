"""Token shards: flat files of token ids that say what they are, and many of them as one long array.

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
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import mmap
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.files import replacing

MAGIC = b'GPTJAXTK'
VERSION = 2
HEADER = struct.Struct('<8sIIQQQ32s32s24x')
DTYPES = {2: np.dtype('<u2'), 4: np.dtype('<u4')}
AGAIN = 'delete it and run the command again to make it anew'


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
    header says, or made with another tokenizer. The tokens themselves are not read: see `verify`.
    """
    path = pathlib.Path(path)
    try:
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


def verify(info: ShardInfo) -> None:
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
