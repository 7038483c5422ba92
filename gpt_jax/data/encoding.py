"""Text -> token ids, in pieces: memory stays bounded and all cores work, be it many documents or one long one."""

import array
import re
from collections.abc import Iterable, Iterator

import numpy as np

from gpt_jax.data.corpus import Passage
from gpt_jax.data.tokenizer import Tokenizer

PIECE_CHARACTERS = 2**15
LONGEST_PIECE = 2**16
LONGEST_WORD = 1000
BATCH_CHARACTERS = 2**22
# GPT-2's pre-tokenizer cuts between any other character and a space that follows it, whatever stands around them.
_WORD_END = re.compile(r'\S(?=\s)')
_ENDLESS_WORD = re.compile(rf'(\S{{{LONGEST_WORD}}})\S+')


def up_to(limit: int, texts: Iterable[str]) -> Iterator[str]:
    """The first of `texts`, until they have `limit` characters together."""
    characters = 0
    for text in texts:
        if characters >= limit:
            return
        characters += len(text)
        yield text


def pieces(text: str) -> Iterator[str]:
    """Cuts a text before spaces or ends of lines into pieces of about 2^15 characters.

    GPT-2's pre-tokenizer never joins what stands on both sides of such a cut, and characters stand alone anyway: the
    ids of the pieces, joined, are the ids of the text. Only where 2^16 characters hold no such place they are cut
    regardless, since the work on one word grows faster than its length: there the ids may differ.
    """
    start = 0
    while start < len(text):
        end = min(start + LONGEST_PIECE, len(text))
        if len(text) - start > PIECE_CHARACTERS and (cut := _WORD_END.search(text, start + PIECE_CHARACTERS - 1, end)):
            end = cut.end()
        yield text[start:end]
        start = end


def shorten_words(text: str) -> str:
    """`text` with the first 1000 characters of words longer than that.

    BPE learns from a word in the square of its length, and holds some 50 bytes for each character of different ones: of
    hundreds of megabytes without a space, gigabytes.
    """
    return _ENDLESS_WORD.sub(r'\1', text)


def safe_end(text: str) -> int:
    """Where the last such cut of `text` is; its length where there is none."""
    for end in range(len(text) - 1, 0, -1):
        if text[end].isspace() and not text[end - 1].isspace():
            return end
    return len(text)


def token_chunks(tokenizer: Tokenizer, passages: Iterable[Passage]) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids) of all passages in order, end of text after each document; ids uint32, some million at most."""
    batch: list[Passage] = []
    characters = 0
    for passage in passages:
        left = len(passage.text)
        # One by one: all pieces of a document together would take its memory once more.
        for piece in pieces(passage.text) if left else ('',):
            left -= len(piece)
            batch.append(Passage(passage.split, piece, passage.ends_document and left == 0))
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield from _encode(tokenizer, batch)
                batch, characters = [], 0
    yield from _encode(tokenizer, batch)


def _encode(tokenizer: Tokenizer, batch: list[Passage]) -> Iterator[tuple[str, np.ndarray]]:
    ids: dict[str, list[int]] = {}
    encoded = tokenizer.encode_batch([passage.text for passage in batch])
    for piece_ids, passage in zip(encoded, batch, strict=True):
        of_split = ids.setdefault(passage.split, [])
        of_split += piece_ids
        if passage.ends_document:
            of_split.append(tokenizer.end_of_text)
    for split, of_split in ids.items():
        # Three times as fast as numpy is with a list.
        yield split, np.frombuffer(array.array('I', of_split), np.uint32)
