"""The formats of local files, told by their content more than by their names; and their rows.

Plain text, JSON lines, one JSON array of objects, and parquet are read; gzip and zstd around JSON as well. A byte order
mark is no part of a text: every reader drops it at the beginning of a file. What can be told to be something else
(UTF-16, archives, pictures of pages) is refused by its name, as its bytes would say nothing to a user.

JSON and parquet are read with json and pyarrow. `datasets`, which reads those of the hub, cannot start in the middle of
a file of JSON lines, so that a large one would keep one process busy and the others waiting, and it does not say in
which line an error is.
"""

import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from gpt_jax.data.corpus import Decoder
from gpt_jax.errors import InputError, first_line
from gpt_jax.files import check_regular

HEAD_BYTES = 2**16  # that a format is told by
BLOCK_BYTES = 2**22
LINE_BYTES = 2**28  # a longer line, or element of an array, is no document
BATCH_ROWS = 64
ENDLESS = 2**62  # where a compressed file ends is not known before it was read
BOM = codecs.BOM_UTF8
COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd'}
MAGICS = {b'\x1f\x8b': 'gzip', b'\x28\xb5\x2f\xfd': 'zstd'}
LINES = ('.jsonl', '.ndjson', '.jsonlines', '.ldjson')  # a name that ends so promises JSON lines; .json promises less
# No text begins so, or hardly any: what it is then, which is more than "not UTF-8" says.
NO_TEXT = {
    b'%PDF-': 'PDF',
    b'PK\x03\x04': 'a zip archive, as .docx, .xlsx and .npz are',
    **{b'BZh%d1AY&SY' % level: 'compressed by bzip2' for level in range(1, 10)},
    b'\xfd7zXZ\x00': 'compressed by xz',
    b'\x04"M\x18': 'compressed by lz4',
    b'7z\xbc\xaf\x27\x1c': 'a 7-zip archive',
    b'ARROW1\x00\x00': "Arrow's own format",
    b'Obj\x01': 'Avro',
    b'SQLite format 3\x00': 'an SQLite database',
    b'\x93NUMPY': 'an array of NumPy',
    b'\x89HDF\r\n': 'HDF5',
}


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """What a file is.

    Attributes:
      kind: what it looks like: 'text', 'lines' (of JSON), 'array' (of JSON objects), 'object' (one, over several lines)
        or 'parquet'.
      named: what its name says it is: 'lines', 'json' (lines, an array, or anything else in JSON) or ''.
      compression: 'gzip', 'zstd' or ''.
      bom: bytes that a byte order mark takes at its beginning: 0 or 3.
      row: of 'lines' and 'array', the first object; {} where it is longer than what was looked at.
    """

    kind: str
    named: str = ''
    compression: str = ''
    bom: int = 0
    row: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)


def detect(path: pathlib.Path) -> FileFormat:
    """The format of a file, from its first bytes and its name, whose case does not matter.

    Raises InputError where it is no regular file, cannot be read, or is known to hold no text.
    """
    name = f'data.path={path}'
    check_regular(path, name)
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Files of /proc say that they are empty, and some of them never end.
        start = file.read(HEAD_BYTES) if size else b''
        file.seek(max(size - 4, 0))
        end = file.read(4) if size else b''
    stem, ending = os.path.splitext(path.name.lower())
    by_name = COMPRESSIONS.get(ending, '') if start else ''
    compression = next((value for magic, value in MAGICS.items() if start.startswith(magic)), by_name)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
    # A text may begin with these four letters, but hardly ends with them, too.
    if ending == '.parquet' or (start[:4], end) == (b'PAR1', b'PAR1'):
        if compression:
            raise InputError(f'{name}: parquet inside of {compression}; uncompress it')
        return FileFormat('parquet')
    head = start
    if compression:
        with opened(path, compression) as file:
            head = file.read(HEAD_BYTES)
    for magic, what in NO_TEXT.items():
        if head.startswith(magic):
            raise InputError(f'{name} is {what}, not text; name text, JSON lines or parquet')
    _refuse_utf16(head, name)
    bom = len(BOM) if head.startswith(BOM) else 0
    kind, row = _shape(head[bom:], complete=len(head) < HEAD_BYTES)
    # An array is told by its beginning; whatever else is called .jsonl has its errors told by line.
    if ending in LINES and kind != 'array':
        kind = 'lines'
    named = 'lines' if ending in LINES else 'json' if ending == '.json' else ''
    if compression and kind not in ('lines', 'array') and not named:
        raise InputError(f'{name}: of compressed files only JSON lines are read, and it holds none; uncompress it')
    return FileFormat(kind, named, compression, bom, row)


