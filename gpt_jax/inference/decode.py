"""Decoding: the prompt once, then one token a step from the key-value cache, all in one compiled program."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.inference import sampling as sampling_lib
from gpt_jax.models import GPT, unstack_layers

# Prompts and caches are padded to one of few lengths, so that a session compiles few programs.
SMALLEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      greedy: take the likeliest; the rest is then unused.
      temperature: divides the logits; above 0.
      top_k: how many of the likeliest tokens to draw from; 0: all.
      top_p: draw from the smallest set with this much probability; in (0, 1].

    Raises:
      InputError: a value is out of range.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise InputError(f'temperature={self.temperature} must be above 0; for the likeliest token use greedy')
        if self.top_k < 0:
            raise InputError(f'top_k={self.top_k} must be at least 1, or 0 for all tokens')
        if not 0 < self.top_p <= 1:
            raise InputError(f'top_p={self.top_p} must be above 0 and at most 1')


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
      tokens: the new token ids, without end-of-text.
      logprobs: the model's own log-probability of each, in nats, before temperature and filters.
      finish_reason: 'stop' at end-of-text, 'length' otherwise.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


def generate(
    model: GPT,
    params: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    end_of_text: int,
    num_samples: int = 1,
    seed: int = 0,
) -> list[Generation]:
    """Continues `prompt` `num_samples` times.

    Sample i depends on `seed` and i alone, not on how many are drawn with it.

    Args:
      model, params: a GPT and its parameters.
      prompt: token ids; empty starts a new document, from end-of-text.
      max_new_tokens: at most this many new tokens each.
      sampling: how tokens are chosen.
      end_of_text: the token that ends a continuation.
      num_samples: continuations to make.
      seed: of the draws.

    Raises:
      InputError: prompt and new tokens together exceed block_size, or a count is below 1.
    """
    prompt = list(prompt) or [end_of_text]
    block_size = model.config.block_size
    for name, value in (('max_new_tokens', max_new_tokens), ('num_samples', num_samples)):
        if value < 1:
            raise InputError(f'{name}={value} must be at least 1')
    if len(prompt) >= block_size:
        raise InputError(
            f'the prompt has {len(prompt)} tokens and the model sees block_size={block_size} in all; '
            f'shorten the prompt to at most {block_size - 1}'
        )
    if len(prompt) + max_new_tokens > block_size:
        raise InputError(
            f'{len(prompt)} tokens of prompt and max_new_tokens={max_new_tokens} exceed block_size={block_size}; '
            f'use max_new_tokens={block_size - len(prompt)} or less'
        )
    padded = np.zeros((num_samples, _bucket(len(prompt), block_size)), np.int32)
    padded[:, : len(prompt)] = prompt
    cache_length = _bucket(len(prompt) + max_new_tokens, block_size)
    tokens_BT, logprobs_BT = decode_loop(
        model, params, padded, len(prompt), max_new_tokens, cache_length, end_of_text, seed, sampling
    )
    rows = zip(np.asarray(tokens_BT), np.asarray(logprobs_BT), strict=True)
    return [_finish(tokens[:max_new_tokens], logprobs, end_of_text) for tokens, logprobs in rows]


def _bucket(length: int, block_size: int) -> int:
    """The least of 32, 64, 128, ..., block_size that holds `length` tokens."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, block_size)


def _finish(tokens: np.ndarray, logprobs: np.ndarray, end_of_text: int) -> Generation:
    ends = np.flatnonzero(tokens == end_of_text)
    count = int(ends[0]) if ends.size else len(tokens)
    return Generation(tokens[:count].tolist(), logprobs[:count].tolist(), 'stop' if ends.size else 'length')


