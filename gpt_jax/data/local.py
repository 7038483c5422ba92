"""Corpora in local files: plain text, JSON lines (also compressed), parquet.

Plain text is one document a file ('file'), one a block between blank lines ('block'), or all of it one running text
whose last tenth is held out ('whole'). In all but the last, documents are held out by the hash of their text. A running
text has none to hash, so a passage that stands in it twice may be in both splits.
"""

import bisect
import dataclasses
import functools
import glob
import hashlib
import json
import mmap
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gpt_jax.config import DataConfig
from gpt_jax.data import corpus as corpora
from gpt_jax.data import digests
from gpt_jax.data.corpus import Corpus, Decoder, Part, Passage, split_of
from gpt_jax.data.encoding import safe_end
from gpt_jax.data.rows import compressed, json_rows, parquet_rows
from gpt_jax.errors import InputError

TEXT_FRACTION = 0.1  # of the characters of a running text
DOCUMENTS_FRACTION = 0.05
BLOCK_BYTES = 2**22
ENDLESS = 2**62  # where a compressed file ends is not known before it was read
KINDS = {'.jsonl': 'json', '.parquet': 'parquet'}
BLANK_LINES = r'\n(?:[ \t\r]*\n)+'
# A part may end after such bytes.
BOUNDARIES = {
    'json': re.compile(rb'\n'),
    'block': re.compile(BLANK_LINES.encode()),
    # A cut as `encoding.pieces` makes it, for certain: no space of Unicode ends in these bytes.
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
        return f'{self.fraction} of the documents, by the hash of their text; copies are in the same split'

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
            texts = parquet_rows(path, part.file, self.column, (part.start, part.stop), decoder)
        elif self.kind == 'block':
            texts = _parted(_texts(path, part.start, part.stop, decoder))
        else:
            texts = (''.join(_texts(path, 0, ENDLESS, decoder)) for path in self.paths[part.start : part.stop])
        for text in texts:
            if text:
                yield Passage(split_of(text, self.fraction), text)

    @functools.cached_property
    def _files(self) -> list[dict[str, Any]]:
        files = digests.describe(self.paths, self.cache)
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
            for data in _blocks(path):
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


def load(config: DataConfig) -> LocalCorpus:
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


def _blocks(path: pathlib.Path, start: int = 0, stop: int = ENDLESS) -> Iterator[bytes]:
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
    for data in _blocks(path, start, stop):
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
