"""Requests in, texts out: from a prompt to the drawn token.

    results = generate(engine, prompts, Sampling(top_p=0.9), StoppingCriteria(64, end_of_text), num_samples=2)
    results = generate(engine, prompts, Sampling(greedy=True), stopping, strategy=Beams(4))

`stream` gives the same as it grows. Both cut the requests into batches and let each batch advance until it is
finished. `SamplingBatch`, here, takes one token after another; `Beams`, `Contrastive` and `Speculative` bring their
own batches. A server uses a `SamplingBatch` directly: requests join it and leave it between any two tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.checkpoints import LanguageModel
from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.inference.engine import STEPS_AT_A_TIME, Engine, pack, padded_length, read, run_steps
from gpt_jax.inference.sampling import LARGEST_SEED, Chain, Sampling, check_whole, check_within
from gpt_jax.models import GPT
from gpt_jax.models.cache import Cache, put_rows
from gpt_jax.parallel import activate
from gpt_jax.parallel.devices import host_memory, memory_of

# What Python takes for a finished continuation, and for each of its tokens with its log-probability.
RESULT_BYTES, RESULT_TOKEN_BYTES = 500, 60


@dataclasses.dataclass(frozen=True)
class StoppingCriteria:
    """When a continuation is over.

    Attributes:
      max_new_tokens: at most this many tokens.
      end_of_text: the token that ends it, and that an empty prompt starts from.
      stop: the new tokens so far -> how many of them to keep, or None to go on (`StopStrings`).
      allow_sliding: where the text outgrows block_size, go on from the last half of a block; without it prompt and new
        tokens must fit in block_size.
      eos_token_ids: the tokens that end it, where a checkpoint names its own; none: `end_of_text`.

    Raises:
      InputError: max_new_tokens is no count.
    """

    max_new_tokens: int
    end_of_text: int
    stop: Callable[[Sequence[int]], int | None] | None = None
    allow_sliding: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_whole('max_new_tokens', self.max_new_tokens, 1)

    @classmethod
    def of(
        cls,
        loaded: LanguageModel,
        max_new_tokens: int,
        stop: Callable[[Sequence[int]], int | None] | None = None,
        allow_sliding: bool = False,
    ) -> 'StoppingCriteria':
        """Ends texts where the checkpoint says: at its own `eos_token_ids`, as far as its tokenizer has them."""
        # A config.json of Hugging Face's names GPT-2's 50256 unless told otherwise, whatever the vocabulary.
        is_token_V = loaded.tokenizer.is_token(loaded.model.config.vocab_size)
        ends = tuple(id_ for id_ in loaded.eos_token_ids if 0 <= id_ < len(is_token_V) and is_token_V[id_])
        return cls(max_new_tokens, loaded.tokenizer.end_of_text, stop, allow_sliding, ends)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.eos_token_ids or (self.end_of_text,)

    def check_search(self, strategy: str) -> None:
        """Raises InputError where it asks for what only sampling and greedy decoding do."""
        if self.stop is not None:
            raise InputError(f'stop strings do not go with {strategy}; use greedy decoding or sampling')
        if self.allow_sliding:
            raise InputError(f'allow_sliding does not go with {strategy}; use fewer new tokens, or sampling')


@dataclasses.dataclass
class Generation:
    """One continuation.

    Attributes:
      tokens: the new token ids, without end-of-text.
      logprobs: the model's own log-probability of each, in nats, before temperature and filters.
      finish_reason: 'stop' at end-of-text or where `StoppingCriteria.stop` says, 'length' otherwise; None while it
        grows.
      score: what strategies that compare continuations compare them by; None where none does.
      end_logprob: the log-probability of the end-of-text that ended it; None where none did.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None
    score: float | None = None
    end_logprob: float | None = None

    @classmethod
    def finished(
        cls, tokens: Sequence[int], logprobs: Sequence[float], ends: Sequence[int], score: float | None = None
    ) -> 'Generation':
        """Of new tokens up to the first of those that end a text, or beyond it."""
        tokens, logprobs = list(map(int, tokens)), list(map(float, logprobs))
        kept = next((place for place, token in enumerate(tokens) if token in ends), None)
        if kept is None:
            return cls(tokens, logprobs, 'length', score)
        return cls(tokens[:kept], logprobs[:kept], 'stop', score, logprobs[kept])


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of at least one token, and which of the draws continues it: (index of the prompt, of the sample)."""

    prompt: Sequence[int]
    draw: tuple[int, int] = (0, 0)


class Batch(Protocol):
    """Requests on their way.

    Attributes:
      unfinished: whether any goes on.
      generations: what there is of each continuation, in the order of requests; a search has some at its end alone.
    """

    unfinished: bool
    generations: list[Generation]

    def advance(self, steps: int) -> None:
        """At most `steps` steps more, and at least one."""


class Strategy(Protocol):
    """A way to continue requests other than by one token after another.

    Attributes:
      draws: whether it draws tokens. What does not has one request a prompt.
      largest_batch: how many requests it takes at once; None: any number.
    """

    draws: bool
    largest_batch: int | None

    def begin(
        self, engine: Engine, requests: Sequence[Request], sampling: Sampling, stopping: StoppingCriteria, seed: int
    ) -> Batch:
        """A batch of requests that has not advanced."""

    def rows(self, vocab_size: int) -> int:
        """How many rows of the KV cache a request takes."""

    def check_settings(self, sampling: Sampling, stopping: StoppingCriteria) -> None:
        """Raises InputError where settings do not go together, whatever the model."""

    def check(self, engine: Engine, requests: Sequence[Request], stopping: StoppingCriteria) -> None:
        """Raises InputError where they do not go with the model or the requests."""


@dataclasses.dataclass(frozen=True)
class BestOf:
    """The likeliest of several draws.

    The score is a beam's: the sum of the model's own log-probabilities, before temperature and filters and with that of
    end-of-text, over length ** length_penalty. With length_penalty=1 it is the mean of a token.

    Attributes:
      best_of: draws of each prompt.
      num_return_sequences: how many of them come back, the best first.
      length_penalty: see above.

    Raises:
      InputError: more sequences than draws, or a number out of range.
    """

    best_of: int
    num_return_sequences: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        check_whole('best_of', self.best_of, 1)
        check_within('length_penalty', self.length_penalty, -10, 10)
        if not 1 <= self.num_return_sequences <= self.best_of:
            raise InputError(
                f'num_return_sequences={self.num_return_sequences} must be from 1 to best_of={self.best_of}'
            )

    def choose(self, drawn: Sequence[Generation]) -> list[Generation]:
        """The best of the draws of one prompt, with their scores."""
        for generation in drawn:
            logprobs = generation.logprobs + [generation.end_logprob] * (generation.end_logprob is not None)
            generation.score = sum(logprobs) / max(1, len(logprobs)) ** self.length_penalty
        return sorted(drawn, key=lambda generation: generation.score, reverse=True)[: self.num_return_sequences]


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stopping: StoppingCriteria,
    *,
    strategy: Strategy | BestOf | None = None,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
) -> list[list[Generation]]:
    """Continues each prompt `num_samples` times.

    A continuation depends on the seed, the index of its prompt and its own among the samples, not on what else is
    drawn, nor on how the work is cut into batches (but for the rounding of logits).

    Args:
      engine: the model.
      prompts: token ids; an empty one starts a new document, from end-of-text.
      sampling: how a token is chosen. A search draws nothing: it takes greedy=True and the filters that act in all.
      stopping: when a continuation is over; for a search without stop strings and sliding.
      strategy: `Beams`, `Contrastive`, `Speculative` or `BestOf`; None: one token after another.
      num_samples: continuations of each prompt. A search has its own `num_return_sequences`.
      seed: of the draws.
      batch_size: sequences (where there is a search: prompts) decoded at once.

    Returns:
      The continuations of each prompt; of a search the best first, with their scores.

    Raises:
      InputError: a prompt and its new tokens exceed block_size, a token of a prompt is none of the model's, a number is
        out of range, settings do not go together, or what they take exceeds the memory that there is.
    """
    counts = {'num_samples': num_samples, 'seed': seed, 'batch_size': batch_size}
    results = list(dict(stream(engine, prompts, sampling, stopping, strategy=strategy, **counts)).values())
    of_prompt = len(results) // max(1, len(prompts))
    return [results[start : start + of_prompt] for start in range(0, len(results), max(1, of_prompt))]


def stream(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stopping: StoppingCriteria,
    *,
    strategy: Strategy | BestOf | None = None,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    first: int = 0,
    steps: int = STEPS_AT_A_TIME,
) -> Iterator[tuple[int, Generation]]:
    """`generate`, watched: (index, continuation) for each of a batch after every `steps` tokens.

    The last of a continuation has a `finish_reason`. Index 0 is the first sample of the first prompt, 1 its second.
    `first` is the index of the first prompt as far as draws are concerned. Raises as `generate`, before anything else.
    """
    check_settings(sampling, stopping, strategy, num_samples=num_samples, seed=seed, batch_size=batch_size)
    if isinstance(strategy, BestOf):
        counts = {'num_samples': strategy.best_of, 'seed': seed, 'batch_size': batch_size, 'first': first}
        drawn = list(dict(stream(engine, prompts, sampling, stopping, **counts)).values())
        of_prompt = (drawn[start : start + strategy.best_of] for start in range(0, len(drawn), strategy.best_of))
        return enumerate(generation for draws in of_prompt for generation in strategy.choose(draws))
    config = engine.model.config
    for prompt in prompts:
        if len(prompt) and (min(prompt) < 0 or max(prompt) >= config.vocab_size):
            wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise InputError(f'token {wrong} of a prompt is not among the {config.vocab_size} of the model')
    requests = make_requests(config.block_size, prompts, stopping, 1, first)
    _check_memory(engine, requests, stopping, strategy, num_samples, batch_size)
    requests = make_requests(config.block_size, prompts, stopping, num_samples, first)
    sampling.chain(engine.model.config.vocab_size, stopping.ends)  # a banned token may not exist
    begin = functools.partial(_begin_sampling, engine)
    if strategy is not None:
        strategy.check(engine, requests, stopping)
        begin = functools.partial(strategy.begin, engine)
        batch_size = batch_size if strategy.largest_batch is None else min(batch_size, strategy.largest_batch)

    def updates():
        index = 0
        for start in range(0, len(requests), batch_size):
            batch = begin(requests[start : start + batch_size], sampling, stopping, seed)
            while batch.unfinished:
                batch.advance(steps)
                yield from enumerate(batch.generations, index)
            index += len(batch.generations)

    return updates()


def check_settings(
    sampling: Sampling,
    stopping: StoppingCriteria,
    strategy: Strategy | BestOf | None = None,
    *,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
) -> None:
    """Raises InputError where a number is out of range or settings contradict each other, whatever the model."""
    check_whole('num_samples', num_samples, 1)
    check_whole('batch_size', batch_size, 1)
    check_whole('seed', seed, 0, LARGEST_SEED)
    if sampling.min_new_tokens > stopping.max_new_tokens:
        raise InputError(
            f'min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens={stopping.max_new_tokens}; '
            'make it less, or allow more new tokens'
        )
    if isinstance(strategy, BestOf):
        if sampling.greedy:
            raise InputError(f'best_of={strategy.best_of} with greedy decoding: all would be the same; sample instead')
    elif strategy is not None:
        if num_samples > 1 and not strategy.draws:
            raise InputError(f'num_samples={num_samples} of a search would all be the same; ask for 1')
        strategy.check_settings(sampling, stopping)


def _check_memory(
    engine: Engine,
    requests: Sequence[Request],
    stopping: StoppingCriteria,
    strategy: Strategy | None,
    num_samples: int,
    batch_size: int,
) -> None:
    """Raises InputError where the texts, or a batch of them, take more memory than there is at all.

    An estimate that leaves out much: what exceeds it cannot be made.
    """
    count, new = len(requests) * num_samples, stopping.max_new_tokens
    if not count:
        return
    there, host = count * (RESULT_BYTES + new * RESULT_TOKEN_BYTES), host_memory()
    if there > host:
        raise InputError(
            f'{count} texts of up to {new} new tokens take some {_gigabytes(there)}, and this machine has '
            f'{_gigabytes(host)}; ask for fewer samples, fewer prompts or fewer new tokens at once'
        )
    config, length = engine.model.config, longest_text(requests, stopping)
    batch_size = min(batch_size, count, (strategy and strategy.largest_batch) or count)
    rows = engine.batch_size(batch_size) * (1 if strategy is None else strategy.rows(config.vocab_size))
    slots = padded_length(min(length, config.block_size), config.block_size)
    seen = [slots if config.band(layer) is None else min(slots, config.band_size) for layer in range(config.n_layer)]
    parts = {
        'the KV cache': rows * 2 * config.d_model * engine.cache_dtype.itemsize * sum(seen),
        'logits': rows * 2 * 4 * config.vocab_size,
        'texts': rows * 2 * 8 * padded_length(length),
    }
    devices = jax.local_devices()[:1] if engine.mesh is None else list(engine.mesh.devices.flat)
    needed, memory = sum(parts.values()), memory_of(devices)
    if needed > memory:
        largest = max(parts, key=parts.get)
        raise InputError(
            f'a batch of {rows} texts of {length} tokens takes some {_gigabytes(needed)}, most for {largest}, and '
            f'there are {_gigabytes(memory)}; use a smaller batch_size, fewer beams or candidates, or fewer new tokens'
        )


def _gigabytes(count: int) -> str:
    return f'{count / 1e9:,.1f} GB'


def make_requests(
    block_size: int, prompts: Sequence[Sequence[int]], stopping: StoppingCriteria, num_samples: int = 1, first: int = 0
) -> list[Request]:
    """The requests that `generate` makes of prompts; raises InputError as it does."""
    count = stopping.max_new_tokens
    check_whole('num_samples', num_samples, 1)
    prompts = [list(prompt) or [stopping.end_of_text] for prompt in prompts]
    for index, prompt in enumerate(prompts):
        which = 'the prompt' if len(prompts) == 1 else f'prompt {index + 1}'
        if not stopping.allow_sliding and len(prompt) >= block_size:
            raise InputError(
                f'{which} has {len(prompt)} tokens and the model sees block_size={block_size} in all; '
                f'shorten the prompt to at most {block_size - 1}, or allow_sliding'
            )
        if not stopping.allow_sliding and len(prompt) + count > block_size:
            raise InputError(
                f'{which}: {len(prompt)} tokens of prompt and max_new_tokens={count} exceed block_size={block_size}; '
                f'use max_new_tokens={block_size - len(prompt)} or less, or allow_sliding'
            )
    return [Request(p, (index, sample)) for index, p in enumerate(prompts, first) for sample in range(num_samples)]


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
    """Prompt and continuation as one text: a training run's preview, which makes no copy of the parameters.

    Where both do not fit in block_size, the continuation is shortened, then the start of the prompt is cut.
    """
    block_size = model.config.block_size
    tokens = tokenizer.encode(prompt)[-(block_size - 1) :] or [tokenizer.end_of_text]
    stopping = StoppingCriteria(min(max_new_tokens, block_size - len(tokens)), tokenizer.end_of_text)
    engine = Engine(model, params, tokenizer=tokenizer, weights='share')
    ((result,),) = generate(engine, [tokens], Sampling(temperature=temperature, top_k=top_k), stopping, seed=seed)
    return prompt + tokenizer.decode(result.tokens)


@flax.struct.dataclass
class DecodeState:
    """A batch on the device. Texts are prompts with what was chosen after them, padded at their end."""

    cache: Cache  # of all but the last token of each text, or of the part of it that is still looked at
    tokens_BL: jax.Array
    logprobs_BL: jax.Array
    lengths_B: jax.Array  # of texts
    prompts_B: jax.Array  # lengths of prompts
    done_B: jax.Array
    keys_B: jax.Array

    @property
    def last_tokens(self) -> jax.Array:
        """The last token of each text: int32 [batch, 1]."""
        return jnp.take_along_axis(self.tokens_BL, self.lengths_B[:, None] - 1, axis=1)


class SamplingBatch:
    """A batch of texts, each growing by one token after another; requests join and leave between any two tokens.

        batch = SamplingBatch(engine, 8, 256, sampling, stopping)
        rows = batch.add(requests)
        while batch.unfinished:
            batch.advance(1)        # then look at batch.by_row, add(...) more, remove(row) ...

    Here lives the host's side: texts and their windows onto the context, stop strings, results. What happens on the
    device is `start_rows` and `decode`, below.

    Attributes:
      by_row: the continuation in each row, None where there is none; a finished one stays until its row is taken.
    """

    # Tokens that a step may write beyond the end of a text, and take back.
    slack = 0

    def __init__(
        self, engine: Engine, rows: int, length: int, sampling: Sampling, stopping: StoppingCriteria, seed: int = 0
    ):
        """An empty batch.

        Args:
          engine: the model.
          rows: requests at once at most.
          length: tokens of the longest text, prompt and continuation.
          sampling, stopping: of all requests.
          seed: of the draws.
        """
        self._engine, self._stopping, self._seed = engine, stopping, seed
        self._chain = sampling.chain(engine.model.config.vocab_size, stopping.ends)
        block_size = engine.model.config.block_size
        self._length = min(length, block_size)  # tokens of the longest window
        self._slots = padded_length(self._length + self.slack, block_size + self.slack)  # of the cache
        rows = engine.batch_size(rows)
        self.by_row: list[Generation | None] = [None] * rows
        # What is on the device as well. Rows without a request are done.
        self._tokens_BL, self._lengths_B = pack([], padded_length(length + self.slack), rows)
        self._prompts_B, self._draws_B2 = np.ones(rows, np.int32), np.zeros((rows, 2), np.int32)
        self._logprobs_BL = np.zeros(self._tokens_BL.shape, np.float32)
        self._done_B = np.ones(rows, bool)
        self._state: DecodeState | None = None
        self._is_stale = True  # the device does not know of the host's last change
        self._starts = [0] * rows  # where in a text its window begins
        self._unread: set[int] = set()  # rows whose window is not in the cache yet

    @property
    def unfinished(self) -> bool:
        """Whether any row goes on."""
        return not self._done_B.all()

    @property
    def generations(self) -> list[Generation]:
        """What there is of each continuation, in the order of rows."""
        return [generation for generation in self.by_row if generation is not None]

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Lets requests join, and gives the row of each; those of finished ones are taken again.

        Raises:
          ValueError: there are not enough rows, or a text may become longer than the batch's `length`.
        """
        free = np.flatnonzero(self._done_B).tolist()
        if len(requests) > len(free):
            raise ValueError(f'{len(requests)} requests for {len(free)} free rows')
        for row, request in zip(free, requests, strict=False):
            length = len(request.prompt)
            if length + self._stopping.max_new_tokens > self._tokens_BL.shape[1]:
                raise ValueError(f'a prompt of {length} tokens and its continuation exceed the length of the batch')
            self._tokens_BL[row, :length] = request.prompt
            self._lengths_B[row] = self._prompts_B[row] = length
            self._draws_B2[row], self._done_B[row] = request.draw, False
            self._starts[row] = 0
            self.by_row[row] = Generation([], [], None)
            self._unread.add(row)
        self._is_stale = True
        return free[: len(requests)]

    def remove(self, row: int) -> Generation:
        """Ends the continuation of a row where it is, and gives what there is of it."""
        self._done_B[row], self._is_stale = True, True
        self._unread.discard(row)
        generation, self.by_row[row] = self.by_row[row], None
        return generation

    def advance(self, steps: int) -> None:
        """Chooses at most `steps` tokens more for each row, at least one for one of them."""
        if self._is_stale:
            self._place()
        # Where a text has outgrown the context, a new window is read: positions are learned, so the cache cannot slide.
        for row in np.flatnonzero(~self._done_B).tolist():
            if self._lengths_B[row] - self._starts[row] - 1 >= self._slots:
                self._unread.add(row)
        if self._unread:
            self._start_rows()
            steps -= 1
        if steps:
            self._decode(steps)
        self._collect()

    def _place(self) -> None:
        """Puts the host's side of the state on the device."""
        place = self._engine.place
        self._state = DecodeState(
            cache=None if self._state is None else self._state.cache,
            tokens_BL=place(self._tokens_BL),
            logprobs_BL=place(self._logprobs_BL),
            lengths_B=place(self._lengths_B),
            prompts_B=place(self._prompts_B),
            done_B=place(self._done_B),
            keys_B=row_keys(np.uint32(self._seed), place(self._draws_B2)),
        )
        self._is_stale = False

    def _start_rows(self) -> None:
        """Reads the window of each unread row: all of its text, or its last half block once it exceeds a block."""
        block_size, windows = self._engine.model.config.block_size, {}
        for row in sorted(self._unread):
            length = int(self._lengths_B[row])
            if length - self._starts[row] > block_size:
                self._starts[row] = length - max(1, block_size // 2)
            windows[row] = self._tokens_BL[row, self._starts[row] : length]
        if len(windows) == np.sum(~self._done_B):
            # Nobody else goes on: what was read is the whole new cache.
            logits_BV, cache = self._prefill([windows.get(row, [0]) for row in range(len(self.by_row))])
            state, rows_R, cache = self._state.replace(cache=cache), None, None
        else:
            texts = [*windows.values()]
            texts += [[0]] * (self._engine.batch_size(len(texts)) - len(texts))
            logits_BV, cache = self._prefill(texts)
            # Nothing is kept of what fills the batch up: there is no row behind the last.
            rows_R = np.array([*windows, *[len(self.by_row)] * (len(texts) - len(windows))], np.int32)
            state = self._state
        self._state = start_rows(state, logits_BV, cache, rows_R, self._stopping.max_new_tokens, self._chain)
        self._unread.clear()

    def _prefill(self, texts: list[Sequence[int]]) -> tuple[jax.Array, Cache]:
        return self._engine.prefill(texts, self._length, self.slack)

    def _decode(self, steps: int) -> None:
        engine, rules = self._engine, (self._stopping.max_new_tokens, self._chain)
        self._state = decode(engine.model, engine.mesh, engine.params, self._state, steps, *rules)

    def _collect(self) -> None:
        """Brings what was chosen to the host, and ends texts at stop strings."""
        state, stopping = self._state, self._stopping
        # Copies, since the host writes to them, and the device's are donated.
        self._tokens_BL, self._logprobs_BL, self._lengths_B, self._done_B = map(
            np.array, (state.tokens_BL, state.logprobs_BL, state.lengths_B, state.done_B)
        )
        for row, generation in enumerate(self.by_row):
            if generation is None or generation.finish_reason is not None:
                continue
            new = slice(self._prompts_B[row], self._lengths_B[row])
            tokens, logprobs = self._tokens_BL[row, new].tolist(), self._logprobs_BL[row, new].tolist()
            kept, reason = len(tokens), 'length' if self._done_B[row] else None
            if tokens and tokens[-1] in stopping.ends:
                kept, reason = kept - 1, 'stop'
                generation.end_logprob = logprobs[-1]
            stop = None if stopping.stop is None else stopping.stop(tokens[:kept])
            if stop is not None:
                kept, reason = stop, 'stop'
                self._is_stale |= not self._done_B[row]
                self._done_B[row] = True
            generation.tokens, generation.logprobs, generation.finish_reason = tokens[:kept], logprobs[:kept], reason


def _begin_sampling(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, stopping: StoppingCriteria, seed: int
) -> SamplingBatch:
    length = longest_text(requests, stopping)
    batch = SamplingBatch(engine, len(requests), length, sampling, stopping, seed)
    batch.add(requests)
    return batch


def longest_text(requests: Sequence[Request], stopping: StoppingCriteria) -> int:
    """Tokens of the longest text that may come of requests: prompt and continuation."""
    return max(len(request.prompt) for request in requests) + stopping.max_new_tokens


@jax.jit
def row_keys(seed: int, draws_B2: jax.Array) -> jax.Array:
    """A key for each (prompt, sample): the same whatever batch it is in."""

    def one(draw_2):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draw_2[0]), draw_2[1])

    return jax.vmap(one)(draws_B2)


