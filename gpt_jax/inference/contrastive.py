"""Contrastive search (Su et al. 2022, section 4.2): likely tokens whose hidden state is unlike all those before it.

Of the `top_k` likeliest tokens that one is taken with the greatest (1 - alpha) * probability - alpha * the greatest
cosine between its hidden state and one of prompt or text. Hidden states are those that the output head reads. Shape
suffixes beside the model's: k candidates, R rows of the cache (B * k), L length of a text.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import InputError
from gpt_jax.inference.buckets import bucket
from gpt_jax.inference.engine import Engine, Seen
from gpt_jax.inference.request import Ending, Generation, check_ending, make_requests
from gpt_jax.inference.sampling import Chain, Sampling
from gpt_jax.parallel import activate

# Steps of one compiled loop: between two of them Ctrl-C is looked at.
STEPS_AT_A_TIME = 32


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Settings of contrastive search, with Hugging Face's names.

    Attributes:
      penalty_alpha: weight of unlikeness against probability; in [0, 1], at 0 it is greedy decoding.
      top_k: candidates at each step.

    Raises:
      InputError: a value is out of range.
    """

    penalty_alpha: float = 0.6
    top_k: int = 4

    def __post_init__(self):
        if not 0 <= self.penalty_alpha <= 1:
            raise InputError(f'penalty_alpha={self.penalty_alpha} must be from 0 to 1')
        if self.top_k < 1:
            raise InputError(f'top_k={self.top_k} must be at least 1 for contrastive search: how many candidates')


@flax.struct.dataclass
class _State:
    """A batch between two steps.

    Attributes:
      seen: each text k times, with another candidate as its last token.
      parents_B: the row of `seen` whose candidate was taken.
      logits_BV: of the token after each text.
      tokens_BL, logprobs_BL: texts, and the model's log-probabilities of new tokens.
      hidden_BLD: hidden states of the texts' tokens, of length 1.
      lengths_B: of the texts.
      count: new tokens.
      done_B: which texts have ended.
    """

    seen: Seen
    parents_B: jax.Array
    logits_BV: jax.Array
    tokens_BL: jax.Array
    logprobs_BL: jax.Array
    hidden_BLD: jax.Array
    lengths_B: jax.Array
    count: jax.Array
    done_B: jax.Array


def contrastive_search(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    contrastive: Contrastive,
    ending: Ending,
    sampling: Sampling | None = None,
    *,
    batch_size: int = 8,
) -> list[Generation]:
    """The continuation of each prompt.

    Args:
      engine: the model.
      prompts: token ids; an empty one starts a new document, from end-of-text.
      contrastive: the settings.
      ending: when a continuation is over; without stop strings and sliding.
      sampling: filters that act in every strategy, such as min_new_tokens, with greedy=True; None: no filters.
      batch_size: prompts continued at once.

    Raises:
      InputError: a prompt and its new tokens exceed block_size, or settings that do not go with contrastive search.
    """
    sampling = Sampling(greedy=True) if sampling is None else sampling
    if not sampling.greedy:
        raise InputError('contrastive search draws nothing; leave out temperature, top_p, min_p and typical_p')
    check_ending(ending, 'contrastive search')
    config = engine.model.config
    chain = sampling.chain(config.vocab_size, ending.end_of_text)
    requests = make_requests(config.block_size, prompts, ending, 1)
    results = []
    for start in range(0, len(requests), batch_size):
        batch = [request.prompt for request in requests[start : start + batch_size]]
        results += _search(engine, batch, contrastive, ending, chain)
    return results


