"""Attention over time that devices share, against the whole matrix in NumPy and float64; and what each one computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jaxprs import equations, largest_array, multiplications
from numpy_reference import causal_attention, causal_attention_gradients, float64

from gpt_jax.models.ring import can_split_time, ring_attention, ring_banded_attention
from gpt_jax.parallel import MeshConfig, activate, make_mesh


def output_and_gradients(context, band, scale, q, k, v, dy, documents=None):
    mesh = make_mesh(MeshConfig(data=1, context=context), jax.devices()[:context])
    attend = functools.partial(ring_banded_attention, band=band) if band else ring_attention
    with activate(mesh):
        y, gradients = jax.vjp(lambda q, k, v: attend(q, k, v, documents, scale), q, k, v)
        return y, *gradients(dy)


def arrays(time, batch=2, heads=2, head_dim=4, dtype=np.float32):
    rng = np.random.default_rng(time)
    return [jnp.asarray(rng.standard_normal((batch, heads, time, head_dim)), dtype) for _ in range(4)]


def documents_of(time, batch=2):
    return np.cumsum(np.random.default_rng(0).random((batch, time)) < 0.1, axis=1).astype(np.int32)


def assert_equals_numpy(context, time, band=None, documents=None, dtype=np.float32, atol=2e-5):
    scale, given = 0.7, arrays(time, dtype=dtype)
    found = quick.jit(functools.partial(output_and_gradients, context, band, scale))(*given, documents)
    *qkv, dy = float64(given)
    expected = causal_attention(*qkv, band, scale, documents)
    expected_gradients = causal_attention_gradients(*qkv, dy, band, scale, documents)
    for name, array, wanted in zip(('y', 'dq', 'dk', 'dv'), found, (expected, *expected_gradients), strict=True):
        assert array.dtype == dtype
        np.testing.assert_allclose(np.asarray(array, np.float64), wanted, rtol=0, atol=atol, err_msg=name)


def test_a_dense_layer_equals_numpy_with_documents_across_devices():
    assert_equals_numpy(4, 24, documents=documents_of(24))


def test_a_band_that_reaches_over_three_devices_equals_numpy():
    assert_equals_numpy(8, 32, band=10, documents=documents_of(32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('context', 'time', 'band'),
    [(2, 8, None), (3, 18, None), (8, 16, None), (2, 560, None), (2, 16, 3), (4, 32, 1), (4, 32, 9), (8, 16, 15)],
)
@pytest.mark.parametrize('documents', [False, True])
def test_any_ring_equals_numpy(context, time, band, documents):
    assert_equals_numpy(context, time, band, documents_of(time) if documents else None)


@pytest.mark.slow
@pytest.mark.parametrize('band', [None, 10])
def test_numbers_of_16_bits_stay_close_and_keep_their_dtype(band):
    assert_equals_numpy(4, 48, band, dtype=jnp.bfloat16, atol=0.15)


def test_huge_scores_of_one_part_neither_overflow_nor_blur():
    # The peak of each query is in another part of the keys: without it, inf / inf.
    q, k, v, dy = arrays(16)
    found = quick.jit(functools.partial(output_and_gradients, 2, None, 1.0))(100 * q, 100 * k, v, 0 * dy)
    expected = causal_attention(*float64((100 * q, 100 * k, v)), scale=1.0)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-3)


def traced(context, time, band=None):
    shape = jax.ShapeDtypeStruct((1, 1, time, 4), jnp.float32)
    return jax.make_jaxpr(functools.partial(output_and_gradients, context, band, 1.0))(*[shape] * 4)


def test_every_device_computes_its_share_of_what_is_visible():
    # A device's program is the same for all. Of 16 halves of 256 tokens it has two: 2 pairs of halves at each of the 7
    # stops, one within its own, and the two causal ones, whose blocks of 128 queries see 128 and 256 keys. There are
    # seven products in both directions; without the half that is masked they would be 16 x 256 x 256.
    pairs = 7 * 2 + 1 + 2 * 0.75
    assert multiplications(traced(8, 4096)) == 7 * pairs * 256 * 256 * 4


def test_no_device_holds_more_scores_than_of_a_block_of_queries_and_half_its_keys():
    assert largest_array(traced(8, 4096)) == 2 * 128 * 256  # two pairs of halves at once
    assert largest_array(traced(8, 16384)) == 2 * 128 * 1024


def test_the_work_of_a_banded_layer_and_what_is_sent_are_those_of_the_band():
    for time in (4096, 16384):
        program = traced(8, time, band=100)
        # Blocks of 100 queries look at theirs and the one before, those of the last are filled up.
        blocks = -(-time // 8 // 100)
        assert multiplications(program) <= 7 * (blocks + 1) * 100 * 200 * 4
        sent = [e.outvars[0].aval.shape for e in equations(program) if e.primitive.name == 'ppermute']
        # Keys and values in both directions, and their gradients.
        assert sent == [(2, 1, 1, 99, 4)] * 3


def test_time_is_shared_where_two_pieces_for_each_device_come_out_even():
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2), jax.devices())
    with activate(mesh):
        assert can_split_time((2, 2, 8, 4))
        assert not can_split_time((2, 2, 6, 4))  # of 3 tokens there are no halves
        assert not can_split_time((3, 2, 8, 4))
        assert not can_split_time((2, 3, 8, 4))
    with activate(make_mesh(MeshConfig(data=8), jax.devices())):
        assert not can_split_time((8, 2, 8, 4))
    assert not can_split_time((2, 2, 8, 4))
