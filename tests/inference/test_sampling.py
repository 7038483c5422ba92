"""Filters against NumPy, draws against the distribution that they are drawn from."""

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from gpt_jax.data.tokenizer import train_bpe
from gpt_jax.errors import InputError
from gpt_jax.inference import filters, sampling

# Whole tenths, so that ties happen.
LOGITS = hypothesis.extra.numpy.arrays(np.int32, 12, elements=st.integers(-60, 60)).map(
    lambda tenths: (tenths / 10).astype(np.float32)
)
# Compiled once, or every call would compile their loops again.
keep_top_k, keep_top_p, keep_typical_p = map(jax.jit, (filters.keep_top_k, filters.keep_top_p, filters.keep_typical_p))
few_examples = hypothesis.settings(max_examples=50, deadline=None)


def kept(filtered, logits):
    """Which tokens a filter kept; those it kept must be unchanged, the others -inf."""
    filtered = np.asarray(filtered)
    np.testing.assert_array_equal(filtered, np.where(np.isneginf(filtered), -np.inf, logits))
    return set(np.flatnonzero(np.isfinite(filtered)))


def softmax(logits):
    exponentials = np.exp(np.asarray(logits, np.float64) - logits.max())
    return exponentials / exponentials.sum()


@few_examples
@hypothesis.given(LOGITS, st.integers(1, 20))
def test_top_k_keeps_the_k_likeliest_and_what_ties_with_the_last(logits, top_k):
    threshold = np.sort(logits)[::-1][min(top_k, 12) - 1]
    expected = {token for token in range(12) if logits[token] >= threshold}
    assert kept(keep_top_k(jnp.asarray(logits), top_k), logits) == expected


@few_examples
@hypothesis.given(LOGITS, st.integers(1, 99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, percent):
    top_p, probabilities = percent / 100, softmax(logits)
    order = np.argsort(-logits, kind='stable')
    sums = np.cumsum(probabilities[order])
    hypothesis.assume(np.abs(sums - top_p).min() > 1e-5)  # beyond float32's rounding
    expected = set(order[: 1 + int(np.searchsorted(sums, top_p))])
    assert kept(keep_top_p(jnp.asarray(logits), top_p), logits) == expected


def test_top_p_follows_the_published_example():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert kept(keep_top_p(jnp.asarray(logits), 0.6), logits) == {1, 3}
    assert kept(keep_top_p(jnp.asarray(logits), 0.76), logits) == {1, 2, 3}


@pytest.mark.parametrize('top_p', [1e-9, 0.2])
def test_top_p_always_keeps_the_likeliest(top_p):
    logits = np.array([0.0, 3.0, 1.0], np.float32)
    assert kept(keep_top_p(jnp.asarray(logits), top_p), logits) == {1}


def test_top_p_of_one_keeps_even_what_rounding_would_drop():
    logits = np.array([0.0, 40.0, *[-20.0] * 30], np.float32)
    assert len(kept(keep_top_p(jnp.asarray(logits), 1.0), logits)) == 32


def test_filters_treat_each_row_alone():
    logits = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], np.float32)
    for result in (filters.keep_top_k(jnp.asarray(logits), 1), filters.keep_top_p(jnp.asarray(logits), 0.5)):
        np.testing.assert_array_equal(np.isfinite(result), [[False, False, True], [True, False, False]])


def test_temperature_divides():
    logits = np.array([[1.0, -2.0]], np.float32)
    np.testing.assert_allclose(filters.apply_temperature(jnp.asarray(logits), 0.5), [[2.0, -4.0]])


def test_greedy_takes_the_first_of_the_likeliest():
    tokens = sampling.greedy(jnp.array([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]]))
    np.testing.assert_array_equal(tokens, [1, 0])
    assert tokens.dtype == jnp.int32


def test_draws_follow_the_distribution_and_never_take_what_was_dropped():
    logits = np.array([0.0, 1.5, -np.inf, -1.0, 0.5], np.float32)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    tokens = np.asarray(sampling.categorical(keys, jnp.broadcast_to(logits, (count, 5))))
    observed = np.bincount(tokens, minlength=5)
    assert observed[2] == 0
    possible = np.isfinite(logits)
    expected = count * softmax(logits[possible])
    assert stats.chisquare(observed[possible], expected).pvalue > 1e-3


def test_a_row_is_drawn_with_its_own_key():
    logits = jnp.zeros((2, 1000))
    one, other = jax.random.key(1), jax.random.key(2)
    first = sampling.categorical(jnp.stack([one, other]), logits)
    second = sampling.categorical(jnp.stack([one, one]), logits)
    assert first[0] == second[0] == second[1]
    assert first[1] != second[1]


