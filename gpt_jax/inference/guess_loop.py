"""The compiled loop of speculative decoding: rounds of guesses, each checked in one step of the model."""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax.inference import loop
from gpt_jax.inference.engine import Seen, read
from gpt_jax.inference.sampling import Chain
from gpt_jax.models import GPT
from gpt_jax.parallel import activate


@dataclasses.dataclass(frozen=True)
class Guesser:
    """What a program of guesses is compiled for."""

    tokens: int
    ngram: int
    draft: GPT | None


@flax.struct.dataclass
class Carry:
    """What a round leaves for the next.

    Attributes:
      state: of the one text.
      draft_seen: what the draft has read: all but the last token of the text; None without a draft.
      guessed, accepted: tokens so far.
    """

    state: loop.State
    draft_seen: Seen | None
    guessed: jax.Array
    accepted: jax.Array


@flax.struct.dataclass
class Guesses:
    """Of one round.

    Attributes:
      tokens_T: the guesses.
      probabilities_TV: of the draws that they are; None: nothing was drawn.
      made_T: where there is a guess at all.
    """

    tokens_T: jax.Array
    probabilities_TV: jax.Array
    made_T: jax.Array


@functools.partial(jax.jit, static_argnames=('model', 'guesser', 'mesh'), donate_argnames='carry')
def decode(
    model: GPT,
    guesser: Guesser,
    mesh: Mesh | None,
    params: Any,
    draft_params: Any,
    carry: Carry,
    rounds: int,
    end_of_text: int,
    max_new_tokens: int,
    chain: Chain,
) -> Carry:
    """At most `rounds` rounds.

    Args:
      model, mesh, params: of the engine.
      guesser: how tokens are guessed.
      draft_params: of its draft, where it has one.
      carry: donated. The caches can take back one token more than are guessed, and hold as many beyond the text.
      rounds: how many at most.
      end_of_text, max_new_tokens: what ends the text.
      chain: how tokens are chosen, by the draft as well.
    """

    def unfinished(counted):
        return (counted[0] < rounds) & ~counted[1].state.done_B[0]

    def one(counted):
        count, carry = counted
        guesses, draft_seen = _guess(guesser, draft_params, carry, chain)
        state, taken = _check(model, params, carry.state, guesses, end_of_text, max_new_tokens, chain)
        if draft_seen is not None:
            draft_seen = draft_seen.truncate(state.seen.lengths_B)
        guessed = carry.guessed + jnp.sum(guesses.made_T, dtype=jnp.int32)
        return count + 1, Carry(state, draft_seen, guessed, carry.accepted + taken)

    with activate(mesh):
        return jax.lax.while_loop(unfinished, one, (jnp.zeros((), jnp.int32), carry))[1]


def _guess(guesser: Guesser, draft_params: Any, carry: Carry, chain: Chain) -> tuple[Guesses, Seen | None]:
    state = carry.state
    if guesser.draft is None:
        return look_up(guesser, state), None

    def draw(index, drawn):
        seen, text_BL, guesses = drawn
        length_B = state.lengths_B + index
        last_B1 = jnp.take_along_axis(text_BL, length_B[:, None] - 1, axis=1)
        logits_BTV, seen = read(guesser.draft, draft_params, seen, last_B1)
        probabilities_V = _distribution(chain, logits_BTV[:, 0], text_BL, length_B, length_B - state.prompts_B)[0]
        token = jax.random.categorical(_key(state, index), jnp.log(probabilities_V)).astype(jnp.int32)
        guesses = Guesses(
            guesses.tokens_T.at[index].set(token, mode='drop'),
            guesses.probabilities_TV.at[index].set(probabilities_V, mode='drop'),
            guesses.made_T,
        )
        return seen, text_BL.at[0, length_B[0]].set(token), guesses

    count, vocab = guesser.tokens, guesser.draft.config.vocab_size
    none = Guesses(jnp.zeros(count, jnp.int32), jnp.zeros((count, vocab)), jnp.ones(count, bool))
    # Once more than there are guesses: the last of them has to be read as well, should all be taken.
    seen, _, guesses = jax.lax.fori_loop(0, count + 1, draw, (carry.draft_seen, state.tokens_BL, none))
    return guesses, seen


def look_up(guesser: Guesser, state: loop.State) -> Guesses:
    """What followed the last `ngram` tokens of the text the last time that they stood in it before."""
    text_L, length, size = state.tokens_BL[0], state.lengths_B[0], guesser.ngram
    starts_L = jnp.arange(text_L.size)
    matches_L = starts_L + size < length
    for offset in range(size):
        matches_L &= jnp.roll(text_L, -offset) == text_L[length - size + offset]
    start = jnp.max(jnp.where(matches_L, starts_L, -1))
    places_T = start + size + jnp.arange(guesser.tokens)
    made_T = (start >= 0) & (length >= size) & (places_T < length)
    tokens_T = text_L[jnp.where(made_T, places_T, 0)]
    return Guesses(tokens_T, None, made_T)


def _check(
    model: GPT, params: Any, state: loop.State, guesses: Guesses, end_of_text, max_new_tokens, chain: Chain
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