def _refuse_utf16(head: bytes, name: str) -> None:
    encoding = ''
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = 'UTF-32'
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = 'UTF-16'
    elif len(head) >= 8:
        # Without a mark, Latin letters in UTF-16 are valid UTF-8: every other byte is zero.
        zeros = {'UTF-16BE': head[::2].count(0), 'UTF-16LE': head[1::2].count(0)}
        few, many = sorted(zeros, key=zeros.get)
        encoding = many if zeros[many] > len(head) / 4 and zeros[few] <= zeros[many] / 20 else ''
    if encoding:
        raise InputError(f'{name} is {encoding}; make UTF-8 of it: iconv -f {encoding} -t UTF-8')


def _shape(head: bytes, complete: bool) -> tuple[str, dict[str, Any]]:
    """What JSON the beginning of a file looks like, and its first object; 'text' where it looks like none."""
    body = head.lstrip()
    try:
        if re.match(rb'\[\s*\{', body):
            row, _ = json.JSONDecoder().raw_decode(body.decode(errors='replace'), body.index(b'{'))
            return 'array', row
        if re.match(rb'\{\s*["}]', body):
            first, end, _ = body.partition(b'\n')
            return ('lines', json.loads(first)) if end or complete else ('lines', {})
        return 'text', {}
    except (ValueError, RecursionError):
        # What begins like a row: one that is cut off by the end of `head`, or no row.
        return ('object' if body.startswith(b'{') else 'array'), {}


@contextlib.contextmanager
def opened(path: pathlib.Path, compression: str = '', start: int = 0) -> Iterator[BinaryIO]:
    """The bytes of a file, uncompressed on the way; `start` is for files that are not compressed.

    Raises InputError, naming the file, where it cannot be read, or is damaged.
    """
    try:
        if compression == 'gzip':
            # Not pyarrow's, which stumbles over the zeros that tapes and block devices leave after the last member.
            with gzip.open(path) as inner, io.BufferedReader(inner, 2**20) as file:
                yield file
        elif compression:
            import pyarrow  # a quarter of a second, and not all corpora need it

            with open(path, 'rb') as inner, io.BufferedReader(pyarrow.input_stream(inner, compression)) as file:
                yield file
        else:
            with open(path, 'rb') as file:
                file.seek(start)
                yield file
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            reason = f'cannot be read ({error.strerror or error}); name a readable file'
        else:
            reason = f'not a {compression} file, or damaged ({first_line(error)}); replace it'
        raise InputError(f'data.path={path}: {reason}') from None


def texts(
    path: pathlib.Path, decoder: Decoder, start: int = 0, stop: int = ENDLESS, compression: str = ''
) -> Iterator[str]:
    """The text in the bytes [start, stop) of a file, some megabytes at a time, no character cut in two."""
    position = start
    for data in blocks(path, start, stop, compression):
        text = decoder.text(data, f'data.path={path}', position)
        yield text if position else text.removeprefix('\ufeff')
        position += len(data)


def blocks(path: pathlib.Path, start: int = 0, stop: int = ENDLESS, compression: str = '') -> Iterator[bytes]:
    """The bytes of such texts, as they are."""
    with opened(path, compression, start) as file:
        rest = b''
        while data := file.read(min(BLOCK_BYTES, stop - start)):
            start += len(data)
            data = rest + data
            end = _whole_characters(data)
            rest = data[end:]
            if end:
                yield data[:end]
        if rest:
            yield rest