def decode_loop(
    model: GPT,
    params: Any,
    prompt_BT: np.ndarray,
    prompt_length: int,
    max_new_tokens: int,
    cache_length: int,
    end_of_text: int,
    seed: int,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Prefills and decodes in one compiled program, for each shape of the prompt, cache_length and top_k.

    Args:
      model, params: a GPT and its parameters.
      prompt_BT: int32 prompts, padded on the right to any length up to `cache_length`.
      prompt_length: how much of each is prompt.
      max_new_tokens: when to stop at the latest; prompt and new tokens fit in the cache.
      cache_length: slots of the cache.
      end_of_text: the token that ends a row.
      seed: of the draws.
      sampling: how tokens are chosen.

    Returns:
      New tokens int32 and their log-probabilities float32, [batch, cache_length]; undefined past the end of a row.
    """
    rule = (sampling.greedy, sampling.top_k, sampling.top_p < 1)
    counts = (prompt_length, max_new_tokens, end_of_text, seed)
    return _decode(model, params, prompt_BT, *counts, sampling.temperature, sampling.top_p, cache_length, rule)


@functools.partial(jax.jit, static_argnames=('model', 'cache_length', 'rule'))
def _decode(
    model: GPT,
    params: Any,
    prompt_BT: jax.Array,
    prompt_length: int,
    max_new_tokens: int,
    end_of_text: int,
    seed: int,
    temperature: float,
    top_p: float,
    cache_length: int,
    rule: tuple[bool, int, bool],
) -> tuple[jax.Array, jax.Array]:
    params = {'params': unstack_layers(params)}
    batch, padded_length = prompt_BT.shape
    row_keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(batch))

    def choose(logits_BV: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, index))(row_keys)
        token_B = _choose(logits_BV, keys_B, temperature, top_p, rule)
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        return token_B, jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]

    # The prompt is padded on the right; its padding is marked unseen, and the next tokens are written over it.
    positions_T = jnp.arange(padded_length)
    positions_BT = jnp.broadcast_to(jnp.where(positions_T < prompt_length, positions_T, -1), prompt_BT.shape)
    cache = model.init_cache(batch, cache_length)
    logits_BTV, cache = model.apply(params, prompt_BT, cache=cache, positions=positions_BT)
    cache['index'] = jnp.asarray(prompt_length, jnp.int32)
    token_B, logprob_B = choose(logits_BTV[:, prompt_length - 1], 0)
    tokens_BT = jnp.zeros((batch, cache_length), jnp.int32).at[:, 0].set(token_B)
    logprobs_BT = jnp.zeros((batch, cache_length), jnp.float32).at[:, 0].set(logprob_B)

    def unfinished(carry) -> jax.Array:
        count, _, done_B, *_ = carry
        return (count < max_new_tokens) & ~jnp.all(done_B)

    def step(carry):
        count, token_B, done_B, tokens_BT, logprobs_BT, cache = carry
        positions_B1 = jnp.full((batch, 1), prompt_length + count - 1)
        logits_B1V, cache = model.apply(params, token_B[:, None], cache=cache, positions=positions_B1)
        token_B, logprob_B = choose(logits_B1V[:, 0], count)
        tokens_BT = tokens_BT.at[:, count].set(token_B)
        logprobs_BT = logprobs_BT.at[:, count].set(logprob_B)
        return count + 1, token_B, done_B | (token_B == end_of_text), tokens_BT, logprobs_BT, cache

    carry = (jnp.asarray(1), token_B, token_B == end_of_text, tokens_BT, logprobs_BT, cache)
    _, _, _, tokens_BT, logprobs_BT, _ = jax.lax.while_loop(unfinished, step, carry)
    return tokens_BT, logprobs_BT


def _choose(logits_BV, keys_B, temperature, top_p, rule: tuple[bool, int, bool]) -> jax.Array:
    is_greedy, top_k, filters_top_p = rule
    if is_greedy:
        return sampling_lib.greedy(logits_BV)
    logits_BV = sampling_lib.apply_temperature(logits_BV, temperature)
    if top_k:
        logits_BV = sampling_lib.keep_top_k(logits_BV, top_k)
    if filters_top_p:
        logits_BV = sampling_lib.keep_top_p(logits_BV, top_p)
    return sampling_lib.categorical(keys_B, logits_BV)


def sample_text(
    model: GPT,
    params: Any,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> str:
    """Prompt and continuation as one text: a training run's preview.

    Where both do not fit in block_size, the continuation is shortened, then the start of the prompt is cut.
    """
    block_size = model.config.block_size
    tokens = tokenizer.encode(prompt)[-(block_size - 1) :] or [tokenizer.end_of_text]
    room = min(max_new_tokens, block_size - len(tokens))
    sampling = Sampling(temperature=temperature, top_k=top_k)
    (result,) = generate(model, params, tokens, room, sampling, tokenizer.end_of_text, seed=seed)
    return prompt + tokenizer.decode(result.tokens)
