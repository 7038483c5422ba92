"""Products of few rows against NumPy, and a model with transposed kernels against itself with plain ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.models import unstack_layers
from gpt_jax.models.layers import FEW_ROWS, matmul_transposed, transpose_kernels


@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.integers(1, 5), max_size=3),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    of_sums=st.sampled_from([None, jnp.float32]),
)
def test_the_product_is_numpys_whatever_the_number_of_rows(batch, sizes, dtype, of_sums):
    rng = np.random.default_rng(sum(batch))
    x, matrix = (
        jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in ((*batch, sizes[0]), sizes[::-1])
    )
    y = matmul_transposed(x, matrix, of_sums)
    assert y.dtype == (of_sums or dtype)
    tolerance = 1e-5 if y.dtype == jnp.float32 else 0.2
    np.testing.assert_allclose(np.float32(y), np.float32(x) @ np.float32(matrix).T, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('rows', [1, FEW_ROWS, FEW_ROWS + 1])
def test_only_few_rows_are_multiplied_as_a_stack_of_one_matrix(rows):
    jaxpr = jax.make_jaxpr(matmul_transposed)(jnp.ones((rows, 8)), jnp.ones((5, 8)))
    (product,) = (equation for equation in jaxpr.eqns if equation.primitive.name == 'dot_general')
    assert (product.invars[1].aval.ndim == 3 or product.invars[0].aval.ndim == 3) == (rows <= FEW_ROWS)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_a_model_takes_transposed_kernels(config, params, tokens, forward, qkv_bias):
    config = dataclasses.replace(config, qkv_bias=qkv_bias)
    params = unstack_layers(params)
    if not qkv_bias:
        for block in params['blocks']:
            del block['attention']['qkv']['bias']
    transposed = params | {'blocks': transpose_kernels(params['blocks'])}
    out = transposed['blocks'][0]['attention']['out']
    assert {name: leaf.shape for name, leaf in out.items()} == {'kernel_transposed': (32, 4, 8), 'bias': (32,)}
    np.testing.assert_allclose(forward(config)(transposed, tokens), forward(config)(params, tokens), atol=1e-5)
