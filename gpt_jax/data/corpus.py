"""What every corpus is: text in two splits, in parts that workers read on their own."""

import abc
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gpt_jax.errors import InputError

SPLITS = ('train', 'validation')
MOST_PLACES = 10_000  # documents that are looked at for a better share of validation
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
      separator: that plain text is cut at, `data.separator`; '': none.
    """

    name: str
    key: str
    fingerprint: str
    split_rule: str
    separator = ''

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name

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

    def notices(self, end_of_text: Iterable[str]) -> Iterator[str]:
        """What looks like a mistake of the user's, in a line each; `end_of_text`: markers that end documents."""
        return iter(())

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
            raise self.empty_split(split)

    def texts(self, part: Part, split: str) -> Iterator[str]:
        """What a part has of `split`, which may be nothing."""
        if part.split in ('', split):
            self.fetch(part)
            yield from (passage.text for passage in self.read(part, self.decoder()) if passage.split == split)

    def decoder(self) -> 'Decoder':
        """What turns the source's bytes into text."""
        return Decoder(replaces=False)

    def empty_split(self, split: str) -> InputError:
        """What to raise where there is nothing for a split; reads documents again, to name a share that helps."""
        texts = (passage.text for part in self.parts() for passage in self._fetched(part))
        places = sorted({_place_of(text) for text in itertools.islice(filter(None, texts), MOST_PLACES)})
        if not places:
            way = 'no document has any text; name a corpus that has some, or another --config.data.column'
        elif len(places) < 2:
            way = 'there is 1 document that differs from others, in one split; name a larger corpus, such as '
            way += '--config.data.path=FILE, or cut a text up, e.g. with --config.data.documents=block'
        else:
            middle = 1 if split == 'validation' else len(places) // 2
            fraction = _between(places[middle - 1], places[middle])
            more = ' or more' if len(places) == MOST_PLACES else ''
            way = f'none of {len(places):,}{more} documents is there; set --config.data.validation_fraction={fraction}'
        return InputError(f'the {split} split of {self.label} is empty ({self.split_rule}): {way}')

    def _fetched(self, part: Part) -> Iterator[Passage]:
        self.fetch(part)
        return self.read(part, self.decoder())


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
    return 'validation' if _place_of(text) < fraction * 2**64 else 'train'


def _place_of(text: str) -> int:
    """Where a document stands among all that may be, from 0 to 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _between(low: int, high: int) -> float:
    """A share, with few digits, that holds out the documents up to `low` and none from `high` on."""
    for digits in range(1, 18):
        fraction = round((low + high) / 2 / 2**64, digits)
        if low < fraction * 2**64 <= high and fraction < 1:
            break
    return fraction


def by_hash(fraction: float) -> str:
    """The `split_rule` of corpora that `split_of` divides."""
    return f'{fraction} of the documents, by the hash of their text; copies are in the same split'


def split_stretches(stretches: Iterable[str], separator: str) -> Iterator[str]:
    """`''.join(stretches).split(separator)`, of which one item at a time is held."""
    held, tail = [], ''  # of an item that goes on: its stretches, and what may be the beginning of a separator
    for text in stretches:
        *ends, last = (tail + text).split(separator)
        for end in ends:
            held.append(end)
            yield ''.join(held)
            held.clear()
        certain = max(len(last) - len(separator) + 1, 0)
        held.append(last[:certain])
        tail = last[certain:]
    yield ''.join([*held, tail])
