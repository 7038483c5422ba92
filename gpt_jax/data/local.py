"""Corpora in local files: plain text, JSON lines (also compressed), parquet.

Plain text is one document a file ('file'), one a block between blank lines ('block'), or all of it one running text
whose last tenth is held out ('whole'). In all but the last, documents are held out by the hash of their text. A running
text has none to hash, so a passage that stands in it twice may be in both splits.

JSON lines and parquet are read with json and pyarrow. `datasets`, which reads those of the hub, cannot start in the
middle of a file of JSON lines, so that a large one would keep one process busy and the others waiting, and it does not
say in which line an error is.
"""

import bisect
import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import json
import mmap
import os
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from gpt_jax.config import DataConfig
from gpt_jax.data import corpus as corpora
from gpt_jax.data.corpus import Corpus, Decoder, Part, Passage, by_hash, split_of
from gpt_jax.data.tokenizer import safe_end
from gpt_jax.errors import InputError, first_line
from gpt_jax.files import replacing, sha256

TEXT_FRACTION = 0.1  # of the characters of a running text
DOCUMENTS_FRACTION = 0.05
BLOCK_BYTES = 2**22
ENDLESS = 2**62  # where a compressed file ends is not known before it was read
BATCH_ROWS = 64
COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd'}
LINE_BYTES = 2**28  # a longer line of JSON is no document
SUMS = 'files.json'  # in the cache folder: path -> [size, time of change, sha256]
LARGE = 64 * 2**20  # bytes; smaller files are read each time
# A file changed so shortly ago may change again without a later time of change, and is not remembered.
SETTLED_NS = 2 * 10**9
KINDS = {'.jsonl': 'json', '.parquet': 'parquet'}
BLANK_LINES = r'\n(?:[ \t\r]*\n)+'
# A part may end after such bytes.
BOUNDARIES = {
    'json': re.compile(rb'\n'),
    'block': re.compile(BLANK_LINES.encode()),
    # A cut as `tokenizer.pieces` makes it, for certain: no space of Unicode ends in these bytes.
    'whole': re.compile(rb'[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=[ \t\r\n])'),
}


