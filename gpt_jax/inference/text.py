"""Text in and out: where prompts come from, tokens to text as they come, stop strings, and where texts are printed.

A continuation ends as soon as it contains a stop string, whatever tokens it is made of. `StopStrings` watches whole
continuations while they are generated, `StopFilter` a text that is shown as it grows. The tokens of a stopped
continuation are those up to the one that completed the stop string, as Hugging Face has it; its text ends before the
stop string.
"""

import codecs
import contextlib
import itertools
import json
import math
import os
import pathlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

import platformdirs

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.files import MOST_BYTES, decoded, read_text
from gpt_jax.inference.generate import Generation

HISTORY_LINES = 1000
LONGEST_LINE = 2**24  # bytes of a prompt that is asked for
# Characters of a prompt: that are cut into tokens at once in any case, and at most.
SHORT, MOST_SLIDING = 2**16, 2**22
NAMED_CHARACTERS = 10


# Prompts.


def read_standard_input(most: int = MOST_BYTES) -> bytes:
    """All of standard input. Raises InputError where it is closed, no file or pipe, or has more than `most` bytes."""
    if sys.stdin is None:
        raise InputError('standard input is closed; give the text by a flag, or from a pipe')
    try:
        data = sys.stdin.buffer.read(most + 1)
    except OSError as error:
        raise InputError(f'standard input cannot be read ({error.strerror}); give text to it, or a flag') from None
    if len(data) > most:
        raise InputError(f'standard input has more than the {most:,} bytes that are read of it')
    return data


def read_prompts(text: str | None, path: str | os.PathLike | None, one_a_line: bool) -> list[str]:
    """The prompt `text`, or those of the file `path`, or those of standard input where both are None.

    Args:
      text: a prompt, of any number of lines.
      path: a file.
      one_a_line: each line is a prompt, an empty one too; else all of it is one prompt. The line end at the end of the
        input is no part of it. Input without a byte is one empty prompt.

    Raises:
      InputError: the file cannot be read or is none, the bytes are not UTF-8, or too many.
    """
    if text is not None:
        return [text]
    if path is None and sys.stdin is not None and sys.stdin.isatty():
        print('prompts, one a line, ended by Ctrl-D:' if one_a_line else 'prompt, ended by Ctrl-D:', file=sys.stderr)
    if path is None:
        text = decoded(read_standard_input(), 'standard input')
    else:
        text = read_text(path, f'--prompt_file={path}')
    text = text.removesuffix('\n').removesuffix('\r')
    return [line.removesuffix('\r') for line in text.split('\n')] if one_a_line else [text]


def check_prompt(prompt: str, tokenizer: Tokenizer, block_size: int, allow_sliding: bool) -> None:
    """Raises InputError where a prompt is far too long, before it is cut into tokens, which takes memory.

    What does not fit in the context is refused later anyway, and where sliding is allowed only its end is read.
    """
    if len(prompt) <= SHORT:
        return
    fits = MOST_SLIDING if allow_sliding else max(block_size * tokenizer.longest_token, SHORT)
    if len(prompt) > fits:
        tokens = len(prompt) // tokenizer.longest_token
        raise InputError(
            f'a prompt has {len(prompt):,} characters, at least {tokens:,} tokens, and the model sees '
            f'block_size={block_size} in all; give its last {fits:,} characters at most'
        )


def remarks(tokenizer: Tokenizer, name: str, texts: Sequence[str], parse_special: bool = False) -> list[str]:
    """What a user may not expect to become of texts that are given as `name`, each in a line."""
    lines, special = [], next(filter(None, map(tokenizer.find_special, texts)), None)
    unknown = tokenizer.unknown_characters(''.join(texts))
    if special is not None and not parse_special:
        lines.append(f'note: {name} holds {special}, which is read as plain text; --parse_special makes it the token')
    if unknown:
        shown = ', '.join(map(repr, unknown[:NAMED_CHARACTERS])) + ', ...' * (len(unknown) > NAMED_CHARACTERS)
        lines.append(
            f'warning: {name} holds characters that the tokenizer does not know, read as its unknown token: {shown}'
        )
    return lines


def prompt_loop(write: Callable[[list[str], int], None]) -> None:
    """Asks for prompts until the input ends (Ctrl-D), and gives each to `write`, with its number from 0.

    Ctrl-C ends a continuation, and where none is under way the loop: KeyboardInterrupt. What a prompt cannot be is said
    in one line, and the next one asked for.
    """
    if sys.stdin is None:
        raise InputError('--interactive asks on standard input, which is closed')
    terminal = sys.stdin.isatty()
    with _history() if terminal else contextlib.nullcontext():
        for number in itertools.count():
            try:
                prompt = input('> ') if terminal else _next_line()
            except UnicodeDecodeError:
                raise InputError('what was typed is not UTF-8; set the terminal to UTF-8') from None
            except EOFError:
                if terminal:
                    print()
                return
            try:
                write([prompt], number)
            except InputError as error:
                print(f'error: {error}', file=sys.stderr)
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print('interrupted; Ctrl-D leaves', file=sys.stderr)


