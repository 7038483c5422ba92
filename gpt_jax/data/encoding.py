"""Documents -> token ids, in pieces: memory stays bounded and all cores work, be it many documents or one long one."""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from gpt_jax.data.tokenizer import Tokenizer

PIECE_CHARACTERS = 2**15
BATCH_CHARACTERS = 2**22
# GPT-2's pre-tokenizer cuts between the last character of a line and its end, whatever stands around it.
_LINE_END = re.compile(r'\S(?=\n)')


class Counted:
    """Iterates once over `documents` and keeps count.

    Attributes:
      documents: how many have passed.
      bytes: their length in UTF-8.
    """

    def __init__(self, documents: Iterable[str]):
        self.documents = self.bytes = 0
        self._source = documents

    def __iter__(self) -> Iterator[str]:
        for document in self._source:
            self.documents += 1
            self.bytes += len(document.encode())
            yield document


def up_to(limit: int, texts: Iterable[str]) -> Iterator[str]:
    """The first of `texts`, until they have `limit` characters together."""
    characters = 0
    for text in texts:
        if characters >= limit:
            return
        characters += len(text)
        yield text


def pieces(document: str) -> Iterator[str]:
    """Cuts a document at ends of lines into pieces of 2^15 characters or, where lines are long, more.

    GPT-2's pre-tokenizer never joins what stands on both sides of such a cut, and characters stand alone anyway: the
    ids of the pieces, joined, are the ids of the document.
    """
    start = 0
    while start < len(document):
        cut = _LINE_END.search(document, start + PIECE_CHARACTERS)
        end = cut.end() if cut else len(document)
        yield document[start:end]
        start = end


def token_chunks(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """Ids of all documents in order, end of text after each, as int64 arrays of some million tokens at most."""
    batch: list[tuple[str, bool]] = []  # a piece, and whether its document ends with it
    characters = 0
    for document in documents:
        parts = list(pieces(document)) or ['']
        for number, piece in enumerate(parts, start=1):
            batch.append((piece, number == len(parts)))
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield _encode(tokenizer, batch)
                batch, characters = [], 0
    yield _encode(tokenizer, batch)


def _encode(tokenizer: Tokenizer, batch: list[tuple[str, bool]]) -> np.ndarray:
    ids = []
    for piece_ids, (_, ends_document) in zip(tokenizer.encode_batch([piece for piece, _ in batch]), batch, strict=True):
        ids += piece_ids
        if ends_document:
            ids.append(tokenizer.end_of_text)
    return np.array(ids, np.int64)