@dataclasses.dataclass(frozen=True)
class LocalCorpus(Corpus):
    """Local files. A part is bytes of a file; of parquet, share `start` of `stop`; of 'file', files from start to stop.

    Attributes:
      paths: the files in their order.
      kind: 'whole', 'file', 'block', 'json' or 'parquet'.
      column: of the last two: where the text is.
      fraction: share of the documents that is held out; of 'whole', of the characters.
      replaces: whether invalid UTF-8 is replaced.
      cache: the folder that remembers the files' sums.
    """

    paths: tuple[pathlib.Path, ...]
    kind: str
    column: str
    fraction: float
    replaces: bool
    cache: pathlib.Path
    name: str = 'text'

    @property
    def key(self) -> str:
        """The fingerprint: local text costs no network."""
        return self.fingerprint

    @property
    def fingerprint(self) -> str:
        """Of the files' content, not of their names."""
        column = self.column if self.kind in KINDS.values() else ''
        settings = [self.kind, column, self.fraction, self.replaces, [file['sha256'] for file in self._files]]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @property
    def split_rule(self) -> str:
        """What is held out."""
        if self.kind == 'whole':
            return f'the last {self.fraction} of the characters; text that is repeated may be in both splits'
        return by_hash(self.fraction)

    def source(self) -> dict[str, Any]:
        """The files, with their sizes and sums."""
        return {'kind': self.kind, 'files': self._files}

    def decoder(self) -> Decoder:
        """As `data.invalid_bytes` says."""
        return Decoder(self.replaces)

    def parts(self) -> Sequence[Part]:
        """Files, or stretches of large ones."""
        if self.kind == 'file':
            return list(self._groups())
        parts = []
        for path, file in zip(self.paths, self._files, strict=True):
            size = file['bytes']
            if self.kind == 'parquet':
                shares = -(-size // corpora.PART_BYTES)
                parts += [Part(str(path), share, shares, size=size // shares) for share in range(shares)]
            elif compressed(path):
                parts.append(Part(str(path), 0, ENDLESS, size=size))
            elif self.kind != 'whole':
                parts += self._stretches(path, 0, size)
        return self._halves() if self.kind == 'whole' else parts

    def read(self, part: Part, decoder: Decoder) -> Iterator[Passage]:
        """The passages of a part."""
        path = pathlib.Path(part.file)
        if self.kind == 'whole':
            yield from _running(path, part, decoder)
            return
        if self.kind == 'json':
            texts = json_rows(path, self.column, part.start, part.stop, decoder)
        elif self.kind == 'parquet':
            texts = parquet_rows(path, self.column, (part.start, part.stop), decoder)
        elif self.kind == 'block':
            texts = _parted(_texts(path, part.start, part.stop, decoder))
        else:
            texts = (''.join(_texts(path, 0, ENDLESS, decoder)) for path in self.paths[part.start : part.stop])
        for text in texts:
            if text:
                yield Passage(split_of(text, self.fraction), text)

    @functools.cached_property
    def _files(self) -> list[dict[str, Any]]:
        files = describe_files(self.paths, self.cache)
        if not any(file['bytes'] for file in files):
            raise InputError(f'data.path={self.paths[0]}: the file is empty; name one with text in it')
        return files

    def _groups(self) -> Iterator[Part]:
        first, size = 0, 0
        for number, file in enumerate(self._files):
            size += file['bytes']
            if size >= corpora.PART_BYTES or number == len(self._files) - 1:
                yield Part(self.paths[first].name, first, number + 1, size=size)
                first, size = number + 1, 0

    def _halves(self) -> list[Part]:
        """The parts of a running text: those before the place where validation begins, and those after it."""
        middle_file, middle = self._middle
        before, after = [], []
        for number, (path, file) in enumerate(zip(self.paths, self._files, strict=True)):
            cut = middle if number == middle_file else file['bytes'] if number < middle_file else 0
            before += self._stretches(path, 0, cut, 'train')
            after += self._stretches(path, cut, file['bytes'], 'validation')
        return before + after

    @functools.cached_property
    def _middle(self) -> tuple[int, int]:
        """File and byte where the validation part of a running text begins."""
        counts, places = [0], [(0, 0)]  # characters before each block, and where it begins
        decoder = self.decoder()
        for number, path in enumerate(self.paths):
            position = 0
            for data in _read_blocks(path):
                places[-1] = (number, position)
                counts.append(counts[-1] + len(decoder.text(data, f'data.path={path}', position)))
                position += len(data)
                places.append((number, position))
        target = int(counts[-1] * (1 - self.fraction))
        block = max(bisect.bisect_right(counts, target) - 1, 0)
        number, position = places[block]
        with open(self.paths[number], 'rb') as file:
            file.seek(position)
            data = file.read(BLOCK_BYTES + 4)  # the block and what may be left of the one before
        characters = target - counts[block]
        # The longest beginning of so many characters: the first byte of one more would count as one.
        ends = range(len(data) + 1)
        length = bisect.bisect_right(ends, characters, key=lambda end: len(data[:end].decode(errors='replace'))) - 1
        return number, position + length

    def _stretches(self, path: pathlib.Path, start: int, stop: int, split: str = '') -> Iterator[Part]:
        """Cuts bytes of a file into parts, after boundaries."""
        if stop <= start:
            return
        with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while start < stop:
                end = stop
                if stop - start > corpora.PART_BYTES:
                    match = BOUNDARIES[self.kind].search(content, start + corpora.PART_BYTES, stop)
                    end = match.end() if match else stop
                yield Part(str(path), start, end, split, ends_document=end == stop, size=end - start)
                start = end


def load_local(config: DataConfig) -> LocalCorpus:
    """The files that `data.path` names. Raises InputError where there are none, or of several kinds."""
    paths = _find(config.path)
    kinds = {_kind(path, config.documents) for path in paths}
    if len(kinds) > 1:
        raise InputError(f'data.path={config.path}: matches files of several kinds; name one kind, such as *.jsonl')
    kind = kinds.pop()
    fraction = config.validation_fraction or (TEXT_FRACTION if kind == 'whole' else DOCUMENTS_FRACTION)
    corpus = LocalCorpus(tuple(paths), kind, config.column, fraction, config.invalid_bytes == 'replace', config.cache)
    corpus.source()  # files that cannot be read are refused here
    return corpus


def _find(pattern: str) -> list[pathlib.Path]:
    path = pathlib.Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise InputError(f'data.path={pattern}: is a directory; name a file, or files as {pattern}/*.txt')
    found = sorted(pathlib.Path(name) for name in glob.glob(str(path), recursive=True))
    found = [path for path in found if path.is_file()]
    if not found:
        raise InputError(f'data.path={pattern}: no such file; name existing .txt, .jsonl or .parquet files')
    return found


def _kind(path: pathlib.Path, documents: str) -> str:
    inner = path.with_suffix('') if compressed(path) else path
    kind = KINDS.get(inner.suffix, documents)
    if compressed(path) and kind != 'json':
        raise InputError(f'data.path={path}: of compressed files only .jsonl is read; uncompress it')
    return kind


def _read_blocks(path: pathlib.Path, start: int = 0, stop: int = ENDLESS) -> Iterator[bytes]:
    """The bytes of a file, some megabytes at a time, no character cut in two."""
    try:
        with open(path, 'rb') as file:
            file.seek(start)
            rest = b''
            while data := file.read(min(BLOCK_BYTES, stop - file.tell())):
                data = rest + data
                end = _whole_characters(data)
                rest = data[end:]
                if end:
                    yield data[:end]
            if rest:
                yield rest
    except OSError as error:
        raise InputError(f'data.path={path}: cannot be read ({error.strerror}); name a readable file') from None


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


def _texts(path: pathlib.Path, start: int, stop: int, decoder: Decoder) -> Iterator[str]:
    for data in _read_blocks(path, start, stop):
        yield decoder.text(data, f'data.path={path}', start)
        start += len(data)


def _running(path: pathlib.Path, part: Part, decoder: Decoder) -> Iterator[Passage]:
    rest = ''
    for text in _texts(path, part.start, part.stop, decoder):
        text = rest + text
        end = safe_end(text)
        if end < len(text):
            yield Passage(part.split, text[:end], ends_document=False)
            text = text[end:]
        rest = text
    if rest:
        yield Passage(part.split, rest, part.ends_document)


def _parted(texts: Iterator[str]) -> Iterator[str]:
    """The blocks between blank lines, without the line ends around them."""
    held, spaces = [], ''  # of a block that goes on: its stretches, and what may be the beginning of a blank line
    for text in texts:
        text = spaces + text
        body = text.rstrip(' \t\r\n')
        spaces = text[len(body) :]
        *ends, rest = re.split(BLANK_LINES, body)
        for end in ends:
            yield _joined(held, end)
        held.append(rest)
    # What is left holds nothing but spaces, blank lines perhaps among them.
    end, *blank = re.split(BLANK_LINES, spaces)
    yield _joined(held, end)
    yield from (block.strip('\r\n') for block in blank)


def _joined(held: list[str], end: str) -> str:
    """One block; nothing of it is held any more when it is given on."""
    held.append(end)
    block = ''.join(held)
    held.clear()
    return block.strip('\r\n')


def parquet_rows(path: pathlib.Path, column: str, share: tuple[int, int], decoder: Decoder) -> Iterator[str]:
    """The texts of a share of a parquet file's row groups; rows without text are left out.

    Args:
      path: the file.
      column: that holds the text.
      share: (i, n): the i-th of n shares, from 0.
      decoder: decides on invalid UTF-8.

    Raises InputError where it is no parquet file, or has no such column of text.
    """
    import pyarrow  # a quarter of a second, and not all corpora need it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise InputError(
                    f'data.column={column}: {path} has no such column, only {", ".join(file.schema_arrow.names)}'
                )
            type_ = file.schema_arrow.field(column).type
            if not (pyarrow.types.is_string(type_) or pyarrow.types.is_large_string(type_)):
                raise InputError(f'data.column={column}: of type {type_} in {path}, not text; name another column')
            number, shares = share
            count = file.num_row_groups
            groups = list(range(number * count // shares, (number + 1) * count // shares))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[column]) if groups else ():
                # As bytes: pyarrow takes the writer's word that they are UTF-8.
                for data in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    if data:
                        yield decoder.text(data, f'a row of {path}')
    except pyarrow.ArrowException as error:
        raise InputError(f'{path}: not a parquet file, or damaged ({first_line(error)}); replace it') from None


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
        raise InputError(f'{path}: not a {path.suffix} file, or damaged ({first_line(error)}); replace it') from None


def compressed(path: pathlib.Path) -> bool:
    """Whether a file must be uncompressed from its beginning."""
    return path.suffix in COMPRESSIONS


def _text_of(line: bytes, where: str, column: str, decoder: Decoder) -> str:
    try:
        row: Any = json.loads(decoder.text(line, where))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{where}: not JSON ({first_line(error)}); correct or remove it') from None
    text = row.get(column, '') if isinstance(row, dict) else None
    if not isinstance(row, dict) or column not in row:
        raise InputError(f'{where}: no JSON object with the key {column!r}; name it with --config.data.column')
    if text is not None and not isinstance(text, str):
        raise InputError(f'{where}: {column!r} is not text; name another key with --config.data.column')
    return text or ''


def describe_files(paths: Iterable[pathlib.Path], cache: pathlib.Path) -> list[dict[str, Any]]:
    """`path`, `bytes` and `sha256` of each file; of large ones the sum is remembered, so that a run starts at once.

    Args:
      paths: the files. Those of LARGE bytes are read only where they are new, or their size or time of change is.
      cache: the folder that remembers them; where it cannot be written nothing is remembered.

    Raises:
      InputError: a file cannot be read.
    """
    memory = cache / SUMS
    known = _read_sums(memory)
    files, new = [], {}
    for path in paths:
        key = str(path.absolute())
        try:
            stat = os.stat(path)
            state = [stat.st_size, stat.st_mtime_ns]
            is_known = stat.st_size >= LARGE and known.get(key, [])[:2] == state
            digest = known[key][2] if is_known else sha256(path)
        except OSError as error:
            raise InputError(f'data.path={path}: cannot be read ({error.strerror}); name a readable file') from None
        if not is_known and stat.st_size >= LARGE and time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
            new[key] = [*state, digest]
        files.append({'path': str(path), 'bytes': stat.st_size, 'sha256': digest})
    if new:
        _write_sums(memory, known | new)
    return files


def _read_sums(memory: pathlib.Path) -> dict[str, list]:
    try:
        known = json.loads(memory.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}  # none yet, or damaged: the files are read again
    return known if isinstance(known, dict) else {}


def _write_sums(memory: pathlib.Path, known: dict[str, list]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(memory) as file:
            file.write(json.dumps(known).encode())
    except OSError:
        return  # a folder that others own, or a full disk: then the files are read at every start
