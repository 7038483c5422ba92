"""The best of several draws, by their likelihood."""

from collections.abc import Sequence

from gpt_jax.errors import InputError
from gpt_jax.inference.decode import STEPS_AT_A_TIME, grow
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.request import Ending, Generation
from gpt_jax.inference.sampling import Sampling


def best_of_n(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ending: Ending,
    best_of: int,
    *,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    first: int = 0,
) -> list[list[Generation]]:
    """Draws `best_of` continuations of each prompt and gives the likeliest of them, the best first.

    The score is a beam's: the sum of the model's own log-probabilities, before temperature and filters and with that of
    end-of-text, over length ** length_penalty. With length_penalty=1 it is the mean of a token. The other arguments are
    those of `decode.grow`.

    Raises:
      InputError: greedy sampling, of which all draws are the same; more sequences than draws; or as of `generate`.
    """
    if sampling.greedy:
        raise InputError(f'best_of={best_of} with greedy decoding: all would be the same; sample instead')
    if not 1 <= num_return_sequences <= best_of:
        raise InputError(f'num_return_sequences={num_return_sequences} must be from 1 to best_of={best_of}')
    draws = {'num_samples': best_of, 'seed': seed, 'batch_size': batch_size, 'first': first}
    drawn = list(dict(grow(engine, prompts, sampling, ending, steps=STEPS_AT_A_TIME, **draws)).values())
    for generation in drawn:
        generation.score = _score(generation, length_penalty)
    by_prompt = [drawn[start : start + best_of] for start in range(0, len(drawn), best_of)]
    return [sorted(results, key=lambda g: g.score, reverse=True)[:num_return_sequences] for results in by_prompt]


def _score(generation: Generation, length_penalty: float) -> float:
    logprobs = generation.logprobs
    if generation.end_logprob is not None:
        logprobs = [*logprobs, generation.end_logprob]
    return sum(logprobs) / max(1, len(logprobs)) ** length_penalty