@pytest.mark.parametrize('vocab', [5, 256, 257, 1000])
def test_draws_from_large_vocabularies_follow_the_distribution(vocab):
    logits = 2 * np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    logits[::7] = -np.inf
    count = 20_000
    keys = jax.random.split(jax.random.key(1), count)
    tokens = np.asarray(jax.jit(sampling.categorical)(keys, jnp.broadcast_to(logits, (count, vocab))))
    expected = count * softmax(np.where(np.isfinite(logits), logits, -1e9))
    observed = np.bincount(tokens, minlength=vocab)
    assert observed[::7].sum() == 0
    # Rare tokens are counted together.
    often = expected > 10
    observed, expected = (np.append(counts[often], counts[~often].sum()) for counts in (observed, expected))
    assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


@few_examples
@hypothesis.given(LOGITS, st.integers(0, 100))
def test_min_p_keeps_what_is_probable_beside_the_likeliest(logits, percent):
    probabilities = softmax(logits)
    threshold = percent / 100 * probabilities.max()
    hypothesis.assume(np.abs(probabilities - threshold)[probabilities < probabilities.max()].min(initial=1) > 1e-6)
    expected = set(np.flatnonzero((probabilities >= threshold) | (logits == logits.max())))
    assert kept(filters.keep_min_p(jnp.asarray(logits), percent / 100), logits) == expected


@few_examples
@hypothesis.given(LOGITS, st.integers(1, 99))
def test_typical_p_keeps_the_smallest_set_about_the_entropy(logits, percent):
    probabilities = softmax(logits)
    distances = np.abs(-np.log(probabilities) + (probabilities * np.log(probabilities)).sum())
    order = np.argsort(distances, kind='stable')
    sums = np.cumsum(probabilities[order])
    hypothesis.assume(np.abs(sums - percent / 100).min() > 1e-5)
    last = distances[order[int(np.searchsorted(sums, percent / 100))]]
    # Distances that differ by rounding alone may be on either side.
    hypothesis.assume(not np.any((distances != last) & (np.abs(distances - last) < 1e-5)))
    expected = set(np.flatnonzero(distances <= last))
    assert kept(keep_typical_p(jnp.asarray(logits), percent / 100), logits) == expected


TEXTS = hypothesis.extra.numpy.arrays(np.int32, 10, elements=st.integers(0, 3))


@few_examples
@hypothesis.given(LOGITS, TEXTS, st.integers(1, 10))
def test_repetition_is_penalized_in_the_text_alone(logits, text, length):
    found = filters.penalize_repetition(logits[None], text[None], np.array([length]), 1.5)[0]
    in_text = np.isin(np.arange(12), text[:length])
    expected = np.where(in_text, np.where(logits < 0, logits * 1.5, logits / 1.5), logits)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@few_examples
@hypothesis.given(TEXTS, st.integers(1, 10), st.integers(1, 4))
def test_no_token_completes_an_ngram_of_the_text(text, length, size):
    logits = np.zeros((1, 12), np.float32)
    found = filters.ban_repeated_ngrams(logits, text[None], np.array([length]), size)[0]
    words = list(text[:length])
    ngrams = {tuple(words[i : i + size]) for i in range(length - size + 1)}
    expected = {t for t in range(12) if length >= size and (*words[length - size + 1 :], t) not in ngrams}
    assert kept(found, logits[0]) == (expected if length >= size else set(range(12)))


@few_examples
@hypothesis.given(TEXTS, st.integers(1, 10), st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=4))
def test_no_banned_word_is_completed(text, length, words):
    # Any end of text but 0 to 3, which may be words.
    chain = sampling.Sampling(greedy=True, bad_words_ids=tuple(map(tuple, words))).chain(12, end_of_text=11)
    logits = np.zeros((1, 12), np.float32)
    found = chain.process(logits, text[None], np.array([length]), np.zeros(1, np.int32))[0]
    start = list(text[:length])
    banned = {word[-1] for word in words if len(word) - 1 <= length and start[length - len(word) + 1 :] == word[:-1]}
    assert kept(found, logits[0]) == set(range(12)) - banned


def test_a_text_does_not_end_before_it_has_enough_new_tokens():
    chain = sampling.Sampling(greedy=True, min_new_tokens=3).chain(4, end_of_text=2)
    logits = np.zeros((2, 4), np.float32)
    found = chain.process(logits, np.zeros((2, 8), np.int32), np.array([5, 5]), np.array([2, 3]))
    np.testing.assert_array_equal(np.isfinite(found), [[True, True, False, True], [True] * 4])


def test_end_of_text_cannot_be_banned_as_a_word():
    assert sampling.Sampling(bad_words_ids=((2,),)).chain(4, end_of_text=2).used == ('temperature',)
    assert 'bad_words_ids' in sampling.Sampling(bad_words_ids=((2,),)).chain(4, end_of_text=3).used


