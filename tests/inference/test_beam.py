"""Beam search against one with lists and no cache (numpy_search.py), with banded layers and prompts of any lengths."""

import itertools

import numpy as np
import numpy_search
import pytest

from gpt_jax.errors import InputError
from gpt_jax.inference import Beams, Sampling, StoppingCriteria, StopStrings, beam, generate

COUNT = 10
# One that is often among the likeliest of the random model, and one that never is.
OFTEN, NEVER = 10, 23
EARLY = (False, True, 'never')


def beam_search(engine, prompts, beams, stopping, sampling=None, **settings):
    sampling = Sampling(greedy=True) if sampling is None else sampling
    return generate(engine, prompts, sampling, stopping, strategy=beams, **settings)


def check(searched, beams, end, prompts=None):
    """Compares tokens, finish and scores; gives how many texts ended by themselves."""
    prompts = searched.prompts if prompts is None else prompts
    found = beam_search(searched.engine, prompts, beams, StoppingCriteria(COUNT, end))
    settings = {'groups': beams.num_beam_groups, 'diversity': beams.diversity_penalty}
    settings |= {'length_penalty': beams.length_penalty, 'early': beams.early_stopping}
    size = beams.num_beams // beams.num_beam_groups
    for prompt, results in zip(prompts, found, strict=True):
        expected = numpy_search.beam_search(searched.next_logprobs, prompt, COUNT, end, size, **settings)
        expected = expected[: beams.num_return_sequences]
        ours = [result.tokens + [end] * (result.finish_reason == 'stop') for result in results]
        assert ours == [new for new, _ in expected], (beams, end)
        np.testing.assert_allclose([result.score for result in results], [score for _, score in expected], atol=1e-4)
    return sum(result.finish_reason == 'stop' for results in found for result in results)


def test_the_best_texts_are_those_of_a_search_without_a_cache(searched):
    stopped = {
        (penalty, early): check(searched, Beams(4, penalty, early, 4), OFTEN)
        for penalty, early in itertools.product((0.0, 1.0, 2.0, -1.0), EARLY)
    }
    # The settings made a difference, and texts of all kinds were compared.
    assert len(set(stopped.values())) > 2
    check(searched, Beams(4, num_return_sequences=4), NEVER)


@pytest.mark.slow
@pytest.mark.parametrize(('beams', 'groups'), [(4, 2), (3, 3)])
def test_groups_avoid_what_those_before_them_take(searched, beams, groups):
    for penalty, early, diversity in itertools.product((1.0, 0.0), EARLY, (0.0, 0.7, 20.0)):
        check(searched, Beams(beams, penalty, early, beams, groups, diversity), OFTEN)
    plain, diverse = (
        beam_search(
            searched.engine,
            searched.prompts,
            Beams(beams, 1.0, False, beams, groups, d),
            StoppingCriteria(COUNT, NEVER),
        )
        for d in (0.0, 20.0)
    )
    for same, different in zip(plain, diverse, strict=True):
        # Without a penalty all groups find the same; with a great one every group begins with a token of its own.
        assert len({tuple(result.tokens) for result in same}) == beams // groups
        assert len({result.tokens[0] for result in different}) >= groups


def test_one_beam_is_greedy_decoding(searched):
    for prompt in searched.prompts:
        ((result,),) = beam_search(searched.engine, [prompt], Beams(1), StoppingCriteria(COUNT, NEVER))
        tokens = list(prompt)
        for _ in range(COUNT):
            tokens.append(int(np.argmax(searched.next_logprobs(tokens))))
        assert result.tokens == tokens[len(prompt) :]
        assert result.finish_reason == 'length'


def test_a_beam_finds_what_is_likelier_than_greedy_text(searched):
    one, four = (
        beam_search(searched.engine, searched.prompts, Beams(n), StoppingCriteria(COUNT, NEVER)) for n in (1, 4)
    )
    gains = [b.score - a.score for ((a,), (b,)) in zip(one, four, strict=True)]
    assert min(gains) > -1e-5
    assert max(gains) > 1e-3