def _next_line() -> str:
    """A line of a pipe, which may have no end. Raises EOFError at the end of the input."""
    data = sys.stdin.buffer.readline(LONGEST_LINE + 1)
    if not data:
        raise EOFError
    if len(data) > LONGEST_LINE:
        raise InputError(f'a line of standard input has more than {LONGEST_LINE:,} bytes, which no model reads')
    return decoded(data, 'standard input').removesuffix('\n').removesuffix('\r')


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing, and the lines of earlier sessions."""
    try:
        import readline
    except ImportError:  # Python can be built without it
        yield
        return
    path = pathlib.Path(platformdirs.user_state_dir('gpt_jax'), 'prompts')
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):  # none yet, or nobody's to read
        readline.read_history_file(path)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
        except OSError as error:
            print(f'note: prompts are not kept, {path} cannot be written ({error.strerror})', file=sys.stderr)


# From tokens to text.


class TextStream:
    """The text of a growing continuation, piece by piece; joined, the pieces are what `Tokenizer.decode` gives."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """The text ends before the first of the strings `stop`."""
        self._tokenizer = tokenizer
        # Not tokenizers' DecodeStream: it cannot be told that the text is over, and then keeps what never became a
        # character; and it holds back all that follows a U+FFFD of the text's own or a run of broken bytes.
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


# Stop strings.


class StopStrings:
    """What ends a continuation; for `StoppingCriteria.stop`.

    Attributes:
      strings: as given.
    """

    def __init__(self, tokenizer: Tokenizer | None, strings: Sequence[str]):
        """Watches for `strings`; raises InputError where one is empty or no text."""
        if not all(strings):
            raise InputError("stop='' is in every text; give at least one character, or leave it out")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        try:
            # In bytes: a token may hold a part of a character. No character's encoding is found inside another's.
            self._encoded = [string.encode() for string in strings]
        except UnicodeEncodeError as error:
            raise InputError(f'stop={error.object!a} is no text: its bytes are not UTF-8; write it as UTF-8') from None

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


# Continuations to a terminal or a file.


class Writer:
    """Prints continuations in the order of their prompts, whatever order they grow in.

    The first that is not finished is shown as it grows, the ones after it when their turn comes.

    Attributes:
      is_watched: whether somebody sees tokens appear, so that each should be shown by itself.
    """

    def __init__(
        self, out: TextIO, tokenizer: Tokenizer, *, as_json: bool = False, echo: bool = True, stop: Sequence[str] = ()
    ):
        """Prints to `out`.

        Args:
          out: to be written to and flushed; on a terminal control characters are spelled out.
          tokenizer: of the tokens.
          as_json: one object a continuation, when it is finished, instead of its text.
          echo: print the prompt before the text; a JSON object has it in any case.
          stop: strings before which a text ends.
        """
        self._out, self._tokenizer, self._as_json, self._echo, self._stop = out, tokenizer, as_json, echo, stop
        self._shown = harmless if out.isatty() else str
        self.is_watched = out.isatty() and not as_json

    def write(self, prompts: Sequence[str], samples: int, updates: Iterable[tuple[int, Generation]]) -> None:
        """Prints `samples` continuations of each prompt.

        Args:
          prompts, samples: what is continued, and how many times.
          updates: (index of a continuation, it as far as it has grown), sample by sample of the first prompt, then of
            the second; the last update of each is finished.
        """
        show = self._show_object if self._as_json else self._show_text
        latest: dict[int, Generation] = {}
        turn, self._stream, self._count = 0, None, 0
        try:
            for index, generation in updates:
                if index >= turn:  # what has been shown is not kept
                    latest[index] = generation
                while turn in latest:
                    show(latest[turn], turn, prompts, samples)
                    if latest[turn].finish_reason is None:
                        break
                    del latest[turn]
                    turn += 1
        finally:
            # An interrupted text ends its line as well: what comes next is the shell's.
            if self._stream is not None:
                self._put('\n')

    def _show_text(self, generation: Generation, index: int, prompts: Sequence[str], samples: int) -> None:
        if self._stream is None:
            self._stream, self._count = TextStream(self._tokenizer, self._stop), 0
            self._put(_heading(index, len(prompts), samples))
            self._put(self._shown(prompts[index // samples]) if self._echo else '')
        self._put(self._shown(self._stream.feed(generation.tokens[self._count :])))
        self._count = len(generation.tokens)
        if generation.finish_reason is not None:
            self._put(self._shown(self._stream.flush()) + '\n')
            self._stream = None

    def _show_object(self, generation: Generation, index: int, prompts: Sequence[str], samples: int) -> None:
        if generation.finish_reason is not None:
            row = {
                'prompt': prompts[index // samples],
                'text': text_of(self._tokenizer, generation.tokens, self._stop),
                'tokens': generation.tokens,
                'logprobs': [_finite(logprob) for logprob in generation.logprobs],
                'finish_reason': generation.finish_reason,
            }
            if generation.score is not None:
                row['score'] = _finite(generation.score)
            self._put(json.dumps(row, allow_nan=False) + '\n')

    def _put(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()


def _finite(number: float) -> float | None:
    """A number, or the null of what JSON cannot say."""
    return number if math.isfinite(number) else None


def _heading(index: int, prompts: int, samples: int) -> str:
    """Which of several continuations follows; nothing where there is one."""
    prompt, sample = divmod(index, samples)
    parts = [f'prompt {prompt + 1} of {prompts}'] if prompts > 1 else []
    parts += [f'sample {sample + 1} of {samples}'] if samples > 1 else []
    return f'--- {", ".join(parts)} ---\n' if parts else ''
