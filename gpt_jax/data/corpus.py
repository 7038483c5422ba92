"""What every corpus is: text in two splits, in parts that workers read on their own."""

import abc
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gpt_jax.errors import InputError

SPLITS = ('train', 'validation')
PART_BYTES = 2**26  # of a source, in one part: what a killed preparation loses at most, for each worker
_SURROGATE = re.compile('[\ud800-\udfff]')


class Passage(NamedTuple):
    """A stretch of a document: all of it, or one of several that follow each other.

    Attributes:
      split: 'train' or 'validation'.
      text: cut so that its ids are the document's; see `tokenizer.safe_end`.
      ends_document: whether the document is complete with it.
    """

    split: str
    text: str
    ends_document: bool = True


class Part(NamedTuple):
    """What one worker reads in one go; each kind of corpus says what the numbers mean.

    Attributes:
      file: a name within the corpus.
      start: where in the file, in the corpus's own unit.
      stop: where it ends.
      split: which split all of it is in; '': the corpus decides by document.
      ends_document: whether a document ends with the part, where documents may be longer than one.
      size: bytes of the source, for the progress bar.
    """

    file: str = ''
    start: int = 0
    stop: int = 0
    split: str = ''
    ends_document: bool = True
    size: int = 0


class Corpus(abc.ABC):
    """Text in two splits. Subclasses are dataclasses that can be pickled: workers get a copy.

    Attributes:
      name: as folders and messages call it.
      key: hex sha256 of what was asked for, known without a network; names the folder of the prepared data.
      fingerprint: hex sha256 that stands for the text and its splits; the same text has the same one.
      split_rule: in words, what is held out.
    """

    name: str
    key: str
    fingerprint: str
    split_rule: str

    def resolve(self, recorded: Mapping[str, Any] | None = None) -> 'Corpus':
        """The corpus with all known that reading it takes; asks a network unless a former `source()` is `recorded`."""
        return self

    @abc.abstractmethod
    def parts(self) -> Sequence[Part]:
        """The parts in the order of the text; the same for every number of workers and machines."""

    def fetch(self, part: Part) -> None:  # noqa: B027
        """Makes what the part needs readable, such as by a download; called in the main process, before `read`."""

    @abc.abstractmethod
    def read(self, part: Part, decoder: 'Decoder') -> Iterator[Passage]:
        """The passages of a part from its first one. Raises InputError where the source cannot be read."""

    @abc.abstractmethod
    def source(self) -> dict[str, Any]:
        """Where the text is from, for the manifest."""

    def documents(self, split: str) -> Iterator[str]:
        """The passages' text of `split` ('train' or 'validation') from the first one; call again to start again.

        Raises InputError, while iterating, where the source cannot be read or the split is empty.
        """
        if split not in SPLITS:
            raise ValueError(f'split={split!r}: one of {SPLITS}')
        return self._documents(split)

    def _documents(self, split: str) -> Iterator[str]:
        empty = True
        for part in self.parts():
            for text in self.texts(part, split):
                empty = False
                yield text
        if empty:
            raise empty_split(split, self.name)

    def texts(self, part: Part, split: str) -> Iterator[str]:
        """What a part has of `split`, which may be nothing."""
        if part.split in ('', split):
            self.fetch(part)
            yield from (passage.text for passage in self.read(part, self.decoder()) if passage.split == split)

    def decoder(self) -> 'Decoder':
        """What turns the source's bytes into text."""
        return Decoder(replaces=False)


def empty_split(split: str, name: str) -> InputError:
    """What to raise where a corpus has nothing for a split."""
    return InputError(f'the {split} split of {name} is empty: use a larger corpus, such as --config.data.path=FILE')


@dataclasses.dataclass
class Decoder:
    """UTF-8 to text; what is invalid is refused, or replaced by U+FFFD and counted.

    Attributes:
      replaces: whether it is replaced.
      replaced: how many characters have been put in the place of invalid bytes.
    """

    replaces: bool
    replaced: int = 0

    def text(self, data: bytes, where: str, offset: int = 0) -> str:
        """The text of `data`. Raises InputError, naming `where` and the byte, on invalid UTF-8 that is refused."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if not self.replaces:
                raise _invalid(f'{where}: not UTF-8 at byte {offset + error.start}') from None
        text = data.decode(errors='replace')
        self.replaced += text.count('\ufffd') - data.count('\ufffd'.encode())
        return text

    def characters(self, text: str, where: str) -> str:
        """`text` without lone surrogates, which JSON can hold and UTF-8 cannot; refused or replaced likewise."""
        surrogate = _SURROGATE.search(text)
        if surrogate is None:
            return text
        if not self.replaces:
            raise _invalid(f'{where}: lone surrogate {surrogate[0]!a} at character {surrogate.start()}')
        text, count = _SURROGATE.subn('\ufffd', text)
        self.replaced += count
        return text


def _invalid(what: str) -> InputError:
    return InputError(
        f'{what}; convert it, e.g. with iconv -t UTF-8, or set --config.data.invalid_bytes=replace to put U+FFFD there'
    )


def split_of(text: str, fraction: float) -> str:
    """The split of a document of which `fraction` are held out: by its text, so that copies are never in both."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return 'validation' if draw < fraction * 2**64 else 'train'


def by_hash(fraction: float) -> str:
    """The `split_rule` of corpora that `split_of` divides."""
    return f'{fraction} of the documents, by the hash of their text; copies are in the same split'
