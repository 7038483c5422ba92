"""Documents out of parquet files and JSON lines, a few at a time."""

import contextlib
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from gpt_jax.data.corpus import Decoder
from gpt_jax.errors import InputError

BATCH_ROWS = 64
COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd'}
LINE_BYTES = 2**28  # a longer line of JSON is no document


def parquet_rows(
    source: pathlib.Path | BinaryIO,
    where: str,
    column: str,
    slice_: tuple[int, int],
    decoder: Decoder,
    blank: bool = False,
) -> Iterator[str]:
    """The texts of a share of a parquet file's row groups.

    Args:
      source: a file, or an open one.
      where: its name in messages.
      column: that holds the text.
      slice_: (i, n): the i-th of n shares, from 0.
      decoder: decides on invalid UTF-8.
      blank: whether rows without text are given, too, as ''.

    Raises InputError where it is no parquet file, or has no such column of text.
    """
    import pyarrow  # a quarter of a second, and not all corpora need it
    import pyarrow.parquet

    with _readable(where), pyarrow.parquet.ParquetFile(source) as file:
        if column not in file.schema_arrow.names:
            raise InputError(
                f'data.column={column}: {where} has no such column, only {", ".join(file.schema_arrow.names)}'
            )
        type_ = file.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(type_) or pyarrow.types.is_large_string(type_)):
            raise InputError(f'data.column={column}: of type {type_} in {where}, not text; name another column')
        share, shares = slice_
        count = file.num_row_groups
        groups = list(range(share * count // shares, (share + 1) * count // shares))
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[column]) if groups else ():
            # As bytes: pyarrow takes the writer's word that they are UTF-8.
            for data in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                if data or blank:
                    yield decoder.text(data or b'', f'a row of {where}')


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise InputError(f'{where}: not a parquet file, or damaged ({_first_line(error)}); replace it') from None


def json_rows(path: pathlib.Path, column: str, start: int, stop: int, decoder: Decoder) -> Iterator[str]:
    """The texts of the JSON objects on the lines that begin in the bytes [start, stop) of a file.

    A file named .gz or .zst is uncompressed on the way; `stop` is then of the uncompressed bytes. Lines that have no
    text are left out.

    Raises InputError, naming file and line, where a line is no JSON object or has no text in `column`.
    """
    position, number = start, 0
    with _opened(path, start) as file:
        while position < stop and (line := file.readline(LINE_BYTES)):
            position += len(line)
            number += 1
            where = f'{path}, line {number}' + (f' after byte {start}' if start else '')
            if len(line) == LINE_BYTES:
                raise InputError(f'{where}: longer than {LINE_BYTES} bytes; split it up')
            if line.strip() and (text := _text_of(line, where, column, decoder)):
                yield decoder.characters(text, where)


@contextlib.contextmanager
def _opened(path: pathlib.Path, start: int) -> Iterator[BinaryIO]:
    if not compressed(path):
        with open(path, 'rb') as file:
            file.seek(start)
            yield file
        return
    import pyarrow

    try:
        with io.BufferedReader(pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix])) as file:
            yield file
    except OSError as error:
        raise InputError(f'{path}: not a {path.suffix} file, or damaged ({_first_line(error)}); replace it') from None


def compressed(path: pathlib.Path) -> bool:
    """Whether a file must be uncompressed from its beginning."""
    return path.suffix in COMPRESSIONS


def _text_of(line: bytes, where: str, column: str, decoder: Decoder) -> str:
    try:
        row: Any = json.loads(decoder.text(line, where))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{where}: not JSON ({_first_line(error)}); correct or remove it') from None
    text = row.get(column, '') if isinstance(row, dict) else None
    if not isinstance(row, dict) or column not in row:
        raise InputError(f'{where}: no JSON object with the key {column!r}; name it with --config.data.column')
    if text is not None and not isinstance(text, str):
        raise InputError(f'{where}: {column!r} is not text; name another key with --config.data.column')
    return text or ''


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
