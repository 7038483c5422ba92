"""Attention in blocks against the whole matrix in NumPy and float64, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxprs import largest_array, multiplications
from numpy_reference import causal_attention, causal_attention_gradients, float64

from gpt_jax.models.attention import banded_attention, blockwise_attention


def qkv_and_upstream(seed, batch, heads, time, head_dim, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((batch, heads, time, head_dim)), dtype) for _ in range(4))


def attention(q, k, v, band=None, scale=None, documents=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if band is None:
        return blockwise_attention(q, k, v, documents, scale)
    return banded_attention(q, k, v, documents, scale, band)


def output_and_gradients(q, k, v, dy, band=None, scale=None, documents=None):
    y, gradients = jax.vjp(functools.partial(attention, band=band, scale=scale, documents=documents), q, k, v)
    return y, gradients(dy)


def assert_equals_numpy(arrays, atol, band=None, scale=None, documents=None):
    settings = {'band': band, 'scale': scale, 'documents': documents}
    y, gradients = quick.jit(functools.partial(output_and_gradients, **settings))(*arrays)
    q, k, v, dy = float64(arrays)
    expected = causal_attention(q, k, v, band, scale, documents)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=atol)
    expected_gradients = causal_attention_gradients(q, k, v, dy, band, scale, documents)
    for name, gradient, expected in zip('qkv', gradients, expected_gradients, strict=True):
        message = f'gradient of {name}'
        np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=0, atol=atol, err_msg=message)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 3), time=st.integers(1, 420), head_dim=st.sampled_from([1, 2, 7, 16])
)
@example(batch=1, heads=1, time=1, head_dim=4)
@example(batch=1, heads=2, time=127, head_dim=4)
@example(batch=1, heads=2, time=128, head_dim=4)
@example(batch=1, heads=2, time=129, head_dim=4)
@example(batch=2, heads=1, time=256, head_dim=4)
@example(batch=2, heads=2, time=300, head_dim=8)
def test_output_and_gradients_equal_numpy_at_any_length(batch, heads, time, head_dim):
    assert_equals_numpy(qkv_and_upstream(time, batch, heads, time, head_dim), atol=2e-5)


@pytest.mark.slow
def test_sequences_longer_than_sixteen_blocks_equal_numpy():
    assert_equals_numpy(qkv_and_upstream(0, 1, 1, 2100, 2), atol=5e-5)


@pytest.mark.parametrize(('dtype', 'atol'), [(jnp.bfloat16, 0.1), (jnp.float16, 0.02)])
def test_half_precision_stays_close_and_keeps_its_dtype(dtype, atol):
    arrays = qkv_and_upstream(0, 1, 2, 150, 8, dtype)
    y, gradients = quick.jit(output_and_gradients)(*arrays)
    assert {array.dtype for array in (y, *gradients)} == {jnp.dtype(dtype)}
    assert_equals_numpy(arrays, atol)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(batch=st.integers(1, 2), heads=st.integers(1, 2), time=st.integers(1, 420), band=st.integers(1, 300))
@example(batch=1, heads=1, time=1, band=1)
@example(batch=2, heads=1, time=40, band=1)
@example(batch=1, heads=2, time=50, band=8)
@example(batch=1, heads=2, time=50, band=9)
@example(batch=1, heads=1, time=300, band=128)
@example(batch=1, heads=1, time=300, band=129)
@example(batch=1, heads=1, time=256, band=256)
@example(batch=1, heads=1, time=30, band=300)
def test_banded_output_and_gradients_equal_numpy_at_any_length_and_band(batch, heads, time, band):
    assert_equals_numpy(qkv_and_upstream(time, batch, heads, time, 4), 2e-5, band)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(time=st.integers(1, 300), band=st.none() | st.integers(1, 200), seed=st.integers(0, 99))
@example(time=257, band=None, seed=0)
@example(time=257, band=130, seed=0)
@example(time=40, band=5, seed=1)
def test_documents_are_kept_apart_as_in_numpy(time, band, seed):
    arrays = qkv_and_upstream(time, 2, 2, time, 4)
    documents = np.cumsum(np.random.default_rng(seed).random((2, time)) < 0.02, axis=1)
    assert_equals_numpy(arrays, 3e-5, band, documents=documents)


@pytest.mark.parametrize('band', [None, 20])
def test_scores_are_scaled_as_told(band):
    assert_equals_numpy(qkv_and_upstream(0, 1, 2, 70, 4), 5e-5, band, scale=1.0)


@pytest.mark.parametrize('band', [1, 2, 130])
def test_a_query_of_a_band_sees_itself_and_what_stands_right_before_it(band):
    time = 133
    q, k, v, _ = qkv_and_upstream(0, 1, 1, time, 2)
    summed = quick.jit(jax.jacrev(lambda v: attention(q, k, v, band)[0, 0].sum(axis=-1)))
    sees = np.abs(summed(v)[:, 0, 0]).max(axis=-1) > 0
    offset = np.arange(time)[:, None] - np.arange(time)
    np.testing.assert_array_equal(sees, (offset >= 0) & (offset < band))


def test_the_cost_of_a_band_grows_with_time_times_band():
    def cost(time, band):
        traced = jax.make_jaxpr(functools.partial(output_and_gradients, band=band))(
            *(jax.ShapeDtypeStruct((1, 1, time, 4), jnp.float32) for _ in range(4))
        )
        return multiplications(traced), largest_array(traced)

    # Of the seven products of time x band, each block of 128 queries looks at 384 keys where 256 would do.
    for time in (2048, 8192):
        products, largest = cost(time, 256)
        assert products == 7 * time * 384 * 4
        # However long the sequence, no more than a bounded number of scores is alive at once.
        assert largest == 16 * 128 * 384


def test_huge_scores_neither_overflow_nor_blur():
    # Scores of +-thousands: a softmax without its peak taken off gives inf / inf.
    q, k, v, dy = qkv_and_upstream(0, 1, 1, 140, 4)
    assert_equals_numpy((100 * q, 100 * k, v, jnp.zeros_like(dy)), atol=1e-3)


def test_no_output_depends_on_a_later_key_or_value_and_each_on_all_earlier_ones():
    time = 133  # across the edge between two blocks
    q, k, v, _ = qkv_and_upstream(0, 1, 1, time, 2)

    def summed(k, v):
        return attention(q, k, v)[0, 0].sum(axis=-1)

    later = np.triu(np.ones((time, time), bool), 1)
    for name, jacobian in zip('kv', quick.jit(jax.jacrev(summed, (0, 1)))(k, v), strict=True):
        strength = np.abs(jacobian[:, 0, 0]).max(axis=-1)
        assert (strength[later] == 0).all(), name
        # The first query sees one key whatever its score: nothing flows to that.
        assert (strength[~later][1:] > 0).all(), name


def test_the_whole_score_matrix_is_held_in_neither_direction():
    arrays = qkv_and_upstream(0, 1, 1, 1024, 4)
    assert largest_array(jax.make_jaxpr(output_and_gradients)(*arrays)) <= 1024 * 1024 / 4


def test_the_masked_half_is_mostly_not_computed():
    batch, heads, time, head_dim = 1, 1, 1024, 4
    traced = jax.make_jaxpr(output_and_gradients)(*qkv_and_upstream(0, batch, heads, time, head_dim))
    # Two products forward and five backward (the scores are made again), each time * time * head_dim in full.
    assert multiplications(traced) < 0.7 * 7 * time * time * head_dim
