"""Corpora in local files: plain text, JSON lines (also compressed), parquet.

Plain text is one document a file ('file'), one a block between blank lines ('block'), or all of it one running text
whose last tenth is held out ('whole'). With a separator it is one between two of them, and within these one a block
where blocks are asked for. In all but a running text, documents are held out by the hash of their text. A running text
has none to hash, so a passage that stands in it twice may be in both splits.
"""

import bisect
import dataclasses
import functools
import glob
import hashlib
import json
import mmap
import os
import pathlib
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gpt_jax.config import DataConfig
from gpt_jax.data import corpus as corpora
from gpt_jax.data import formats
from gpt_jax.data.corpus import Corpus, Decoder, Part, Passage, by_hash, split_of, split_stretches
from gpt_jax.data.formats import ENDLESS, FileFormat, blocks, detect, json_rows, parquet_rows, texts
from gpt_jax.data.tokenizer import safe_end
from gpt_jax.errors import InputError, one_line
from gpt_jax.files import check_local, read_json, replacing, sha256

TEXT_FRACTION = 0.1  # of the characters of a running text
DOCUMENTS_FRACTION = 0.05
SUMS = 'files.json'  # in the cache folder: path -> [size, time of change, sha256]
LARGE = 64 * 2**20  # bytes; smaller files are read each time
# A file changed so shortly ago may change again without a later time of change, and is not remembered.
SETTLED_NS = 2 * 10**9
ROWS = ('json', 'parquet')  # kinds whose documents are rows
BLANK_LINES = r'\n(?:[ \t\r]*\n)+'
# A part may end after such bytes, or after a separator where there is one.
BOUNDARIES = {
    'json': re.compile(rb'\n'),
    'block': re.compile(BLANK_LINES.encode()),
    # A cut as `tokenizer.pieces` makes it, for certain: no space of Unicode ends in these bytes.
    'whole': re.compile(rb'[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=[ \t\r\n])'),
}
_FORM = 'name existing .txt, .jsonl or .parquet files'


