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
from gpt_jax.inference.engine import Engine, of_tokens, pack, padded_length, run_steps
from gpt_jax.inference.generate import Generation, Request, StoppingCriteria, longest_text
from gpt_jax.inference.sampling import Chain, Sampling, check_whole, check_within
from gpt_jax.models.cache import Cache, take_rows
from gpt_jax.parallel import activate


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Contrastive search, a strategy of `generate`; the settings have Hugging Face's names.

    Attributes:
      penalty_alpha: weight of unlikeness against probability; in [0, 1], at 0 it is greedy decoding.
      top_k: candidates at each step.

    Raises:
      InputError: a value is out of range.
    """

    penalty_alpha: float = 0.6
    top_k: int = 4

    draws = False
    largest_batch = None

    def __post_init__(self):
        check_within('penalty_alpha', self.penalty_alpha, 0, 1)
        if self.top_k < 1:
            raise InputError(f'top_k={self.top_k} must be at least 1 for contrastive search: how many candidates')
        check_whole('top_k', self.top_k, 1)

    def rows(self, vocab_size: int) -> int:
        """Of the KV cache, for each request."""
        return min(self.top_k, vocab_size)

    def check_settings(self, sampling: Sampling, stopping: StoppingCriteria) -> None:
        """Raises InputError where they do not go with contrastive search."""
        if not sampling.greedy:
            raise InputError('contrastive search draws nothing; leave out temperature, top_p, min_p and typical_p')
        stopping.check_search('contrastive search')

    def check(self, engine: Engine, requests: Sequence[Request], stopping: StoppingCriteria) -> None:
        """Any model does, for any requests."""

    def begin(
        self, engine: Engine, requests: Sequence[Request], sampling: Sampling, stopping: StoppingCriteria, seed: int
    ) -> 'ContrastiveBatch':
        """A search for each request."""
        del seed
        return ContrastiveBatch(engine, requests, self, sampling, stopping)


class ContrastiveBatch:
    """Texts on their way; they are there when all of them have ended.

    Attributes:
      unfinished: whether any text goes on.
      generations: at the end the text of each request.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        contrastive: Contrastive,
        sampling: Sampling,
        stopping: StoppingCriteria,
    ):
        config = engine.model.config
        self._engine, self._requests, self._stopping = engine, requests, stopping
        chain = sampling.chain(config.vocab_size, stopping.ends)
        self._rules = (np.int32(stopping.max_new_tokens), np.float32(contrastive.penalty_alpha), chain)
        rows = engine.batch_size(len(requests))
        width = padded_length(longest_text(requests, stopping), config.block_size)
        tokens_BL, lengths_B = pack([request.prompt for request in requests], width, rows)
        # Rows that fill the batch up are done before they begin.
        arrays = map(engine.place, (tokens_BL, lengths_B, np.arange(rows) >= len(requests)))
        padded = padded_length(int(lengths_B.max()), config.block_size)
        sizes = (padded, min(contrastive.top_k, config.vocab_size), engine.cache_dtype)
        self._state = start_search(engine.model, engine.mesh, engine.params, *arrays, *sizes)
        self.unfinished, self.generations = True, []

    def advance(self, steps: int) -> None:
        """At most `steps` tokens more for each text."""
        engine = self._engine
        self._state = advance_search(engine.model, engine.mesh, engine.params, self._state, steps, *self._rules)
        self.unfinished = not np.all(self._state.done_B)
        if not self.unfinished:
            tokens_BL, logprobs_BL = map(np.asarray, (self._state.tokens_BL, self._state.logprobs_BL))
            for row, request in enumerate(self._requests):
                new = slice(len(request.prompt), len(request.prompt) + int(self._state.count))
                found = (tokens_BL[row, new], logprobs_BL[row, new])
                self.generations.append(Generation.finished(*found, self._stopping.ends))


# What happens on the device.


@flax.struct.dataclass
class ContrastiveState:
    """A batch between two steps.

    Attributes:
      cache: of each text k times, with another candidate as its last token.
      parents_B: the row of `cache` whose candidate was taken.
      logits_BV: of the token after each text.
      tokens_BL, logprobs_BL: texts, and the model's log-probabilities of new tokens.
      hidden_BLD: hidden states of the texts' tokens, of length 1.
      lengths_B: of the texts.
      count: new tokens.
      done_B: which texts have ended.
    """

    cache: Cache
    parents_B: jax.Array
    logits_BV: jax.Array
    tokens_BL: jax.Array
    logprobs_BL: jax.Array
    hidden_BLD: jax.Array
    lengths_B: jax.Array
    count: jax.Array
    done_B: jax.Array