def _whole_characters(data: bytes) -> int:
    """How many bytes there are before a character that the end of `data` cuts in two."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0b11000000:
            length = 2 if byte < 0b11100000 else 3 if byte < 0b11110000 else 4
            return len(data) - back if length > back else len(data)
        if byte < 0b10000000:
            break
    return len(data)


def json_rows(path: pathlib.Path, column: str, start: int, stop: int, decoder: Decoder) -> Iterator[str]:
    """The texts of a file's JSON objects: of those on the lines that begin in its bytes [start, stop), or of an array.

    Rows that have no text are left out. Of compressed files and arrays `start` is 0, `stop` the end.

    Raises InputError, naming file and line, where one is no JSON object or has no text in `column`.
    """
    format_ = detect(path)
    if format_.kind == 'array':
        yield from _array_rows(path, format_.compression, column, decoder)
        return
    position, number = start, 0
    with opened(path, format_.compression, start) as file:
        while position < stop and (line := file.readline(LINE_BYTES)):
            if position == 0:
                line = line.removeprefix(BOM)
                position += format_.bom
            position += len(line)
            number += 1
            where = f'{path}, line {number}' + (f' after byte {start}' if start else '')
            if len(line) == LINE_BYTES:
                raise InputError(f'{where}: longer than {LINE_BYTES} bytes; split it up')
            if line.strip() and (text := _text_of(_row(decoder.text(line, where), where), where, column)):
                yield decoder.characters(text, where)


def _array_rows(path: pathlib.Path, compression: str, column: str, decoder: Decoder) -> Iterator[str]:
    """The texts of one array of objects, of which only the element that is being read is held."""
    source = texts(path, decoder, compression=compression)
    buffer, at = '', 0

    def fill(wanted: int) -> bool:
        """Reads on until so many characters are ahead, or one block more; False at the end of the file."""
        nonlocal buffer, at
        more = []
        while not more or len(buffer) - at + sum(map(len, more)) < wanted:
            text = next(source, None)
            if text is None:
                break
            more.append(text)
        buffer, at = buffer[at:] + ''.join(more), 0
        return bool(more)

    def sign() -> str:
        """The next character that is no space; '' at the end of the file."""
        nonlocal at
        while True:
            at = _SPACES.match(buffer, at).end()
            if at < len(buffer):
                return buffer[at]
            if not fill(0):
                return ''

    def element(where: str) -> Any:
        """The next value."""
        nonlocal at
        while True:
            try:
                row, end = json.JSONDecoder().raw_decode(buffer, at)
            except RecursionError:
                raise InputError(f'{where}: nested too deeply; correct or remove it') from None
            except ValueError as error:
                # Perhaps only cut off. Twice as much each time: trying again and again stays cheap.
                if len(buffer) - at > LINE_BYTES or not fill(2 * (len(buffer) - at)):
                    raise InputError(f'{where}: not JSON ({first_line(error)}); correct or remove it') from None
            else:
                at = end
                return row

    if sign() != '[':
        raise InputError(f'{path}: no JSON array; write an object a line, or one array of objects')
    at += 1
    number, after = 0, ','
    if sign() == ']':
        at, after = at + 1, ']'
    while after == ',':
        number += 1
        where = f'{path}, element {number}'
        sign()  # the spaces before it
        if text := _text_of(element(where), where, column):
            yield decoder.characters(text, where)
        after = sign()
        at += 1
    if after != ']' or sign():
        what = 'more text after the end of the array' if after == ']' else f'no comma and no ] after element {number}'
        raise InputError(f'{path}: {what}; write an object a line, or one array of objects')


_SPACES = re.compile(r'\s*')


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise InputError(f'{where}: nested too deeply; correct or remove it') from None
    except ValueError as error:
        raise InputError(f'{where}: not JSON ({first_line(error)}); correct or remove it') from None


def _text_of(row: Any, where: str, column: str) -> str:
    if not isinstance(row, dict) or column not in row:
        raise InputError(f'{where}: no JSON object with the key {column!r}; name it with --config.data.column')
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise InputError(f'{where}: {column!r} is not text; name another key with --config.data.column')
    return text or ''


def parquet_rows(path: pathlib.Path, column: str, share: tuple[int, int], decoder: Decoder) -> Iterator[str]:
    """The texts of a share of a parquet file's row groups; rows without text are left out.

    Args:
      path: the file.
      column: that holds the text.
      share: (i, n): the i-th of n shares, from 0.
      decoder: decides on invalid UTF-8.

    Raises InputError where it is no parquet file, or has no such column of text.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if names.count(column) != 1:
                what = 'no such column, only' if column not in names else 'several columns of that name among'
                raise InputError(f'data.column={column}: {path} has {what} {", ".join(names)}')
            check_text_type(file.schema_arrow.field(column).type, column, str(path))
            number, shares = share
            count = file.num_row_groups
            groups = list(range(number * count // shares, (number + 1) * count // shares))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[column]) if groups else ():
                for data in text_bytes(batch.column(0)):
                    if data:
                        yield decoder.text(data, f'a row of {path}')
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f'{path}: not a parquet file, or damaged ({first_line(error)}); replace it') from None


def check_text_type(type_: Any, column: str, where: str) -> None:
    """Raises InputError, naming `column` and `where` it is, where a `pyarrow.DataType` is none of text.

    A column of bytes is taken to hold text, too: who decodes them sees whether they do.
    """
    import pyarrow
    from pyarrow import types

    plain = type_.storage_type if isinstance(type_, pyarrow.BaseExtensionType) else type_  # such as JSON's
    plain = plain.value_type if types.is_dictionary(plain) else plain
    of_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    of_bytes = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    if not any(is_(plain) for is_ in (*of_text, *of_bytes)):
        raise InputError(f'data.column={column}: of type {type_} in {where}, not text; name another column')


def text_bytes(array: Any) -> list[bytes | None]:
    """A `pyarrow.Array` of one of those types, as UTF-8; None where there is no text.

    As bytes, since pyarrow takes a writer's word that they are UTF-8.
    """
    import pyarrow
    from pyarrow import types

    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pyarrow.large_binary()).to_pylist()
