"""Contrastive search against one with lists and no cache (numpy_search.py)."""

import numpy as np
import numpy_search
import pytest

from gpt_jax.errors import InputError
from gpt_jax.inference import Contrastive, Sampling, StoppingCriteria, contrastive, generate

COUNT, OFTEN, NEVER = 12, 10, 23


def contrastive_search(engine, prompts, settings, stopping, sampling=None):
    sampling = Sampling(greedy=True) if sampling is None else sampling
    return [result for (result,) in generate(engine, prompts, sampling, stopping, strategy=settings)]


@pytest.mark.parametrize('end', [OFTEN, NEVER])
@pytest.mark.parametrize('top_k', [2, 5])
def test_texts_are_those_of_a_search_without_a_cache(searched, top_k, end):
    texts = set()
    for alpha in (0.0, 0.3, 0.6, 0.9):
        found = contrastive_search(
            searched.engine, searched.prompts, Contrastive(alpha, top_k), StoppingCriteria(COUNT, end)
        )
        for prompt, result in zip(searched.prompts, found, strict=True):
            expected = numpy_search.contrastive_search(searched.forward, prompt, COUNT, end, alpha, top_k)
            assert result.tokens + [end] * (result.finish_reason == 'stop') == expected, alpha
            texts.add(tuple(expected))
    assert len(texts) > len(searched.prompts)  # alpha made a difference


def test_log_probabilities_are_the_models_own(searched):
    for prompt, result in zip(
        searched.prompts,
        contrastive_search(searched.engine, searched.prompts, Contrastive(), StoppingCriteria(COUNT, NEVER)),
        strict=True,
    ):
        logprobs, _ = searched.forward(prompt + result.tokens)
        expected = logprobs[np.arange(len(prompt) - 1, len(logprobs) - 1), result.tokens]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)


def test_filters_act_and_a_batch_finds_what_each_prompt_finds_alone(searched):
    sampling = Sampling(greedy=True, no_repeat_ngram_size=1, min_new_tokens=5)

    def find(prompts):
        results = contrastive_search(
            searched.engine, prompts, Contrastive(0.5, 3), StoppingCriteria(5, NEVER), sampling
        )
        return [result.tokens for result in results]

    together = find(searched.prompts)
    assert all(
        len(set(tokens)) == 5 and not set(tokens) & set(prompt)
        for tokens, prompt in zip(together, searched.prompts, strict=True)
    )
    assert find(searched.prompts[:1]) == together[:1]


def test_other_numbers_compile_nothing_new(searched):
    def run(alpha, count, end):
        contrastive_search(searched.engine, searched.prompts, Contrastive(alpha, 5), StoppingCriteria(count, end))
        return [program._cache_size() for program in (contrastive.start_search, contrastive.advance_search)]

    assert run(0.2, COUNT, OFTEN) == run(0.7, COUNT - 3, NEVER)


def test_settings_that_cannot_be_are_named(searched):
    with pytest.raises(InputError, match=r'penalty_alpha=1.5 must be from 0 to 1'):
        Contrastive(penalty_alpha=1.5)
    with pytest.raises(InputError, match='top_k=0 must be at least 1'):
        Contrastive(top_k=0)
    with pytest.raises(InputError, match='contrastive search draws nothing'):
        contrastive_search(searched.engine, [[1]], Contrastive(), StoppingCriteria(3, 0), Sampling(top_p=0.9))