@functools.partial(jax.jit, static_argnames=('model', 'mesh', 'padded_length', 'candidates', 'dtype'))
def start_search(
    model, mesh, params, tokens_BL, lengths_B, done_B, padded_length: int, candidates: int, dtype
) -> ContrastiveState:
    """Reads the prompts, of which there are the first `padded_length` tokens."""
    batch, length = tokens_BL.shape
    with activate(mesh):
        cache = model.init_cache(batch, length, dtype)
        arguments = (tokens_BL[:, :padded_length], lengths_B, cache)
        (logits_BV, cache), hidden_BTD = _apply(model, params, *arguments, method='prefill')
    hidden_BLD = jnp.pad(hidden_BTD, ((0, 0), (0, length - padded_length), (0, 0)))
    rows_R = jnp.repeat(jnp.arange(batch), candidates)
    return ContrastiveState(
        cache=take_rows(cache, rows_R),
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
def advance_search(
    model, mesh, params, state: ContrastiveState, steps, max_new_tokens, penalty_alpha, chain: Chain
) -> ContrastiveState:
    """At most `steps` tokens more, for as long as any text goes on; `state` is donated."""
    batch = state.parents_B.size
    candidates = state.cache['lengths'].size // batch

    def step(state):
        new_B = jnp.full(batch, state.count)
        scores_BV = chain.process(state.logits_BV, state.tokens_BL, state.lengths_B, new_B)
        probabilities_Bk, tokens_Bk = jax.lax.top_k(jax.nn.softmax(scores_BV, axis=-1), candidates)
        is_banned_Bk = jnp.isneginf(jnp.take_along_axis(scores_BV, tokens_Bk, axis=-1))
        cache = take_rows(state.cache, jnp.repeat(state.parents_B, candidates))
        arguments = (tokens_Bk.reshape(-1, 1), cache, cache['lengths'][:, None])
        (logits_R1V, cache), hidden_R1D = _apply(model, params, *arguments)
        hidden_BkD = hidden_R1D.reshape(batch, candidates, -1)
        cosines_BkL = jnp.einsum('BkD,BLD->BkL', hidden_BkD, state.hidden_BLD)
        is_text_B1L = (jnp.arange(cosines_BkL.shape[-1]) < state.lengths_B[:, None])[:, None]
        likeness_Bk = jnp.max(jnp.where(is_text_B1L, cosines_BkL, -1.0), axis=-1)
        worth_Bk = (1 - penalty_alpha) * probabilities_Bk - penalty_alpha * likeness_Bk
        # Where fewer than k tokens are left, what was dropped is among the candidates, and may be unlike the text.
        taken_B = jnp.argmax(jnp.where(is_banned_Bk, -jnp.inf, worth_Bk), axis=-1)
        rows_B = jnp.arange(batch)
        token_B, parents_B = tokens_Bk[rows_B, taken_B], rows_B * candidates + taken_B
        next_slots = (rows_B, state.lengths_B)
        logprobs_BV = jax.nn.log_softmax(state.logits_BV, axis=-1)
        ended_B = chain.is_end(token_B) | (state.count + 1 >= max_new_tokens)
        return ContrastiveState(
            cache=cache,
            parents_B=parents_B,
            logits_BV=logits_R1V[parents_B, 0],
            tokens_BL=state.tokens_BL.at[next_slots].set(token_B),
            logprobs_BL=state.logprobs_BL.at[next_slots].set(logprobs_BV[rows_B, token_B]),
            hidden_BLD=state.hidden_BLD.at[next_slots].set(hidden_BkD[rows_B, taken_B]),
            lengths_B=state.lengths_B + 1,
            count=state.count + 1,
            done_B=state.done_B | ended_B,
        )

    with activate(mesh):
        return run_steps(step, lambda state: ~jnp.all(state.done_B), steps, state)


def _apply(model, params, tokens_BT, *arguments, method: str = '__call__') -> tuple[tuple, jax.Array]:
    """Logits and cache, and the hidden states behind the logits as float32 vectors of length 1."""
    (logits, cache), captured = model.apply(
        {'params': params},
        tokens_BT,
        *arguments,
        method=method,
        mutable=['intermediates'],
        capture_intermediates=lambda module, _: module.name == 'ln_f',
    )
    hidden_BTD = captured['intermediates']['ln_f']['__call__'][0].astype(jnp.float32)
    return (of_tokens(params, logits), cache), hidden_BTD / jnp.linalg.norm(hidden_BTD, axis=-1, keepdims=True)
