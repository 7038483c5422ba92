"""Speculative decoding: several tokens guessed cheaply, then checked by the model in one step.

A guess is accepted so often, and replaced in such a way, that every text is as likely as without guessing: Leviathan et
al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1 and appendix A.1; Chen et al. 2023,
algorithm 2. Greedy decoding gives the same tokens, but for ties that the rounding of logits decides.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from gpt_jax.errors import InputError
from gpt_jax.inference import guess_loop
from gpt_jax.inference.batch import Batch
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.request import Ending, Generation, Request, make_requests
from gpt_jax.inference.sampling import Sampling


@dataclasses.dataclass
class Tally:
    """How well guesses did, counted over continuations.

    Attributes:
      guessed: tokens.
      accepted: how many of them the model took.
    """

    guessed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float | None:
        """accepted / guessed; None before the first guess."""
        return self.accepted / self.guessed if self.guessed else None

    def __str__(self):
        share = '' if self.rate is None else f' ({self.rate:.1%})'
        return f'{self.accepted} of {self.guessed} guessed tokens were accepted{share}'


@dataclasses.dataclass(frozen=True)
class Guessing:
    """Where guesses come from.

    Attributes:
      tokens: how many are guessed at a time.
      draft: the engine of a smaller model with the same tokenizer; None: from the text itself.
      ngram: without a draft: what followed the last time that this many tokens stood in the text as they do at its end
        (prompt lookup); nothing where they never did.
      tally: counts the guesses.

    Raises:
      InputError: a count is below 1.
    """

    tokens: int = 4
    draft: Engine | None = None
    ngram: int = 2
    tally: Tally = dataclasses.field(default_factory=Tally, compare=False)

    def __post_init__(self):
        for name, value in (('draft_tokens', self.tokens), ('prompt_lookup', self.ngram)):
            if value < 1:
                raise InputError(f'{name}={value} must be at least 1')


def check_speculation(engine: Engine, guessing: Guessing, requests: Sequence[Request], ending: Ending) -> None:
    """Raises InputError where guesses cannot be made for these requests."""
    if ending.allow_sliding:
        raise InputError('allow_sliding does not go with speculative decoding; use fewer new tokens, or leave one out')
    if engine.batch_size(1) > 1:
        raise InputError('speculative decoding continues one text at a time, which a mesh cannot split; use one device')
    if guessing.draft is None:
        return
    config, draft = engine.model.config, guessing.draft.model.config
    if draft.vocab_size != config.vocab_size:
        raise InputError(
            f'the draft has a vocabulary of {draft.vocab_size} tokens and the model one of {config.vocab_size}; '
            'use a draft with the same tokenizer'
        )
    longest = max(len(request.prompt) for request in requests) + ending.max_new_tokens
    if longest > draft.block_size:
        raise InputError(f'{longest} tokens of prompt and text exceed block_size={draft.block_size} of the draft')


def grow_by_guesses(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    guessing: Guessing,
    sampling: Sampling,
    ending: Ending,
    *,
    num_samples: int = 1,
    seed: int = 0,
    first: int = 0,
    rounds: int = 1,
) -> Iterator[tuple[int, Generation]]:
    """`decode.grow` by guesses, one continuation at a time; raises InputError as that and `check_speculation` do."""
    requests = make_requests(engine.model.config.block_size, prompts, ending, num_samples, first)
    check_speculation(engine, guessing, requests, ending)
    return (
        (index, generation)
        for index, request in enumerate(requests)
        for generation in speculate(engine, request, guessing, sampling, ending, seed, rounds)
    )


def speculate(
    engine: Engine,
    request: Request,
    guessing: Guessing,
    sampling: Sampling,
    ending: Ending,
    seed: int = 0,
    rounds: int = 1,
) -> Iterator[Generation]:
    """Continues one request, and yields what there is of it after every `rounds` rounds of guesses.

    The last thing yielded is finished. What comes is distributed as by `decode.stream`, and equal to it where greedy;
    the draws of a seed are others.

    Args:
      engine: the model.
      request: of `make_requests`, and of `check_speculation`.
      guessing: where guesses come from.
      sampling, ending, seed: as of `decode.generate`.
      rounds: between two looks.
    """
    batch = _Speculation(engine, request, guessing, sampling, ending, seed)
    while batch.unfinished:
        batch.advance(rounds)
        yield batch.generations[0]


class _Speculation(Batch):
    """A batch of one, which grows by rounds of guesses."""

    def __init__(self, engine, request, guessing, sampling, ending, seed):
        self._guessing = guessing
        self.slack = guessing.tokens + 1
        super().__init__(engine, [request], sampling, ending, seed)

    def _prefill(self):
        prompts, room, undoable = [self._requests[0].prompt], self._ending.max_new_tokens, self.slack
        draft = self._guessing.draft
        self._draft_seen = None if draft is None else draft.prefill(prompts, room, undoable)[1]
        self._free = room
        return self._engine.prefill(prompts, room, undoable)

    def _decode(self, steps, rules):
        engine, guessing = self._engine, self._guessing
        draft, draft_params = (None, None) if guessing.draft is None else (guessing.draft.model, guessing.draft.params)
        guesser = guess_loop.Guesser(guessing.tokens, guessing.ngram, draft)
        carry = guess_loop.Carry(self._state, self._draft_seen, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        carry = guess_loop.decode(engine.model, guesser, engine.mesh, engine.params, draft_params, carry, steps, *rules)
        self._state, self._draft_seen = carry.state, carry.draft_seen
        guessing.tally.guessed += int(carry.guessed)
        guessing.tally.accepted += int(carry.accepted)
