"""Speculative decoding: several tokens guessed cheaply, then checked by the model in one step.

A guess is accepted so often, and replaced in such a way, that every text is as likely as without guessing: Leviathan et
al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1 and appendix A.1; Chen et al. 2023,
algorithm 2. Greedy decoding gives the same tokens, but for ties that the rounding of logits decides.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax.errors import InputError
from gpt_jax.inference import loop
from gpt_jax.inference.batch import Batch
from gpt_jax.inference.engine import Engine, Seen, read
from gpt_jax.inference.request import Ending, Generation, Request
from gpt_jax.inference.sampling import Chain, Sampling
from gpt_jax.models import GPT
from gpt_jax.parallel import activate


@dataclasses.dataclass(frozen=True)
class Guessing:
    """Where guesses come from.

    Attributes:
      tokens: how many are guessed at a time.
      draft: the engine of a smaller model with the same tokenizer; None: from the text itself.
      ngram: without a draft: what followed the last time that this many tokens stood in the text as they do at its end
        (prompt lookup); nothing where they never did.

    Raises:
      InputError: a count is below 1.
    """

    tokens: int = 4
    draft: Engine | None = None
    ngram: int = 2

    def __post_init__(self):
        for name, value in (('draft_tokens', self.tokens), ('prompt_lookup', self.ngram)):
            if value < 1:
                raise InputError(f'{name}={value} must be at least 1')


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


def speculate(
    engine: Engine,
    request: Request,
    guessing: Guessing,
    sampling: Sampling,
    ending: Ending,
    seed: int = 0,
    rounds: int = 1,
    tally: Tally | None = None,
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
      tally: counts guesses.
    """
    batch = _Speculation(engine, request, guessing, sampling, ending, seed, Tally() if tally is None else tally)
    while batch.unfinished:
        batch.advance(rounds)
        yield batch.generations[0]


