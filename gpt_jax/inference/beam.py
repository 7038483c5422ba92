"""Beam search: the likeliest texts among those that begin with the likeliest tokens.

Meanings and scores are those of Hugging Face's `generate`.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from gpt_jax.errors import InputError
from gpt_jax.inference import beam_loop as loop
from gpt_jax.inference.buckets import bucket
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.request import Ending, Generation, check_ending, make_requests
from gpt_jax.inference.sampling import Chain, Sampling


@dataclasses.dataclass(frozen=True)
class Beams:
    """Settings of a beam search, with Hugging Face's names.

    Attributes:
      num_beams: texts that are followed at once.
      length_penalty: a text's score is its log-probability over its length to this power: above 0 favours long ones.
      early_stopping: when a search ends that has found num_beams ended texts. True: at once. False: when the best open
        text, if it ended now, would not be among them. 'never': when it could not be, however long it gets.
      num_return_sequences: how many of the best texts come back.
      num_beam_groups: groups of beams that choose in turn (Vijayakumar et al. 2018); 1: no groups.
      diversity_penalty: with groups: taken off a token's log-probability for each beam of the groups before that takes
        the same one at this step.

    Raises:
      InputError: a value is out of range, or values contradict each other.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self):
        for name in ('num_beams', 'num_return_sequences', 'num_beam_groups'):
            if getattr(self, name) < 1:
                raise InputError(f'{name}={getattr(self, name)} must be at least 1')
        if not math.isfinite(self.length_penalty):
            raise InputError(f'length_penalty={self.length_penalty} must be a number')
        if not isinstance(self.early_stopping, bool) and self.early_stopping != 'never':
            raise InputError(f"early_stopping={self.early_stopping!r} must be True, False or 'never'")
        if self.num_return_sequences > self.num_beams:
            raise InputError(
                f'num_return_sequences={self.num_return_sequences} exceeds num_beams={self.num_beams}; '
                'use more beams or fewer sequences'
            )
        if self.num_beams % self.num_beam_groups:
            raise InputError(f'num_beams={self.num_beams} must be a multiple of num_beam_groups={self.num_beam_groups}')
        if not 0 <= self.diversity_penalty < math.inf:
            raise InputError(f'diversity_penalty={self.diversity_penalty} must be at least 0')
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise InputError(
                f'diversity_penalty={self.diversity_penalty} is between groups of beams: set num_beam_groups as well'
            )


def beam_search(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    beams: Beams,
    ending: Ending,
    sampling: Sampling | None = None,
    *,
    batch_size: int = 8,
) -> list[list[Generation]]:
    """The best continuations of each prompt, the best first, with their scores.

    Args:
      engine: the model.
      prompts: token ids; an empty one starts a new document, from end-of-text.
      beams: the settings.
      ending: when a continuation is over; without stop strings and sliding.
      sampling: filters that act in every strategy, such as no_repeat_ngram_size, with greedy=True; None: no filters.
      batch_size: prompts searched at once.

    Returns:
      `num_return_sequences` continuations of each prompt. A score is the sum of log-probabilities, end-of-text and the
      effect of filters among them, over length ** length_penalty.

    Raises:
      InputError: a prompt and its new tokens exceed block_size, or settings that do not go with beams.
    """
    sampling = Sampling(greedy=True) if sampling is None else sampling
    if not sampling.greedy:
        raise InputError(
            f'num_beams={beams.num_beams} with sampling: a beam search draws nothing; leave out temperature, top_k, '
            'top_p, min_p and typical_p'
        )
    check_ending(ending, 'beam search')
    requests = make_requests(engine.model.config.block_size, prompts, ending, 1)
    chain = sampling.chain(engine.model.config.vocab_size, ending.end_of_text)
    results = []
    for start in range(0, len(requests), batch_size):
        batch = [request.prompt for request in requests[start : start + batch_size]]
        results += _search(engine, batch, beams, ending, chain)
    return results


def _search(
    engine: Engine, prompts: list[Sequence[int]], beams: Beams, ending: Ending, chain: Chain
) -> list[list[Generation]]:
    count = len(prompts)
    # Rows that fill the batch up are done before they begin.
    prompts = prompts + [[0]] * (engine.batch_size(count) - count)
    lengths_P = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_PL = np.zeros((len(prompts), bucket(int(lengths_P.max()) + ending.max_new_tokens)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_PL[row, : len(prompt)] = prompt
    rules = loop.Rules(
        chain=chain,
        max_new_tokens=np.int32(ending.max_new_tokens),
        length_penalty=np.float32(beams.length_penalty),
        diversity_penalty=np.float32(beams.diversity_penalty),
        ends_when_full=np.bool_(beams.early_stopping is True),
        hopes_for_longest=np.bool_(beams.early_stopping == 'never' and beams.length_penalty > 0),
        prompts_P=lengths_P,
    )
    logits_PV, seen = engine.prefill(prompts, ending.max_new_tokens)
    sizes = (beams.num_beam_groups, beams.num_beams // beams.num_beam_groups)
    state = loop.start(logits_PV, seen, tokens_PL, np.arange(len(prompts)) < count, rules, *sizes)
    while bool(loop.goes_on(state, rules)):
        state = loop.advance(engine.model, engine.mesh, engine.params, state, rules)
    return [
        _best(jax.tree.map(lambda array, p=p: array[p], parts), len(prompts[p]), beams, ending)
        for parts in [jax.tree.map(np.asarray, (state.ended, state.counts))]
        for p in range(count)
    ]


def _best(parts: tuple[loop.Texts, np.ndarray], start: int, beams: Beams, ending: Ending) -> list[Generation]:
    """The best of all groups."""
    ended, counts = jax.tree.map(lambda array: array.reshape(beams.num_beams, *array.shape[2:]), parts)
    results = []
    for index in np.argsort(-ended.scores, kind='stable')[: beams.num_return_sequences]:
        new = slice(start, start + counts[index])
        tokens, logprobs, score = ended.tokens[index, new], ended.logprobs[index, new], float(ended.scores[index])
        results.append(Generation.ended(tokens, logprobs, ending, score))
    return results
