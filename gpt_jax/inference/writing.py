"""Continuations on their way to a terminal or a file: as text while they grow, or as one JSON object each."""

import json
from collections.abc import Iterable, Sequence
from typing import TextIO

from gpt_jax.data import Tokenizer
from gpt_jax.inference.request import Generation
from gpt_jax.inference.text import TextStream, harmless, text_of


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
                latest[index] = generation
                while turn in latest:
                    show(latest[turn], turn, prompts, samples)
                    if latest[turn].finish_reason is None:
                        break
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
                'logprobs': generation.logprobs,
                'finish_reason': generation.finish_reason,
            }
            if generation.score is not None:
                row['score'] = generation.score
            self._put(json.dumps(row) + '\n')

    def _put(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()


def _heading(index: int, prompts: int, samples: int) -> str:
    """Which of several continuations follows; nothing where there is one."""
    prompt, sample = divmod(index, samples)
    parts = [f'prompt {prompt + 1} of {prompts}'] if prompts > 1 else []
    parts += [f'sample {sample + 1} of {samples}'] if samples > 1 else []
    return f'--- {", ".join(parts)} ---\n' if parts else ''