class _Speculation(Batch):
    """A batch of one, which grows by rounds of guesses."""

    def __init__(self, engine, request, guessing, sampling, ending, seed, tally):
        self._guessing, self._tally = guessing, tally
        self.slack = guessing.tokens + 1
        super().__init__(engine, [request], sampling, ending, seed)

    def _prefill(self):
        prompts, room, undoable = [self._requests[0].prompt], self._ending.max_new_tokens, self.slack
        draft = self._guessing.draft
        self._draft_seen = None if draft is None else draft.prefill(prompts, room, undoable)[1]
        self._free = room
        return self._engine.prefill(prompts, room, undoable)

    def _decode(self, steps, rules):
        guesser = _Guesser(self._guessing.tokens, self._guessing.ngram, getattr(self._guessing.draft, 'model', None))
        draft_params = None if self._guessing.draft is None else self._guessing.draft.params
        engine = self._engine
        carry = _Carry(self._state, self._draft_seen, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        carry = _decode(engine.model, guesser, engine.mesh, engine.params, draft_params, carry, steps, *rules)
        self._state, self._draft_seen = carry.state, carry.draft_seen
        self._tally.guessed += int(carry.guessed)
        self._tally.accepted += int(carry.accepted)


@dataclasses.dataclass(frozen=True)
class _Guesser:
    """What a program of guesses is compiled for."""

    tokens: int
    ngram: int
    draft: GPT | None


@flax.struct.dataclass
class _Carry:
    state: loop.State
    draft_seen: Seen | None
    guessed: jax.Array
    accepted: jax.Array


@flax.struct.dataclass
class _Guesses:
    """Tokens, and the probabilities that they were drawn with; those of no guess are 0."""

    tokens_T: jax.Array
    probabilities_TV: jax.Array
    made_T: jax.Array


@functools.partial(jax.jit, static_argnames=('model', 'guesser', 'mesh'), donate_argnames='carry')
def _decode(
    model: GPT,
    guesser: _Guesser,
    mesh: Mesh | None,
    params: Any,
    draft_params: Any,
    carry: _Carry,
    rounds: int,
    end_of_text: int,
    max_new_tokens: int,
    chain: Chain,
) -> _Carry:
    def unfinished(counted):
        return (counted[0] < rounds) & ~counted[1].state.done_B[0]

    def one(counted):
        count, carry = counted
        guesses, draft_seen = _guess(guesser, draft_params, carry, chain)
        state, taken = _check(model, params, carry.state, guesses, end_of_text, max_new_tokens, chain)
        if draft_seen is not None:
            draft_seen = draft_seen.truncate(state.seen.lengths_B)
        guessed = carry.guessed + jnp.sum(guesses.made_T, dtype=jnp.int32)
        return count + 1, _Carry(state, draft_seen, guessed, carry.accepted + taken)

    with activate(mesh):
        return jax.lax.while_loop(unfinished, one, (jnp.zeros((), jnp.int32), carry))[1]


def _guess(guesser: _Guesser, draft_params: Any, carry: _Carry, chain: Chain) -> tuple[_Guesses, Seen | None]:
    state = carry.state
    if guesser.draft is None:
        return _look_up(guesser, state, chain), None

    def draw(index, drawn):
        seen, text_BL, guesses = drawn
        length_B = state.lengths_B + index
        last_B1 = jnp.take_along_axis(text_BL, length_B[:, None] - 1, axis=1)
        logits_BTV, seen = read(guesser.draft, draft_params, seen, last_B1)
        probabilities_V = _distribution(chain, logits_BTV[:, 0], text_BL, length_B, length_B - state.prompts_B)[0]
        token = jax.random.categorical(_key(state, index), jnp.log(probabilities_V)).astype(jnp.int32)
        guesses = _Guesses(
            guesses.tokens_T.at[index].set(token, mode='drop'),
            guesses.probabilities_TV.at[index].set(probabilities_V, mode='drop'),
            guesses.made_T,
        )
        return seen, text_BL.at[0, length_B[0]].set(token), guesses

    count, vocab = guesser.tokens, guesser.draft.config.vocab_size
    none = _Guesses(jnp.zeros(count, jnp.int32), jnp.zeros((count, vocab)), jnp.ones(count, bool))
    # Once more than there are guesses: the last of them has to be read as well, should all be taken.
    seen, _, guesses = jax.lax.fori_loop(0, count + 1, draw, (carry.draft_seen, state.tokens_BL, none))
    return guesses, seen


def _look_up(guesser: _Guesser, state: loop.State, chain: Chain) -> _Guesses:
    text_L, length, size = state.tokens_BL[0], state.lengths_B[0], guesser.ngram
    starts_L = jnp.arange(text_L.size)
    matches_L = starts_L + size < length
    for offset in range(size):
        matches_L &= jnp.roll(text_L, -offset) == text_L[length - size + offset]
    start = jnp.max(jnp.where(matches_L, starts_L, -1))
    places_T = start + size + jnp.arange(guesser.tokens)
    made_T = (start >= 0) & (length >= size) & (places_T < length)
    tokens_T = text_L[jnp.where(made_T, places_T, 0)]
    return _Guesses(tokens_T, None, made_T)


def _check(
    model: GPT, params: Any, state: loop.State, guesses: _Guesses, end_of_text, max_new_tokens, chain: Chain
) -> tuple[loop.State, jax.Array]:
    """One step of the model over all guesses: the text with those that are taken and one more token; how many."""
    count, length, new = guesses.tokens_T.size, state.lengths_B[0], (state.lengths_B - state.prompts_B)[0]
    text_L = jax.lax.dynamic_update_slice(state.tokens_BL[0], guesses.tokens_T, (length,))
    read_T = jax.lax.dynamic_slice(text_L, (length - 1,), (count + 1,))
    logits_BTV, seen = read(model, params, state.seen, read_T[None])
    steps_T = jnp.arange(count + 1)
    texts_TL = jnp.broadcast_to(text_L, (count + 1, text_L.size))
    p_TV = _distribution(chain, logits_BTV[0], texts_TL, length + steps_T, new + steps_T)

    token_probabilities_T = jnp.take_along_axis(p_TV[:-1], guesses.tokens_T[:, None], axis=1)[:, 0]
    one_hot_TV = guesses.tokens_T[:, None] == jnp.arange(p_TV.shape[1])
    q_TV = one_hot_TV.astype(p_TV.dtype) if guesses.probabilities_TV is None else guesses.probabilities_TV
    q_TV = jnp.where(guesses.made_T[:, None], q_TV, 0.0)
    q_T = jnp.take_along_axis(q_TV, guesses.tokens_T[:, None], axis=1)[:, 0]
    uniform_T = jax.random.uniform(_key(state, count + 1), (count,))
    taken_T = guesses.made_T & (uniform_T * q_T < token_probabilities_T)
    taken = jnp.sum(jnp.cumprod(taken_T))

    # What the guesses left over of the probability; after the last guess, all of it.
    left_V = p_TV[taken] - jnp.concatenate([q_TV, jnp.zeros_like(p_TV[:1])])[taken]
    left_V = jnp.where(jnp.max(left_V) > 0, jnp.maximum(left_V, 0.0), p_TV[taken])
    token = jax.random.categorical(_key(state, count + 2), jnp.log(left_V)).astype(jnp.int32)

    new_T = jnp.append(guesses.tokens_T, 0).at[taken].set(token)
    logprobs_TV = jax.nn.log_softmax(logits_BTV[0], axis=-1)
    logprobs_T = jnp.take_along_axis(logprobs_TV, new_T[:, None], axis=1)[:, 0]
    ends_T = (new_T == end_of_text) & (steps_T <= taken)
    first_end = jnp.where(jnp.any(ends_T), jnp.argmax(ends_T), count + 1)
    kept = jnp.minimum(jnp.minimum(taken, first_end) + 1, max_new_tokens - new)
    state = state.replace(
        seen=seen.truncate(state.seen.lengths_B + kept),
        tokens_BL=jax.lax.dynamic_update_slice(state.tokens_BL, new_T[None], (0, length)),
        logprobs_BL=jax.lax.dynamic_update_slice(state.logprobs_BL, logprobs_T[None], (0, length)),
        lengths_B=state.lengths_B + kept,
        done_B=(first_end < kept)[None] | (new + kept >= max_new_tokens),
    )
    return state, jnp.minimum(taken, kept).astype(jnp.int32)


def _distribution(chain: Chain, logits_TV, texts_TL, lengths_T, new_T) -> jax.Array:
    """What tokens are drawn from, after all filters: probabilities [time, vocab]."""
    scores_TV = chain.process(logits_TV, texts_TL, lengths_T, new_T)
    if chain.greedy:
        return jax.nn.one_hot(jnp.argmax(scores_TV, axis=-1), scores_TV.shape[-1])
    return jax.nn.softmax(chain.warp(scores_TV), axis=-1)


def _key(state: loop.State, draw: int | jax.Array) -> jax.Array:
    """A key for each draw of a round."""
    new = (state.lengths_B - state.prompts_B)[0]
    return jax.random.fold_in(jax.random.fold_in(state.keys_B[0], new), draw)