@dataclasses.dataclass(frozen=True)
class LocalCorpus(Corpus):
    """Local files. A part is bytes of a file; of parquet, share `start` of `stop`; of 'file', files from start to stop.

    Attributes:
      paths: the files in their order.
      kind: 'whole', 'file', 'block', 'separated', 'json' or 'parquet'.
      column: of the last two: where the text is.
      fraction: share of the documents that is held out; of 'whole', of the characters.
      replaces: whether invalid UTF-8 is replaced.
      cache: the folder that remembers the files' sums.
      formats: of each file.
      separator: that stands between the documents of plain text; '': none does.
      passed_over: what the path matches beside files: pipes, sockets, devices.
    """

    paths: tuple[pathlib.Path, ...]
    kind: str
    column: str
    fraction: float
    replaces: bool
    cache: pathlib.Path
    formats: tuple[FileFormat, ...]
    separator: str = ''
    passed_over: tuple[pathlib.Path, ...] = ()
    name: str = 'text'

    @property
    def label(self) -> str:
        """The first of its files, and how many others there are."""
        others = f' and {len(self.paths) - 1} others' if len(self.paths) > 1 else ''
        return one_line(f'data.path={self.paths[0]}{others}')

    @property
    def key(self) -> str:
        """The fingerprint: local text costs no network."""
        return self.fingerprint

    @property
    def fingerprint(self) -> str:
        """Of the files' content, not of their names."""
        column = self.column if self.kind in ROWS else ''
        settings: list[Any] = [self.kind, column, self.fraction, self.replaces]
        settings.append([file['sha256'] for file in self._files])
        if self.separator:
            settings.append(['separator', self.separator])
        if self.kind not in ROWS and any(format_.bom for format_ in self.formats):
            # Earlier versions, whose data have no such entry, took the mark for a character of the text.
            settings.append('no byte order marks')
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @property
    def split_rule(self) -> str:
        """What is held out."""
        if self.kind == 'whole':
            return f'the last {self.fraction} of the characters; text that is repeated may be in both splits'
        return by_hash(self.fraction)

    def source(self) -> dict[str, Any]:
        """The files, with their sizes and sums."""
        return {'kind': self.kind, 'files': self._files} | ({'separator': self.separator} if self.separator else {})

    def decoder(self) -> Decoder:
        """As `data.invalid_bytes` says."""
        return Decoder(self.replaces)

    def parts(self) -> Sequence[Part]:
        """Files, or stretches of large ones."""
        if self.kind == 'file':
            return list(self._groups())
        parts = []
        for path, format_, file in zip(self.paths, self.formats, self._files, strict=True):
            size = file['bytes']
            if self.kind == 'parquet':
                shares = -(-size // corpora.PART_BYTES)
                parts += [Part(str(path), share, shares, size=size // shares) for share in range(shares)]
            elif format_.compression or (self.kind == 'json' and format_.kind == 'array'):
                parts.append(Part(str(path), 0, ENDLESS, size=size))
            elif self.kind == 'json':
                parts += self._stretches(path, 0, size)
            elif self.kind != 'whole':
                parts += self._stretches(path, format_.bom, size)
        return self._halves() if self.kind == 'whole' else parts

    def read(self, part: Part, decoder: Decoder) -> Iterator[Passage]:
        """The passages of a part."""
        path = pathlib.Path(part.file)
        if self.kind == 'whole':
            yield from _running(path, part, decoder)
            return
        if self.kind == 'json':
            documents = json_rows(path, self.column, part.start, part.stop, decoder)
        elif self.kind == 'parquet':
            documents = parquet_rows(path, self.column, (part.start, part.stop), decoder)
        elif self.kind == 'file':
            documents = (''.join(texts(path, decoder)) for path in self.paths[part.start : part.stop])
        else:
            documents = self._cut(texts(path, decoder, part.start, part.stop))
        for text in documents:
            if text:
                yield Passage(split_of(text, self.fraction), text)

    def notices(self, end_of_text: Iterable[str]) -> Iterator[str]:
        """What looks like a mistake, in a line each with the way out.

        Args:
          end_of_text: markers that end documents in other people's files.
        """
        for path in self.passed_over:
            yield one_line(f'data.path: passed over {path}, which is no regular file')
        if self.kind in ROWS:
            return
        for path, format_ in zip(self.paths, self.formats, strict=True):
            if format_.row:
                yield one_line(
                    f'data.path={path} looks like rows of JSON and is trained on as text, braces and all; to train on '
                    f'what their key {self.column!r} holds, name it .jsonl'
                )
                break
        for marker in dict.fromkeys(end_of_text) if not self.separator else ():
            count, complete = self._count(marker.encode())
            if count:
                yield (
                    f'{self.label}: {"" if complete else "at least "}{count} times {marker} in the text, taken for '
                    f'ordinary text; to end documents there: --config.data.separator={shlex.quote(marker)}'
                )

    def empty_split(self, split: str) -> InputError:
        """As of every corpus; of a running text, in characters."""
        if self.kind != 'whole':
            return super().empty_split(split)
        count = sum(len(text) for path in self.paths for text in texts(path, self.decoder()))
        way = 'name a larger file' if count < 2 else 'set --config.data.validation_fraction=0.5'
        return InputError(
            f'the {split} split of {self.label} is empty: there is none of {count} characters for it with '
            f'data.validation_fraction={self.fraction}; {way}'
        )

    def _cut(self, stretches: Iterator[str]) -> Iterator[str]:
        """The documents of plain text that is cut by separators, by blank lines, or by both."""
        if not self.separator:
            yield from _parted(stretches)
            return
        for text in split_stretches(stretches, self.separator):
            if self.kind == 'block':
                yield from _parted(iter((text,)))
            elif not text.isspace():  # what is left between a separator and the end of the file, say
                yield text

    def _count(self, marker: bytes) -> tuple[int, bool]:
        """How often `marker` stands in the first LARGE bytes, and whether these are all."""
        count, left = 0, LARGE
        for path in self.paths:
            tail = b''
            for data in blocks(path):
                data = tail + data
                count += data.count(marker)
                tail = data[max(len(data) - len(marker) + 1, 0) :]
                left -= len(data)
                if left <= 0:
                    return count, False
        return count, True

    @functools.cached_property
    def _files(self) -> list[dict[str, Any]]:
        files = describe_files(self.paths, self.cache)
        sizes = [file['bytes'] - format_.bom for file, format_ in zip(files, self.formats, strict=True)]
        if not any(sizes):
            mark = ' but for a byte order mark' if any(format_.bom for format_ in self.formats) else ''
            raise InputError(f'{self.label}: the file is empty{mark}; name one with text in it')
        if self.kind not in ROWS and not any(
            text.strip() for path in self.paths for text in texts(path, Decoder(replaces=True))
        ):
            raise InputError(
                f'{self.label}: {sum(sizes)} bytes of nothing but white space; name a file with text in it'
            )
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
        for number, (path, format_, file) in enumerate(zip(self.paths, self.formats, self._files, strict=True)):
            cut = middle if number == middle_file else file['bytes'] if number < middle_file else 0
            cut = max(cut, format_.bom)
            before += self._stretches(path, format_.bom, cut, 'train')
            after += self._stretches(path, cut, file['bytes'], 'validation')
        return before + after

    @functools.cached_property
    def _middle(self) -> tuple[int, int]:
        """File and byte where the validation part of a running text begins."""
        counts, places = [0], [(0, self.formats[0].bom)]  # characters before each block, and where it begins
        decoder = self.decoder()
        for number, path in enumerate(self.paths):
            position = self.formats[number].bom
            for data in blocks(path, position):
                places[-1] = (number, position)
                counts.append(counts[-1] + len(decoder.text(data, f'data.path={path}', position)))
                position += len(data)
                places.append((number, position))
        target = int(counts[-1] * (1 - self.fraction))
        block = max(bisect.bisect_right(counts, target) - 1, 0)
        number, position = places[block]
        with open(self.paths[number], 'rb') as file:
            file.seek(position)
            data = file.read(formats.BLOCK_BYTES + 4)  # the block and what may be left of the one before
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
                    end = self._boundary(content, start, start + corpora.PART_BYTES, stop)
                yield Part(str(path), start, end, split, ends_document=end == stop, size=end - start)
                start = end

    def _boundary(self, content: mmap.mmap, start: int, wanted: int, stop: int) -> int:
        """The end of a part that begins at `start`: the first place after `wanted` where one may end."""
        boundary = re.compile(re.escape(self.separator.encode())) if self.separator else BOUNDARIES[self.kind]
        # Which of several equal signs make up a separator is known only from the beginning.
        found = boundary.finditer(content, start if overlaps_itself(self.separator) else wanted, stop)
        return next((match.end() for match in found if match.end() > wanted), stop)


def load_local(config: DataConfig, in_mixture: bool = False) -> LocalCorpus:
    """The files that `data.path` names.

    Args:
      config: with a `path`.
      in_mixture: a separator that does not occur in the files is for others.

    Raises InputError where there are none, or of several kinds, or where `data.separator` does not occur in them.
    """
    paths, passed_over = find_files(config.path, f'data.path={config.path}')
    found = [detect(path) for path in paths]
    kinds = {_kind(path, format_, config) for path, format_ in zip(paths, found, strict=True)}
    if len(kinds) > 1:
        raise InputError(f'data.path={config.path}: matches files of several kinds; name one kind, such as *.jsonl')
    kind = kinds.pop()
    separator = config.separator or ''
    if separator and (kind in ROWS or not any(_holds(path, separator) for path in paths)):
        if not in_mixture:
            why = 'a document is a row' if kind in ROWS else 'it does not occur'
            raise InputError(f'data.separator={separator!r}: {why} in data.path={config.path}; correct or unset it')
        separator = ''
    if separator and kind != 'block':
        kind = 'separated'
    fraction = config.validation_fraction or (TEXT_FRACTION if kind == 'whole' else DOCUMENTS_FRACTION)
    replaces = config.invalid_bytes == 'replace'
    corpus = LocalCorpus(
        tuple(paths), kind, config.column, fraction, replaces, config.cache, tuple(found), separator, tuple(passed_over)
    )
    corpus.source()  # files that cannot be read are refused here
    return corpus


def _kind(path: pathlib.Path, format_: FileFormat, config: DataConfig) -> str:
    if format_.kind == 'parquet':
        return 'parquet'
    # Files of source code, each a document, are often in JSON as well.
    is_source = format_.named == 'json' and config.documents == 'file' and not format_.compression
    if not (format_.named or format_.compression) or (is_source and config.column not in format_.row):
        return config.documents
    if format_.named == 'json' and format_.kind == 'object':
        way = f'write an object a line, as jq -c . {shlex.quote(str(path))} does'
        raise InputError(f'data.path={path}: neither an object a line nor one array of objects; {way}')
    return 'json'


def _holds(path: pathlib.Path, separator: str) -> bool:
    try:
        if not os.path.getsize(path):
            return False
        with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(separator.encode()) >= 0
    except OSError as error:
        raise InputError(f'data.path={path}: cannot be read ({error.strerror}); name a readable file') from None


def find_files(pattern: str, name: str) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The files that a path or a pattern names, sorted, and what else it matches that is no folder.

    What is there under the very name is taken by it; a pattern is matched only where nothing is. Folders at its
    beginning that exist are taken by their names, too, so that `texts [1]/*.txt` is what it seems.

    Args:
      pattern: a path, in which *, ?, [...] and ** may stand for others.
      name: what messages call it.

    Raises InputError where there is no file.
    """
    if not pattern.strip():
        raise InputError(f'{name} is empty; {_FORM}')
    if '\0' in pattern:
        raise InputError(f'{name}: no such file; {_FORM}')
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        raise InputError(f'{name}: is a directory; name a file, or files as {os.path.join(pattern, "*.txt")}')
    if os.path.exists(path):
        return [pathlib.Path(path)], []  # whether it is a regular file is seen when it is opened
    found = sorted(map(pathlib.Path, _matches(path)))
    files = [path for path in found if path.is_file()]
    rest = [path for path in found if not path.is_file() and not path.is_dir()]
    if not files:
        check_local(path, name)
        what = f'no file, but {rest[0]}: a pipe, a socket, a device or a broken link' if rest else 'no such file'
        raise InputError(f'{name}: {what}; {_FORM}')
    return files, rest


def is_there(pattern: str) -> bool:
    """Whether a path or pattern names files, as `find_files` takes it."""
    try:
        return bool(find_files(pattern, pattern))
    except InputError:
        return False


def _matches(path: str) -> list[str]:
    parts = pathlib.Path(path).parts
    # As many folders from the beginning as there are by these very names.
    count = next((n for n in range(len(parts), 0, -1) if os.path.isdir(os.path.join(*parts[:n]))), 0)
    head, tail = (os.path.join('', *some) for some in (parts[:count], parts[count:]))
    found = glob.glob(os.path.join(glob.escape(head), tail), recursive=True)
    # Brackets are in names more often than they are meant as a choice of letters.
    return found or glob.glob(os.path.join(glob.escape(head), tail.replace('[', '[[]')), recursive=True)


def overlaps_itself(text: str) -> bool:
    """Whether two copies of a text can share letters, as those of '--' in '---'."""
    return any(text.endswith(text[:size]) for size in range(1, len(text)))


def _running(path: pathlib.Path, part: Part, decoder: Decoder) -> Iterator[Passage]:
    rest = ''
    for text in texts(path, decoder, part.start, part.stop):
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
            status = os.stat(path)
            size = status.st_size
            state = [size, status.st_mtime_ns]
            is_known = size >= LARGE and known.get(key, [])[:2] == state
            # Files of /proc say that they are empty, and some of them never end.
            digest = known[key][2] if is_known else sha256(path) if size else hashlib.sha256().hexdigest()
        except OSError as error:
            raise InputError(f'data.path={path}: cannot be read ({error.strerror}); name a readable file') from None
        if not is_known and size >= LARGE and time.time_ns() - status.st_mtime_ns > SETTLED_NS:
            new[key] = [*state, digest]
        files.append({'path': str(path), 'bytes': size, 'sha256': digest})
    if new:
        _write_sums(memory, known | new)
    return files


def _read_sums(memory: pathlib.Path) -> dict[str, list]:
    try:
        known = read_json(memory)
    except InputError:
        return {}  # none yet, or damaged: the files are read again
    entries = known.values() if isinstance(known, dict) else [None]
    whole = all(isinstance(entry, list) and [*map(type, entry)] == [int, int, str] for entry in entries)
    return known if whole else {}


def _write_sums(memory: pathlib.Path, known: dict[str, list]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(memory) as file:
            file.write(json.dumps(known).encode())
    except OSError:
        return  # a folder that others own, or a full disk: then the files are read at every start
