"""Filters against NumPy, draws against the distribution that they are drawn from."""

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from gpt_jax.inference import filters, sampling

# Whole tenths, so that ties happen.
LOGITS = hypothesis.extra.numpy.arrays(np.int32, 12, elements=st.integers(-60, 60)).map(
    lambda tenths: (tenths / 10).astype(np.float32)
)
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
    assert kept(filters.keep_top_k(jnp.asarray(logits), top_k), logits) == expected


@few_examples
@hypothesis.given(LOGITS, st.integers(1, 99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, percent):
    top_p, probabilities = percent / 100, softmax(logits)
    order = np.argsort(-logits, kind='stable')
    sums = np.cumsum(probabilities[order])
    hypothesis.assume(np.abs(sums - top_p).min() > 1e-5)  # beyond float32's rounding
    expected = set(order[: 1 + int(np.searchsorted(sums, top_p))])
    assert kept(filters.keep_top_p(jnp.asarray(logits), top_p), logits) == expected


def test_top_p_follows_the_published_example():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert kept(filters.keep_top_p(jnp.asarray(logits), 0.6), logits) == {1, 3}
    assert kept(filters.keep_top_p(jnp.asarray(logits), 0.76), logits) == {1, 2, 3}


@pytest.mark.parametrize('top_p', [1e-9, 0.2])
def test_top_p_always_keeps_the_likeliest(top_p):
    logits = np.array([0.0, 3.0, 1.0], np.float32)
    assert kept(filters.keep_top_p(jnp.asarray(logits), top_p), logits) == {1}


def test_top_p_of_one_keeps_even_what_rounding_would_drop():
    logits = np.array([0.0, 40.0, *[-20.0] * 30], np.float32)
    assert len(kept(filters.keep_top_p(jnp.asarray(logits), 1.0), logits)) == 32


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
