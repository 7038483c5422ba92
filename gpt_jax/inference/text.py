"""From tokens to text as they come: never half a character, and nothing of a stop string."""

import codecs
import unicodedata
from collections.abc import Iterable, Sequence

from gpt_jax.data import Tokenizer
from gpt_jax.inference.stop_strings import StopFilter


class TextStream:
    """The text of a growing continuation, piece by piece; joined, the pieces are what `Tokenizer.decode` gives."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """The text ends before the first of the strings `stop`."""
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self._filter = StopFilter(stop)

    def feed(self, tokens: Iterable[int]) -> str:
        """Takes the next tokens and gives what may be shown: a character once its last byte is there."""
        data = b''.join(map(self._tokenizer.token_bytes, tokens))
        return self._filter.feed(self._characters.decode(data))

    def flush(self) -> str:
        """What was held back, at the end; bytes that never became a character are U+FFFD."""
        return self._filter.feed(self._characters.decode(b'', final=True)) + self._filter.flush()


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The whole text of a continuation, up to the first of the strings `stop`."""
    stream = TextStream(tokenizer, stop)
    return stream.feed(tokens) + stream.flush()


def harmless(text: str) -> str:
    r"""`text` for a terminal: control characters but line end and tab are spelled out, such as \x1b.

    A model has read whatever its corpus held, and a terminal obeys what it is sent.
    """
    if text.isprintable():
        return text
    return ''.join(
        character.encode('unicode_escape').decode()
        if character not in '\n\t' and unicodedata.category(character) == 'Cc'
        else character
        for character in text
    )