@functools.partial(jax.jit, donate_argnames='state')
def start_rows(
    state: DecodeState, logits_RV, cache: Cache | None, rows_R: jax.Array | None, max_new_tokens, chain: Chain
) -> DecodeState:
    """The first token of rows that have just been read; the others stay as they are.

    Args:
      state: donated.
      logits_RV: of the token after each of the texts that were read.
      cache: of these texts; None where `state` has it.
      rows_R: which rows of the batch they are; None: all, in order.
      max_new_tokens, chain: as of `decode`.
    """
    if rows_R is None:
        return _append(state, logits_RV, ~state.done_B, max_new_tokens, chain)
    batch = state.done_B.size
    logits_BV = jnp.zeros((batch, logits_RV.shape[1]), logits_RV.dtype).at[rows_R].set(logits_RV, mode='drop')
    started_B = jnp.zeros(batch, bool).at[rows_R].set(True, mode='drop')
    state = state.replace(cache=put_rows(state.cache, rows_R, cache))
    return _append(state, logits_BV, started_B, max_new_tokens, chain)


@functools.partial(jax.jit, static_argnames=('model', 'mesh'), donate_argnames='state')
def decode(model: GPT, mesh, params, state: DecodeState, steps, max_new_tokens, chain: Chain) -> DecodeState:
    """At most `steps` tokens more for each row that goes on: read its last token, choose the next.

    It ends sooner where no row goes on, or one that does has no slot left in the cache.

    Args:
      model, mesh, params: of an engine.
      state: donated.
      steps: how many at most.
      max_new_tokens: what ends a row, beside the end of text.
      chain: how tokens are chosen.
    """

    def goes_on(state):
        full_B = state.cache['lengths'] >= state.cache['positions'].shape[1]
        return ~jnp.all(state.done_B) & ~jnp.any(~state.done_B & full_B)

    def step(state):
        active_B = ~state.done_B
        logits_BTV, cache = read(model, params, state.cache, state.last_tokens, active_B)
        return _append(state.replace(cache=cache), logits_BTV[:, 0], active_B, max_new_tokens, chain)

    with activate(mesh):
        return run_steps(step, goes_on, steps, state)


def _append(state: DecodeState, logits_BV: jax.Array, active_B: jax.Array, max_new_tokens, chain: Chain) -> DecodeState:
    """Chooses a token for each active row."""
    new_B = state.lengths_B - state.prompts_B
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, new_B)
    token_B = chain.choose(keys_B, logits_BV, state.tokens_BL, state.lengths_B, new_B)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]
    # A slot that does not exist takes nothing.
    slot_B = jnp.where(active_B, state.lengths_B, state.tokens_BL.shape[1])
    rows_B = jnp.arange(slot_B.size)
    ended_B = chain.is_end(token_B) | (new_B + 1 >= max_new_tokens)
    return state.replace(
        tokens_BL=state.tokens_BL.at[rows_B, slot_B].set(token_B, mode='drop'),
        logprobs_BL=state.logprobs_BL.at[rows_B, slot_B].set(logprob_B, mode='drop'),
        lengths_B=jnp.where(active_B, state.lengths_B + 1, state.lengths_B),
        done_B=state.done_B | (active_B & ended_B),
    )