def _search(
    engine: Engine, prompts: list[Sequence[int]], contrastive: Contrastive, ending: Ending, chain: Chain
) -> list[Generation]:
    config, count = engine.model.config, len(prompts)
    # Rows that fill the batch up are done before they begin.
    prompts = prompts + [[0]] * (engine.batch_size(count) - count)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_B.max())
    tokens_BL = np.zeros((len(prompts), bucket(longest + ending.max_new_tokens, config.block_size)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, : len(prompt)] = prompt
    programs = (engine.model, engine.mesh, engine.params)
    sizes = (bucket(longest, config.block_size), min(contrastive.top_k, config.vocab_size), engine.cache_dtype)
    done_B = np.arange(len(prompts)) >= count
    state = _start(*programs, engine.place(tokens_BL), engine.place(lengths_B), engine.place(done_B), *sizes)
    numbers = (np.int32(ending.max_new_tokens), np.float32(contrastive.penalty_alpha), chain)
    while not np.all(state.done_B):
        state = _advance(*programs, state, *numbers)
    results, (tokens_BL, logprobs_BL) = [], map(np.asarray, (state.tokens_BL, state.logprobs_BL))
    for row in range(count):
        new = slice(len(prompts[row]), len(prompts[row]) + int(state.count))
        results.append(Generation.ended(tokens_BL[row, new], logprobs_BL[row, new], ending))
    return results


@functools.partial(jax.jit, static_argnames=('model', 'mesh', 'padded_length', 'candidates', 'dtype'))
def _start(model, mesh, params, tokens_BL, lengths_B, done_B, padded_length: int, candidates: int, dtype) -> _State:
    """Reads the prompts, of which there are the first `padded_length` tokens."""
    batch, length = tokens_BL.shape
    with activate(mesh):
        cache = model.init_cache(batch, length, dtype)
        arguments = (tokens_BL[:, :padded_length], lengths_B, cache)
        (logits_BV, cache), hidden_BTD = _apply(model, params, *arguments, method='prefill')
    hidden_BLD = jnp.pad(hidden_BTD, ((0, 0), (0, length - padded_length), (0, 0)))
    rows_R = jnp.repeat(jnp.arange(batch), candidates)
    return _State(
        seen=Seen(cache, lengths_B).rows(rows_R),
        parents_B=jnp.arange(batch) * candidates,
        logits_BV=logits_BV,
        tokens_BL=tokens_BL,
        logprobs_BL=jnp.zeros(tokens_BL.shape, jnp.float32),
        hidden_BLD=hidden_BLD,
        lengths_B=lengths_B,
        count=jnp.zeros((), jnp.int32),
        done_B=done_B,
    )


@functools.partial(jax.jit, static_argnames=('model', 'mesh'), donate_argnames='state')
def _advance(model, mesh, params, state: _State, max_new_tokens, penalty_alpha, chain: Chain) -> _State:
    """Some tokens more, for as long as any text goes on; `state` is donated."""
    batch = state.parents_B.size
    candidates = state.seen.lengths_B.size // batch

    def unfinished(carry):
        steps, state = carry
        return (steps < STEPS_AT_A_TIME) & ~jnp.all(state.done_B)

    def step(carry):
        steps, state = carry
        new_B = jnp.full(batch, state.count)
        scores_BV = chain.process(state.logits_BV, state.tokens_BL, state.lengths_B, new_B)
        probabilities_Bk, tokens_Bk = jax.lax.top_k(jax.nn.softmax(scores_BV, axis=-1), candidates)
        seen = state.seen.rows(jnp.repeat(state.parents_B, candidates))
        positions_R1 = seen.lengths_B[:, None]
        arguments = (tokens_Bk.reshape(-1, 1), seen.cache, positions_R1)
        (logits_R1V, cache), hidden_R1D = _apply(model, params, *arguments)
        hidden_BkD = hidden_R1D.reshape(batch, candidates, -1)
        cosines_BkL = jnp.einsum('BkD,BLD->BkL', hidden_BkD, state.hidden_BLD)
        is_text_B1L = (jnp.arange(cosines_BkL.shape[-1]) < state.lengths_B[:, None])[:, None]
        likeness_Bk = jnp.max(jnp.where(is_text_B1L, cosines_BkL, -1.0), axis=-1)
        taken_B = jnp.argmax((1 - penalty_alpha) * probabilities_Bk - penalty_alpha * likeness_Bk, axis=-1)
        rows_B = jnp.arange(batch)
        token_B, parents_B = tokens_Bk[rows_B, taken_B], rows_B * candidates + taken_B
        places = (rows_B, state.lengths_B)
        logprobs_BV = jax.nn.log_softmax(state.logits_BV, axis=-1)
        ended_B = (token_B == chain.end_of_text) | (state.count + 1 >= max_new_tokens)
        return steps + 1, _State(
            seen=Seen(cache, seen.lengths_B + 1),
            parents_B=parents_B,
            logits_BV=logits_R1V[parents_B, 0],
            tokens_BL=state.tokens_BL.at[places].set(token_B),
            logprobs_BL=state.logprobs_BL.at[places].set(logprobs_BV[rows_B, token_B]),
            hidden_BLD=state.hidden_BLD.at[places].set(hidden_BkD[rows_B, taken_B]),
            lengths_B=state.lengths_B + 1,
            count=state.count + 1,
            done_B=state.done_B | ended_B,
        )

    with activate(mesh):
        return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]


def _apply(model, params, tokens_BT, *arguments, method: str = '__call__') -> tuple[tuple, jax.Array]:
    """What `model.apply` gives, and the hidden states behind the logits as float32 vectors of length 1."""
    result, captured = model.apply(
        {'params': params},
        tokens_BT,
        *arguments,
        method=method,
        mutable=['intermediates'],
        capture_intermediates=lambda module, _: module.name == 'ln_f',
    )
    hidden_BTD = captured['intermediates']['ln_f']['__call__'][0].astype(jnp.float32)
    return result, hidden_BTD / jnp.linalg.norm(hidden_BTD, axis=-1, keepdims=True)
