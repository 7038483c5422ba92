"""What is asked of the decode engine, and what comes back."""

import dataclasses
from collections.abc import Callable, Sequence

from gpt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Ending:
    """When a continuation is over.

    Attributes:
      max_new_tokens: at most this many tokens.
      end_of_text: the token that ends it.
      stop: the new tokens so far -> how many of them to keep, or None to go on (`StopStrings`).
      allow_sliding: where the text outgrows block_size, go on from the last half of a block; without it prompt and new
        tokens must fit in block_size.
    """

    max_new_tokens: int
    end_of_text: int
    stop: Callable[[Sequence[int]], int | None] | None = None
    allow_sliding: bool = False


@dataclasses.dataclass
class Generation:
    """One continuation.

    Attributes:
      tokens: the new token ids, without end-of-text.
      logprobs: the model's own log-probability of each, in nats, before temperature and filters.
      finish_reason: 'stop' at end-of-text or where `Ending.stop` says, 'length' otherwise; None while it grows.
      score: what strategies that compare continuations compare them by; None where none does.
      end_logprob: the log-probability of the end-of-text that ended it; None where none did.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None
    score: float | None = None
    end_logprob: float | None = None

    @classmethod
    def ended(
        cls, tokens: Sequence[int], logprobs: Sequence[float], ending: Ending, score: float | None = None
    ) -> 'Generation':
        """A finished one, of new tokens up to end-of-text or beyond it."""
        tokens, logprobs = list(map(int, tokens)), list(map(float, logprobs))
        if ending.end_of_text not in tokens:
            return cls(tokens, logprobs, 'length', score)
        kept = tokens.index(ending.end_of_text)
        return cls(tokens[:kept], logprobs[:kept], 'stop', score, logprobs[kept])


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of at least one token, and which of the draws continues it: (index of the prompt, of the sample)."""

    prompt: Sequence[int]
    draw: tuple[int, int] = (0, 0)


def make_requests(
    block_size: int, prompts: Sequence[Sequence[int]], ending: Ending, num_samples: int, first: int = 0
) -> list[Request]:
    """What `generate` does, as a list for `stream`; raises InputError as `generate` does."""
    count = ending.max_new_tokens
    for name, value in (('max_new_tokens', count), ('num_samples', num_samples)):
        if value < 1:
            raise InputError(f'{name}={value} must be at least 1')
    prompts = [list(prompt) or [ending.end_of_text] for prompt in prompts]
    for index, prompt in enumerate(prompts):
        which = 'the prompt' if len(prompts) == 1 else f'prompt {index + 1}'
        if not ending.allow_sliding and len(prompt) >= block_size:
            raise InputError(
                f'{which} has {len(prompt)} tokens and the model sees block_size={block_size} in all; '
                f'shorten the prompt to at most {block_size - 1}, or allow_sliding'
            )
        if not ending.allow_sliding and len(prompt) + count > block_size:
            raise InputError(
                f'{which}: {len(prompt)} tokens of prompt and max_new_tokens={count} exceed block_size={block_size}; '
                f'use max_new_tokens={block_size - len(prompt)} or less, or allow_sliding'
            )
    return [Request(p, (index, sample)) for index, p in enumerate(prompts, first) for sample in range(num_samples)]


def check_ending(ending: Ending, strategy: str) -> None:
    """Raises InputError where `ending` asks for what only sampling and greedy decoding do."""
    if ending.stop is not None:
        raise InputError(f'stop strings do not go with {strategy}; use greedy decoding or sampling')
    if ending.allow_sliding:
        raise InputError(f'allow_sliding does not go with {strategy}; use fewer new tokens, or sampling')
