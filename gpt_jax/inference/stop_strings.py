"""Stop strings: a continuation ends as soon as it contains one of them, whatever tokens it is made of.

`StopStrings` watches whole continuations while they are generated, `StopFilter` a text that is shown as it grows. The
tokens of a stopped continuation are those up to the one that completed the stop string, as Hugging Face has it; its
text ends before the stop string.
"""

from collections.abc import Sequence

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError


class StopStrings:
    """What ends a continuation; for `Ending.stop`.

    Attributes:
      strings: as given.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        """Watches for `strings`; raises InputError where one is empty."""
        if not all(strings):
            raise InputError("stop='' is in every text; give at least one character, or leave it out")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # In bytes: a token may hold a part of a character. No character's encoding is found inside another's.
        self._encoded = [string.encode() for string in strings]

    def __call__(self, tokens: Sequence[int]) -> int | None:
        """How many of the new tokens there are once the first stop string is complete; None: there is none."""
        pieces = [self._tokenizer.token_bytes(token) for token in tokens]
        text = b''.join(pieces)
        ends = [start + len(stop) for stop in self._encoded if (start := text.find(stop)) >= 0]
        if not ends:
            return None
        length = 0
        for count, piece in enumerate(pieces, 1):
            length += len(piece)
            if length >= min(ends):
                return count
        raise AssertionError('a match ends within its text')

    def cut(self, text: str) -> str:
        """`text` up to the stop string that is the first to be complete; all of it where there is none."""
        return text[: _first(text, self.strings)]


class StopFilter:
    """Passes on a growing text, but nothing that may turn out to be the start of a stop string.

    Attributes:
      stopped: whether a stop string was found; what comes after it is swallowed.
    """

    def __init__(self, strings: Sequence[str]):
        """Looks for `strings`, none of them empty."""
        self.stopped = False
        self._strings = tuple(strings)
        self._held = ''

    def feed(self, piece: str) -> str:
        """Takes the next piece of the text and gives what may be shown of all so far and was not given before."""
        if self.stopped:
            return ''
        text = self._held + piece
        start = _first(text, self._strings)
        if start is not None:
            self.stopped, self._held = True, ''
            return text[:start]
        held = max((_overlap(text, stop) for stop in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What is held back, at the end of a text that no stop string ended."""
        held, self._held = self._held, ''
        return held


def _first(text: str, strings: Sequence[str]) -> int | None:
    """Where the stop string begins that is the first to be complete; of several at once, the one that begins first."""
    found = [(start + len(stop), start) for stop in strings if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the start of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
