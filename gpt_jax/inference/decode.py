"""Continuing prompts in batches: whole, or as they grow."""

from collections.abc import Iterator, Sequence
from typing import Any

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.inference.batch import Batch
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.request import Ending, Generation, Request, make_requests
from gpt_jax.inference.sampling import Sampling
from gpt_jax.models import GPT

# Steps of one compiled loop where nobody watches: between two of them Ctrl-C and stop strings are looked at.
STEPS_AT_A_TIME = 32


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ending: Ending,
    *,
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
      sampling: how tokens are chosen.
      ending: when a continuation is over.
      num_samples: continuations of each prompt.
      seed: of the draws.
      batch_size: sequences decoded at once.

    Returns:
      The continuations of each prompt.

    Raises:
      InputError: a prompt and its new tokens exceed block_size, or a count is below 1.
    """
    updates = grow(
        engine,
        prompts,
        sampling,
        ending,
        num_samples=num_samples,
        seed=seed,
        batch_size=batch_size,
        steps=STEPS_AT_A_TIME,
    )
    results = list(dict(updates).values())
    return [results[start : start + num_samples] for start in range(0, len(results), num_samples)]


def grow(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ending: Ending,
    *,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    first: int = 0,
    steps: int = 1,
) -> Iterator[tuple[int, Generation]]:
    """`generate`, watched: (index, continuation) for each of a batch after every `steps` tokens.

    The last of a continuation has a `finish_reason`. Index 0 is the first sample of the first prompt, 1 its second.
    `first` is the index of the first prompt as far as draws are concerned. Raises as `generate`, before anything else.
    """
    requests = make_requests(engine.model.config.block_size, prompts, ending, num_samples, first)
    if batch_size < 1:
        raise InputError(f'batch_size={batch_size} must be at least 1')

    def updates():
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            for generations in stream(engine, batch, sampling, ending, seed, steps):
                yield from enumerate(generations, start)

    return updates()


def stream(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, ending: Ending, seed: int = 0, steps: int = 1
) -> Iterator[list[Generation]]:
    """Continues one batch of requests, and yields what there is of each after every `steps` tokens.

    The last thing yielded is finished. Arguments as of `generate`; the requests are those of `make_requests`.
    """
    batch = Batch(engine, requests, sampling, ending, seed)
    while batch.unfinished:
        batch.advance(steps)
        yield batch.generations


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
    ending = Ending(min(max_new_tokens, block_size - len(tokens)), tokenizer.end_of_text)
    sampling = Sampling(temperature=temperature, top_k=top_k)
    ((result,),) = generate(Engine(model, params), [tokens], sampling, ending, seed=seed)
    return prompt + tokenizer.decode(result.tokens)
