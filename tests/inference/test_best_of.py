"""The best of several draws, among the same draws made by themselves."""

import numpy as np
import pytest

from gpt_jax.errors import InputError
from gpt_jax.inference import BestOf, Sampling, StoppingCriteria, generate

DRAWN, OFTEN = Sampling(temperature=1.5), 10


@pytest.mark.parametrize('length_penalty', [0.0, 1.0])
def test_the_likeliest_draws_come_back_with_their_scores(searched, length_penalty):
    stopping = StoppingCriteria(10, OFTEN)
    drawn = generate(searched.engine, searched.prompts, DRAWN, stopping, num_samples=6, seed=3)
    best = BestOf(6, num_return_sequences=2, length_penalty=length_penalty)
    kept = generate(searched.engine, searched.prompts, DRAWN, stopping, strategy=best, seed=3)
    stopped = 0
    for prompt, all_, best in zip(searched.prompts, drawn, kept, strict=True):
        scores = {}
        for result in all_:
            new = result.tokens + [OFTEN] * (result.finish_reason == 'stop')
            stopped += result.finish_reason == 'stop'
            logprobs, _ = searched.forward(prompt + new)
            total = logprobs[np.arange(len(prompt) - 1, len(logprobs) - 1), new].sum()
            scores[tuple(result.tokens)] = total / len(new) ** length_penalty
        expected = sorted(scores, key=scores.get, reverse=True)[:2]
        assert [tuple(result.tokens) for result in best] == expected
        np.testing.assert_allclose([result.score for result in best], [scores[t] for t in expected], atol=1e-4)
    assert 0 < stopped < 18


def test_settings_that_cannot_be_are_named(searched):
    def run(sampling=DRAWN, best_of=2, kept=1):
        generate(searched.engine, [[1]], sampling, StoppingCriteria(3, 0), strategy=BestOf(best_of, kept))

    with pytest.raises(InputError, match='best_of=2 with greedy decoding'):
        run(Sampling(greedy=True))
    with pytest.raises(InputError, match='num_return_sequences=3 must be from 1 to best_of=2'):
        run(kept=3)
