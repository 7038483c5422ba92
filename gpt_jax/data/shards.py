"""Token shards: one flat file of token ids that says what it is.

    bytes 0-7    magic `GPTJAXTK`
    bytes 8-11   format version
    bytes 12-15  dtype code: 2 for uint16, 4 for uint32 (bytes a token)
    bytes 16-23  number of tokens
    bytes 24-31  vocabulary size
    bytes 32-63  sha256 of the tokenizer
    bytes 64-    the tokens

All numbers are little-endian. Tokens are memory-mapped: a shard costs no memory but the pages that are read.
"""

import dataclasses
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence

import numpy as np

from gpt_jax.data.files import replacing
from gpt_jax.errors import InputError

MAGIC = b'GPTJAXTK'
VERSION = 1
HEADER = struct.Struct('<8sIIQQ32s')
DTYPES = {2: np.dtype('<u2'), 4: np.dtype('<u4')}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenShard:
    """An open shard.

    Attributes:
      path: the file.
      tokens: [count] read-only memory map, uint16 or uint32; every id is below `vocab_size`.
      vocab_size: of the tokenizer that made the ids.
      tokenizer_fingerprint: hex sha256 of that tokenizer.
    """

    path: pathlib.Path
    tokens: np.memmap = dataclasses.field(repr=False)
    vocab_size: int
    tokenizer_fingerprint: str

    @property
    def dtype(self) -> np.dtype:
        """uint16 where the vocabulary fits into it, else uint32."""
        return self.tokens.dtype

    def __len__(self) -> int:
        return len(self.tokens)


def write_shard(
    path: str | os.PathLike,
    chunks: Iterable[Sequence[int] | np.ndarray],
    vocab_size: int,
    tokenizer_fingerprint: str,
) -> int:
    """Streams `chunks` of token ids (each 1-D, any length) into a shard at `path`; returns the number of tokens.

    The file appears at `path` whole or not at all: an exception from `chunks` leaves what was there before.

    Raises ValueError where an id is outside [0, vocab_size) or there is no token at all.
    """
    code = _dtype_code(vocab_size)
    count = 0
    with replacing(path) as file:
        file.write(bytes(HEADER.size))  # the magic comes last, when the count is known
        for chunk in chunks:
            ids = np.asarray(chunk, np.int64)
            if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                raise ValueError(f'{path}: ids {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab_size}')
            file.write(ids.astype(DTYPES[code]).tobytes())
            count += ids.size
        if not count:
            raise ValueError(f'{path}: no tokens to write')
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, code, count, vocab_size, bytes.fromhex(tokenizer_fingerprint)))
    return count


def open_shard(
    path: str | os.PathLike, tokenizer_fingerprint: str | None = None, vocab_size: int | None = None
) -> TokenShard:
    """Opens a shard, checked against the tokenizer that the caller means to use, where given.

    Raises InputError, naming the file, where it is missing, no shard, of another version, shorter or longer than its
    header says, or made with another tokenizer or vocabulary size.
    """
    path = pathlib.Path(path)
    again = 'delete it to make it anew'
    try:
        with open(path, 'rb') as file:
            header = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f'{path}: cannot be opened ({error.strerror}); prepare the data again') from None
    if not header.startswith(MAGIC):
        raise InputError(f'{path}: not a token shard of gpt_jax, or a damaged one; {again}')
    if len(header) < HEADER.size:
        raise InputError(f'{path}: truncated inside its header of {HEADER.size} bytes; {again}')
    _, version, code, count, stored_vocab_size, digest = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f'{path}: shard version {version}, this program reads version {VERSION}; {again}')
    if code not in DTYPES or code != _dtype_code(stored_vocab_size):
        raise InputError(f'{path}: damaged, dtype code {code} with vocabulary {stored_vocab_size}; {again}')
    expected = HEADER.size + count * code
    if size != expected or not count:
        raise InputError(f'{path}: damaged, {size} bytes where {count} tokens take {expected}; {again}')
    if tokenizer_fingerprint is not None and digest.hex() != tokenizer_fingerprint:
        raise InputError(
            f'{path}: made with another tokenizer ({digest.hex()[:12]}, not {tokenizer_fingerprint[:12]}); {again}'
        )
    if vocab_size is not None and stored_vocab_size != vocab_size:
        raise InputError(f'{path}: made for a vocabulary of {stored_vocab_size}, not {vocab_size}; {again}')
    tokens = np.memmap(path, dtype=DTYPES[code], mode='r', offset=HEADER.size, shape=(count,))
    return TokenShard(path, tokens, stored_vocab_size, digest.hex())


def _dtype_code(vocab_size: int) -> int:
    return 2 if vocab_size <= 2**16 else 4