def test_log_probabilities_are_the_models_own_and_add_up_to_the_score(searched):
    for prompt, results in zip(
        searched.prompts,
        beam_search(searched.engine, searched.prompts, Beams(4, 1.0, False, 4), StoppingCriteria(COUNT, OFTEN)),
        strict=True,
    ):
        for result in results:
            logprobs, _ = searched.forward(prompt + result.tokens)
            expected = logprobs[np.arange(len(prompt) - 1, len(logprobs) - 1), result.tokens]
            np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
            ended = result.finish_reason == 'stop'
            end_logprob = logprobs[-1][OFTEN]
            assert (result.end_logprob is not None) == ended
            total = expected.sum() + ended * end_logprob
            np.testing.assert_allclose(result.score, total / (len(result.tokens) + ended), atol=1e-4)


def test_filters_act_on_beams(searched):
    plain, filtered = (
        beam_search(
            searched.engine, searched.prompts, Beams(4, 1.0, False, 4), StoppingCriteria(COUNT, OFTEN), sampling
        )
        for sampling in (None, Sampling(greedy=True, no_repeat_ngram_size=2, min_new_tokens=5, bad_words_ids=((3,),)))
    )
    assert plain != filtered
    for prompt, results in zip(searched.prompts, filtered, strict=True):
        for result in results:
            assert len(result.tokens) >= 5
            assert 3 not in result.tokens
            text = prompt + result.tokens
            # A pair may occur twice in the prompt, which is not ours to change.
            pairs = list(itertools.pairwise(text))
            assert all(pairs.index(pair) == place for place, pair in enumerate(pairs) if place >= len(prompt) - 1)


@pytest.mark.slow
def test_a_batch_finds_what_each_prompt_finds_alone(searched):
    def find(prompts, **settings):
        return beam_search(searched.engine, prompts, Beams(4, 1.0, True, 2), StoppingCriteria(COUNT, OFTEN), **settings)

    together = find(searched.prompts)
    assert [[r.tokens for r in results] for results in find(searched.prompts, batch_size=2)] == [
        [r.tokens for r in results] for results in together
    ]
    (alone,) = find(searched.prompts[1:2])
    assert [r.tokens for r in alone] == [r.tokens for r in together[1]]


def test_an_empty_prompt_starts_a_new_document(searched):
    check(searched, Beams(4), NEVER, [[NEVER]])
    assert beam_search(searched.engine, [[]], Beams(4), StoppingCriteria(3, NEVER)) == beam_search(
        searched.engine, [[NEVER]], Beams(4), StoppingCriteria(3, NEVER)
    )


def test_other_numbers_compile_nothing_new(searched):
    def run(beams, count, end):
        beam_search(searched.engine, searched.prompts, beams, StoppingCriteria(count, end))
        return [program._cache_size() for program in (beam.start_beams, beam.advance_beams)]

    before = run(Beams(4, 1.0, False), COUNT, OFTEN)
    assert run(Beams(4, 0.3, 'never', 3), COUNT - 2, NEVER) == before
    assert run(Beams(4, 0.3, True), COUNT, OFTEN) == before


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'num_beams': 0}, 'num_beams=0 must be at least 1'),
        ({'num_return_sequences': 5}, 'num_return_sequences=5 exceeds num_beams=4'),
        ({'num_beam_groups': 3}, 'num_beams=4 must be a multiple of num_beam_groups=3'),
        ({'diversity_penalty': 1.0}, 'diversity_penalty=1.0 is between groups'),
        ({'diversity_penalty': -1.0, 'num_beam_groups': 2}, 'diversity_penalty=-1.0 must be from 0 to'),
        ({'early_stopping': 'sometimes'}, "early_stopping='sometimes' must be True, False or 'never'"),
        ({'length_penalty': float('nan')}, 'length_penalty=nan'),
    ],
)
def test_settings_that_cannot_be_are_named(values, message):
    with pytest.raises(InputError, match=message) as error:
        Beams(**values)
    assert '\n' not in str(error.value)


def test_what_does_not_go_with_beams_is_refused(searched):
    def run(sampling=None, **stopping):
        beam_search(
            searched.engine,
            [[1]],
            Beams(4),
            StoppingCriteria(**({'max_new_tokens': 3, 'end_of_text': 0} | stopping)),
            sampling,
        )

    with pytest.raises(InputError, match='num_beams=4 with sampling'):
        run(Sampling(temperature=0.7))
    with pytest.raises(InputError, match='stop strings do not go with beam search'):
        run(stop=StopStrings(None, ['x']))
    with pytest.raises(InputError, match='allow_sliding does not go with beam search'):
        run(allow_sliding=True)
    with pytest.raises(InputError, match='exceed block_size=64'):
        run(max_new_tokens=64)