EVERYTHING = {
    'temperature': 0.7,
    'top_k': 9,
    'top_p': 0.95,
    'min_p': 0.02,
    'typical_p': 0.97,
    'repetition_penalty': 1.3,
    'no_repeat_ngram_size': 2,
    'bad_words_ids': ((1, 2), (5,)),
    'min_new_tokens': 3,
}


@pytest.mark.slow
@pytest.mark.parametrize('candidates', [True, False])
def test_draws_of_a_chain_follow_its_filters_one_after_another(candidates, monkeypatch):
    if not candidates:
        monkeypatch.setattr(sampling, 'CANDIDATES', ())
    count, text = 20_000, np.array([[3, 8, 1, 3, 0, 0]], np.int32)
    logits = 0.8 * np.random.default_rng(3).standard_normal((1, 24)).astype(np.float32)
    chain = sampling.Sampling(**EVERYTHING).chain(24, end_of_text=11)
    assert bool(chain.candidates) == candidates
    expected = jnp.asarray(logits)
    lengths, new = np.array([4]), np.array([1])
    for filter_ in (
        lambda x: filters.penalize_repetition(x, text, lengths, 1.3),
        lambda x: filters.ban_repeated_ngrams(x, text, lengths, 2),
        lambda x: filters.ban_words(x, text, lengths, np.array([[1, 2], [-1, 5]])),
        lambda x: filters.ban_end_of_text(x, 11, np.array([True])),
        lambda x: filters.apply_temperature(x, 0.7),
        lambda x: filters.keep_top_k(x, 9),
        lambda x: filters.keep_top_p(x, 0.95),
        lambda x: filters.keep_min_p(x, 0.02),
        lambda x: filters.keep_typical_p(x, 0.97),
    ):
        expected = filter_(expected)
    np.testing.assert_allclose(chain.warp(chain.process(logits, text, lengths, new)), expected, rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), count)
    rows = [np.repeat(array, count, axis=0) for array in (logits, text, lengths, new)]
    observed = np.bincount(np.asarray(jax.jit(chain.choose)(keys, *rows)), minlength=24)
    possible = np.isfinite(np.asarray(expected[0]))
    assert 3 < possible.sum() < 9
    assert observed[~possible].sum() == 0
    assert stats.chisquare(observed[possible], count * softmax(np.asarray(expected[0])[possible])).pvalue > 1e-3


def test_other_numbers_compile_nothing_new():
    @jax.jit
    def choose(chain, keys, logits, text, lengths, new):
        return chain.choose(keys, logits, text, lengths, new)

    def run(**changes):
        chain = sampling.Sampling(**(EVERYTHING | changes)).chain(300, end_of_text=11)
        arrays = (np.zeros((2, 300), np.float32), np.zeros((2, 8), np.int32), np.array([3, 5]), np.array([0, 1]))
        choose(chain, jax.random.split(jax.random.key(0)), *arrays)
        return choose._cache_size()

    assert run() == 1
    numbers = {'temperature': 1.0, 'top_k': 60, 'top_p': 0.5, 'min_p': 0.3, 'typical_p': 0.2}
    assert run(**numbers, repetition_penalty=0.9, min_new_tokens=9, bad_words_ids=((7,), (8, 9))) == 1
    assert run(top_p=1.0) == 2  # a filter less


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'min_p': 1.5}, 'min_p=1.5 must be from 0 to 1'),
        ({'typical_p': 0.0}, 'typical_p=0.0 must be above 0'),
        ({'repetition_penalty': 0.0}, 'repetition_penalty=0.0 must be above 0'),
        ({'no_repeat_ngram_size': -1}, 'no_repeat_ngram_size=-1'),
        ({'min_new_tokens': -2}, 'min_new_tokens=-2'),
        ({'bad_words_ids': ((),)}, 'bad_words_ids=.*at least one token'),
        ({'temperature': float('inf')}, 'temperature=inf'),
    ],
)
def test_settings_out_of_range_are_named(values, message):
    with pytest.raises(InputError, match=message):
        sampling.Sampling(**values)


def test_a_banned_token_that_does_not_exist_is_named():
    with pytest.raises(InputError, match='token 12 is not in the vocabulary of 12 tokens'):
        sampling.Sampling(bad_words_ids=((3, 12),)).chain(12, end_of_text=0)


def test_words_are_banned_with_and_without_a_space_before_them():
    tokenizer = train_bpe(['the cat sat. a cat sat' * 9], 270)
    ids = sampling.word_ids(tokenizer, ['cat', 'cat'])
    assert [tokenizer.decode(word) for word in ids] == ['cat', ' cat']
