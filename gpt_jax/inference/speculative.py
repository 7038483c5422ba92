"""Speculative decoding: a draft of several tokens made cheaply, then checked by the model in one step.

A draft token is accepted so often, and replaced in such a way, that every text is as likely as without drafts:
Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1 and appendix A.1; Chen
et al. 2023, algorithm 2. Greedy decoding gives the same tokens, but for ties that the rounding of logits decides. The
tokens come from a smaller model, or from the text itself (prompt lookup, Saxena 2023).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax.errors import InputError
from gpt_jax.inference.engine import Engine, read, run_steps
from gpt_jax.inference.generate import DecodeState, Request, SamplingBatch, StoppingCriteria, longest_text
from gpt_jax.inference.sampling import Chain, Sampling, check_whole
from gpt_jax.models import GPT
from gpt_jax.models.cache import Cache, truncate
from gpt_jax.parallel import activate

# Above these a round costs more than any number of accepted tokens would save.
MOST_DRAFT_TOKENS, LONGEST_NGRAM = 1024, 64


@dataclasses.dataclass
class AcceptanceCount:
    """How well drafts did, counted over continuations.

    Attributes:
      drafted: tokens.
      accepted: how many of them the model took.
    """

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float | None:
        """accepted / drafted; None before the first draft."""
        return self.accepted / self.drafted if self.drafted else None

    def __str__(self):
        share = '' if self.rate is None else f' ({self.rate:.1%})'
        return f'{self.accepted} of {self.drafted} guessed tokens were accepted{share}'


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Speculative decoding, one text at a time: a strategy of `generate`, with sampling or greedy decoding.

    What comes is distributed as without it, and equal where greedy; the draws of a seed are others.

    Attributes:
      draft_tokens: how many are drafted at a time.
      draft: the engine of a smaller model with the same tokenizer; None: from the text itself.
      ngram: without a draft model: what followed the last time that this many tokens stood in the text as they do at
        its end (prompt lookup); nothing where they never did.
      acceptance: counts the draft tokens.

    Raises:
      InputError: a count is out of range.
    """

    draft_tokens: int = 4
    draft: Engine | None = None
    ngram: int = 2
    acceptance: AcceptanceCount = dataclasses.field(default_factory=AcceptanceCount, compare=False)

    draws = True
    largest_batch = 1

    def __post_init__(self):
        check_whole('draft_tokens', self.draft_tokens, 1, MOST_DRAFT_TOKENS)
        check_whole('prompt_lookup', self.ngram, 1, LONGEST_NGRAM)

    def rows(self, vocab_size: int) -> int:
        """Of the KV cache, for each request."""
        del vocab_size
        return 1

    def check_settings(self, sampling: Sampling, stopping: StoppingCriteria) -> None:
        """Raises InputError where they do not go with drafts."""
        del sampling
        if stopping.allow_sliding:
            raise InputError(
                'allow_sliding does not go with speculative decoding; use fewer new tokens, or leave one out'
            )

    def check(self, engine: Engine, requests: Sequence[Request], stopping: StoppingCriteria) -> None:
        """Raises InputError where no drafts can be made for these requests."""
        if engine.batch_size(1) > 1:
            raise InputError(
                'speculative decoding continues one text at a time, which a mesh cannot split; use one device'
            )
        if self.draft is None:
            return
        config, draft = engine.model.config, self.draft.model.config
        if draft.vocab_size != config.vocab_size:
            raise InputError(
                f'the draft has a vocabulary of {draft.vocab_size} tokens and the model one of {config.vocab_size}; '
                'use a draft with the same tokenizer'
            )
        longest = longest_text(requests, stopping)
        if longest > draft.block_size:
            raise InputError(f'{longest} tokens of prompt and text exceed block_size={draft.block_size} of the draft')

    def begin(
        self, engine: Engine, requests: Sequence[Request], sampling: Sampling, stopping: StoppingCriteria, seed: int
    ) -> 'SpeculativeBatch':
        """A batch of the one request."""
        return SpeculativeBatch(engine, requests, self, sampling, stopping, seed)


class SpeculativeBatch(SamplingBatch):
    """A batch of one, whose step is a draft and its check."""

    def __init__(self, engine, requests, speculative, sampling, stopping, seed):
        self.slack = speculative.draft_tokens + 1
        super().__init__(engine, 1, longest_text(requests, stopping), sampling, stopping, seed)
        self._speculative, self._draft_cache = speculative, None
        self.add(requests)

    def _prefill(self, texts):
        draft = self._speculative.draft
        if draft is not None:
            self._draft_cache = draft.prefill(texts, self._length, self.slack)[1]
        return super()._prefill(texts)

    def _decode(self, steps):
        engine, speculative = self._engine, self._speculative
        draft, draft_params = (None, None)
        if speculative.draft is not None:
            draft, draft_params = speculative.draft.model, speculative.draft.params
        drafter = Drafter(speculative.draft_tokens, speculative.ngram, draft)
        state = SpeculativeState(self._state, self._draft_cache, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        rules = (self._stopping.max_new_tokens, self._chain)
        state = decode_speculatively(
            engine.model, drafter, engine.mesh, engine.params, draft_params, state, steps, *rules
        )
        self._state, self._draft_cache = state.batch, state.draft_cache
        speculative.acceptance.drafted += int(state.drafted)
        speculative.acceptance.accepted += int(state.accepted)


# What happens on the device. All of it is of the one text of the batch.


@dataclasses.dataclass(frozen=True)
class Drafter:
    """What a program of drafts is compiled for."""

    tokens: int
    ngram: int
    model: GPT | None


@flax.struct.dataclass
class SpeculativeState:
    """What a round of draft and check leaves for the next.

    Attributes:
      batch: of the one text.
      draft_cache: what the draft model has read: all but the last token of the text; None without one.
      drafted, accepted: tokens so far.
    """

    batch: DecodeState
    draft_cache: Cache | None
    drafted: jax.Array
    accepted: jax.Array


@flax.struct.dataclass
class Draft:
    """Of one round.

    Attributes:
      tokens_T: the tokens.
      probabilities_TV: of the draws that they are; None: nothing was drawn.
      made_T: where there is a token at all.
    """

    tokens_T: jax.Array
    probabilities_TV: jax.Array
    made_T: jax.Array


@functools.partial(jax.jit, static_argnames=('model', 'drafter', 'mesh'), donate_argnames='state')
def decode_speculatively(
    model: GPT,
    drafter: Drafter,
    mesh: Mesh | None,
    params: Any,
    draft_params: Any,
    state: SpeculativeState,
    rounds: int,
    max_new_tokens: int,
    chain: Chain,
) -> SpeculativeState:
    """At most `rounds` rounds.

    Args:
      model, mesh, params: of the engine.
      drafter: how tokens are drafted.
      draft_params: of its model, where it has one.
      state: donated. The caches can take back one token more than are drafted, and hold as many beyond the text.
      rounds: how many at most.
      max_new_tokens: what ends the text, beside the end of text.
      chain: how tokens are chosen, by the draft as well.
    """

    def one(state):
        draft, draft_cache = _make_draft(drafter, draft_params, state, chain)
        batch, accepted = _check_draft(model, params, state.batch, draft, max_new_tokens, chain)
        if draft_cache is not None:
            draft_cache = truncate(draft_cache, batch.cache['lengths'])
        drafted = state.drafted + jnp.sum(draft.made_T, dtype=jnp.int32)
        return SpeculativeState(batch, draft_cache, drafted, state.accepted + accepted)

    with activate(mesh):
        return run_steps(one, lambda state: ~state.batch.done_B[0], rounds, state)


def _make_draft(
    drafter: Drafter, draft_params: Any, state: SpeculativeState, chain: Chain
) -> tuple[Draft, Cache | None]:
    batch = state.batch
    if drafter.model is None:
        return look_up(drafter, batch.tokens_BL[0], batch.lengths_B[0]), None

    def draw(index, drawn):
        cache, text_BL, draft = drawn
        length_B = batch.lengths_B + index
        last_B1 = jnp.take_along_axis(text_BL, length_B[:, None] - 1, axis=1)
        logits_BTV, cache = read(drafter.model, draft_params, cache, last_B1)
        probabilities_V = _distribution(chain, logits_BTV[:, 0], text_BL, length_B, length_B - batch.prompts_B)[0]
        token = jax.random.categorical(_key(batch, index), jnp.log(probabilities_V)).astype(jnp.int32)
        draft = Draft(
            draft.tokens_T.at[index].set(token, mode='drop'),
            draft.probabilities_TV.at[index].set(probabilities_V, mode='drop'),
            draft.made_T,
        )
        return cache, text_BL.at[0, length_B[0]].set(token), draft

    count, vocab = drafter.tokens, drafter.model.config.vocab_size
    nothing = Draft(jnp.zeros(count, jnp.int32), jnp.zeros((count, vocab)), jnp.ones(count, bool))
    # Once more than there are tokens: the last of them has to be read as well, should all be accepted.
    cache, _, draft = jax.lax.fori_loop(0, count + 1, draw, (state.draft_cache, batch.tokens_BL, nothing))
    return draft, cache


def look_up(drafter: Drafter, text_L: jax.Array, length: jax.Array) -> Draft:
    """What followed the last `ngram` tokens of a text the last time that they stood in it before."""
    size, starts_L = drafter.ngram, jnp.arange(text_L.size)
    matches_L = starts_L + size < length
    for offset in range(size):
        matches_L &= jnp.roll(text_L, -offset) == text_L[length - size + offset]
    start = jnp.max(jnp.where(matches_L, starts_L, -1))
    positions_T = start + size + jnp.arange(drafter.tokens)
    made_T = (start >= 0) & (length >= size) & (positions_T < length)
    tokens_T = text_L[jnp.where(made_T, positions_T, 0)]
    return Draft(tokens_T, None, made_T)


def _check_draft(
    model: GPT, params: Any, batch: DecodeState, draft: Draft, max_new_tokens, chain: Chain
) -> tuple[DecodeState, jax.Array]:
    """One step of the model over the whole draft: the text with what is accepted and one more token; how many."""
    count, length, new = draft.tokens_T.size, batch.lengths_B[0], (batch.lengths_B - batch.prompts_B)[0]
    text_L = jax.lax.dynamic_update_slice(batch.tokens_BL[0], draft.tokens_T, (length,))
    read_T = jax.lax.dynamic_slice(text_L, (length - 1,), (count + 1,))
    logits_BTV, cache = read(model, params, batch.cache, read_T[None])
    steps_T = jnp.arange(count + 1)
    texts_TL = jnp.broadcast_to(text_L, (count + 1, text_L.size))
    p_TV = _distribution(chain, logits_BTV[0], texts_TL, length + steps_T, new + steps_T)

    # A token of probability q in the draft and p in the model is accepted with probability min(1, p / q).
    token_probabilities_T = jnp.take_along_axis(p_TV[:-1], draft.tokens_T[:, None], axis=1)[:, 0]
    one_hot_TV = draft.tokens_T[:, None] == jnp.arange(p_TV.shape[1])
    q_TV = one_hot_TV.astype(p_TV.dtype) if draft.probabilities_TV is None else draft.probabilities_TV
    q_TV = jnp.where(draft.made_T[:, None], q_TV, 0.0)
    q_T = jnp.take_along_axis(q_TV, draft.tokens_T[:, None], axis=1)[:, 0]
    uniform_T = jax.random.uniform(_key(batch, count + 1), (count,))
    accepted_T = draft.made_T & (uniform_T * q_T < token_probabilities_T)
    accepted = jnp.sum(jnp.cumprod(accepted_T))

    # What the draft left over of the probability; after the last of its tokens, all of it.
    left_V = p_TV[accepted] - jnp.concatenate([q_TV, jnp.zeros_like(p_TV[:1])])[accepted]
    left_V = jnp.where(jnp.max(left_V) > 0, jnp.maximum(left_V, 0.0), p_TV[accepted])
    token = jax.random.categorical(_key(batch, count + 2), jnp.log(left_V)).astype(jnp.int32)

    new_T = jnp.append(draft.tokens_T, 0).at[accepted].set(token)
    logprobs_TV = jax.nn.log_softmax(logits_BTV[0], axis=-1)
    logprobs_T = jnp.take_along_axis(logprobs_TV, new_T[:, None], axis=1)[:, 0]
    ends_T = chain.is_end(new_T) & (steps_T <= accepted)
    first_end = jnp.where(jnp.any(ends_T), jnp.argmax(ends_T), count + 1)
    kept = jnp.minimum(jnp.minimum(accepted, first_end) + 1, max_new_tokens - new)
    batch = batch.replace(
        cache=truncate(cache, batch.cache['lengths'] + kept),
        tokens_BL=jax.lax.dynamic_update_slice(batch.tokens_BL, new_T[None], (0, length)),
        logprobs_BL=jax.lax.dynamic_update_slice(batch.logprobs_BL, logprobs_T[None], (0, length)),
        lengths_B=batch.lengths_B + kept,
        done_B=(first_end < kept)[None] | (new + kept >= max_new_tokens),
    )
    return batch, jnp.minimum(accepted, kept).astype(jnp.int32)


def _distribution(chain: Chain, logits_TV, texts_TL, lengths_T, new_T) -> jax.Array:
    """What tokens are drawn from, after all filters: probabilities [time, vocab]."""
    scores_TV = chain.process(logits_TV, texts_TL, lengths_T, new_T)
    if chain.greedy:
        return jax.nn.one_hot(jnp.argmax(scores_TV, axis=-1), scores_TV.shape[-1])
    return jax.nn.softmax(chain.warp(scores_TV), axis=-1)


def _key(batch: DecodeState, draw: int | jax.Array) -> jax.Array:
    """A key for each draw of a round."""
    new = (batch.lengths_B - batch.prompts_B)[0]
    return jax.random.fold_in(jax.random.fold_in(batch.keys_B[0], new), draw)
