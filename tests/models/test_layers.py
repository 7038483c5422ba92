"""Dense, LayerNorm and Dropout against NumPy or a closed form; where in the model each dropout rate acts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_reference import float64, layer_norm

from gpt_jax.models.layers import Dense, Dropout, LayerNorm

RATES = ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout')


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize(
    ('shape', 'contract', 'x_shape', 'equation'),
    [
        ((6, 5), 1, (2, 3, 6), 'btd,df->btf'),
        ((6, 3, 2, 5), 1, (2, 3, 6), 'btd,dcnk->btcnk'),
        ((4, 5, 6), 2, (2, 3, 4, 5), 'btnk,nkd->btd'),
    ],
)
@pytest.mark.parametrize(('dtype', 'atol'), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_dense_and_its_gradients_are_contractions_as_its_shape_names(shape, contract, x_shape, equation, dtype, atol):
    x = normal(0, x_shape)
    params = {'kernel': normal(1, shape), 'bias': normal(2, shape[contract:])}
    y, pullback = jax.vjp(lambda p, x: Dense(shape, contract, dtype=dtype).apply({'params': p}, x), params, x)
    dy = normal(3, y.shape)
    gradients, dx = quick.jit(pullback)(dy.astype(dtype))

    subscripts, out = equation.split('->')
    of_x, of_kernel = subscripts.split(',')
    close = functools.partial(np.testing.assert_allclose, rtol=10 * atol, atol=atol)
    close(np.float32(y), np.einsum(equation, x, params['kernel']) + np.asarray(params['bias']))
    close(gradients['kernel'], np.einsum(f'{of_x},{out}->{of_kernel}', x, dy))
    close(gradients['bias'], np.asarray(dy).sum(axis=(0, 1)))
    close(dx, np.einsum(f'{out},{of_kernel}->{of_x}', dy, params['kernel']))


def test_dense_starts_with_the_given_deviation_and_no_bias():
    params = Dense((200, 3, 100), std=0.05).init(jax.random.key(0), jnp.zeros((1, 200)))['params']
    assert params['kernel'].shape == (200, 3, 100)
    assert abs(np.std(params['kernel']) / 0.05 - 1) < 0.02
    assert abs(np.mean(params['kernel'])) < 0.001
    np.testing.assert_array_equal(params['bias'], np.zeros((3, 100)))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_dense_and_layer_norm_compute_in_the_given_dtype_and_keep_float32_parameters(dtype):
    for module in (Dense((8, 8), dtype=dtype), LayerNorm(1e-5, dtype)):
        y, variables = module.init_with_output(jax.random.key(0), normal(1, (2, 8)))
        assert y.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


@functools.partial(quick.jit, static_argnums=0)
def apply_layer_norm(epsilon, params, x):
    return LayerNorm(epsilon).apply({'params': params}, x)


def test_layer_norm_gradients_equal_finite_differences_in_numpy():
    epsilon, step = 0.1, 1e-6
    arrays = {'x': normal(0, (2, 3, 5)), 'scale': normal(1, (5,)), 'bias': normal(2, (5,))}
    weights = np.asarray(normal(3, (2, 3, 5)))

    def weighted(a):
        y = LayerNorm(epsilon).apply({'params': {key: a[key] for key in ('scale', 'bias')}}, a['x'])
        return jnp.sum(weights * y)

    gradients = quick.jit(jax.grad(weighted))(arrays)
    exact = float64(arrays)
    for name, array in exact.items():
        for index in np.ndindex(array.shape):
            moved = [array.copy(), array.copy()]
            moved[0][index] += step
            moved[1][index] -= step
            high, low = (np.sum(weights * layer_norm(**(exact | {name: m}), epsilon=epsilon)) for m in moved)
            np.testing.assert_allclose(gradients[name][index], (high - low) / (2 * step), rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    width=st.sampled_from([2, 3, 16, 33]),
    mean=st.floats(-100, 100),
    spread=st.floats(1e-3, 100),
    epsilon=st.sampled_from([1e-5, 1.0]),
)
def test_layer_norm_equals_numpy(width, mean, spread, epsilon):
    # In float64 from the float32 input; what is left is float32's rounding of values as large as the mean.
    rng = np.random.default_rng(0)
    x = (mean + spread * rng.standard_normal((3, width))).astype(np.float32)
    params = {'scale': rng.standard_normal(width, np.float32), 'bias': rng.standard_normal(width, np.float32)}
    y = apply_layer_norm(epsilon, params, x)
    expected = layer_norm(x.astype(np.float64), **params, epsilon=epsilon)
    rounding = 1e-6 * abs(mean) / np.sqrt(np.var(x.astype(np.float64), axis=-1).min() + epsilon)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-5 + 10 * rounding)


def test_a_fresh_layer_norm_scales_by_one_and_adds_nothing():
    params = LayerNorm(1e-5).init(jax.random.key(0), jnp.zeros((1, 7)))['params']
    np.testing.assert_array_equal(params['scale'], np.ones(7))
    np.testing.assert_array_equal(params['bias'], np.zeros(7))


def test_layer_norm_statistics_are_float32_for_bf16_values_far_from_zero():
    # bf16 sums of 512 values near 64 are off by whole units, and their squares by more than the variance.
    x = (64 + normal(0, (4, 512))).astype(jnp.bfloat16)
    layer = LayerNorm(1e-5, jnp.bfloat16)
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    expected = layer_norm(np.asarray(x, np.float64), 1.0, 0.0)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.01, atol=0.01)


def test_dropout_is_the_identity_without_an_rng():
    x = normal(0, (5, 7))
    np.testing.assert_array_equal(Dropout(0.9).apply({}, x, jnp.arange(len(x))), x)


def test_dropout_zeroes_at_its_rate_and_scales_what_is_left():
    x = 1 + jnp.abs(normal(0, (200, 200)))
    y = np.asarray(Dropout(0.2).apply({}, x, jnp.arange(len(x)), rngs={'dropout': jax.random.key(0)}))
    # 40 000 draws: the standard deviation of the share is 0.002.
    assert abs(np.mean(y == 0) - 0.2) < 0.01
    np.testing.assert_allclose(y[y != 0], np.asarray(x)[y != 0] / 0.8, rtol=1e-6)


def dropped(x, rows, seed=0):
    return Dropout(0.5).apply({}, x, rows, rngs={'dropout': jax.random.key(seed)})


def test_dropout_follows_its_rng():
    x, rows = jnp.ones((50, 50)), jnp.arange(50)
    first, again, other = (dropped(x, rows, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) != np.asarray(other)) > 0.4


def test_a_row_of_the_global_batch_keeps_its_mask_wherever_it_stands():
    x = jnp.ones((6, 3, 40))
    masks = np.asarray(dropped(x, jnp.arange(6)))
    np.testing.assert_array_equal(dropped(x[:3], jnp.array([4, 0, 5])), masks[[4, 0, 5]])
    assert len(np.unique(masks.reshape(6, -1), axis=0)) == 6


def test_dropout_at_rate_zero_draws_nothing():
    traced = jax.make_jaxpr(lambda key, x: Dropout(0.0).apply({}, x, jnp.arange(len(x)), rngs={'dropout': key}))
    assert 'random_bits' not in str(traced(jax.random.key(0), jnp.ones(4)))


# In the whole model.


def test_dropout_acts_only_with_an_rng_and_follows_it(config, params, tokens, logits, forward):
    apply = forward(dataclasses.replace(config, **dict.fromkeys(RATES, 0.1)))
    np.testing.assert_allclose(apply(params, tokens), logits, atol=1e-5)
    first, again, other = (apply(params, tokens, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != logits).mean() > 0.99
    assert (first != other).mean() > 0.99


def silenced(params, *branches):
    """`params` in which the named parts put out zeros ('attention out' and 'mlp down': all but their biases)."""
    blocks = params['blocks']
    attention, down = blocks['attention'], blocks['mlp']['down']
    if 'attention' in branches or 'attention out' in branches:
        out = attention['out'] | {'kernel': jnp.zeros_like(attention['out']['kernel'])}
        if 'attention' in branches:
            out |= {'bias': jnp.zeros_like(out['bias'])}
        blocks = blocks | {'attention': attention | {'out': out}}
    if 'mlp' in branches or 'mlp down' in branches:
        changed = {'kernel': jnp.zeros_like(down['kernel'])}
        if 'mlp' in branches:
            changed |= {'bias': jnp.zeros_like(down['bias'])}
        blocks = blocks | {'mlp': blocks['mlp'] | {'down': down | changed}}
    if 'tables' in branches:
        params = params | {'wte': jnp.zeros_like(params['wte']), 'wpe': jnp.zeros_like(params['wpe'])}
    return params | {'blocks': blocks}


@pytest.mark.parametrize(
    ('rate', 'without_effect'),
    [
        ('embedding_dropout', {'tables'}),
        # On the probabilities: it shows through the output's kernel only, never in its bias.
        ('attention_dropout', {'attention', 'attention out'}),
        ('resid_dropout', {'attention'}),
        ('mlp_dropout', {'mlp'}),
    ],
)
def test_each_dropout_rate_acts_on_its_own_branch_alone(untied, untied_params, tokens, rate, without_effect, forward):
    apply = forward(dataclasses.replace(untied, **{rate: 0.5}))
    for branch in ('tables', 'attention', 'attention out', 'mlp', 'mlp down'):
        params = silenced(untied_params, branch)
        difference = np.abs(apply(params, tokens, jax.random.key(0)) - apply(params, tokens)).max()
        assert (difference < 1e-5) == (branch in without_effect), (branch, difference)


def test_embedding_dropout_zeroes_at_its_rate(untied, untied_params, tokens, forward):
    # Embeddings of ones through silent blocks: the final LayerNorm puts dropped elements below zero, kept ones above,
    # and an identity for a head lays them open.
    config = dataclasses.replace(untied, embedding_dropout=0.2)
    params = silenced(untied_params, 'attention', 'mlp')
    params |= {'wte': jnp.ones((384, 32)), 'wpe': jnp.zeros((24, 32)), 'lm_head': jnp.eye(384, 32)}
    params |= {'ln_f': {'scale': jnp.ones(32), 'bias': jnp.zeros(32)}}
    values = np.concatenate([forward(config)(params, tokens, jax.random.key(seed))[..., :32] for seed in range(8)])
    # 10 240 draws: the standard deviation of the share is 0.004.
    assert abs((values < 0).mean() - 0.2) < 0.016


def test_layers_drop_different_elements(config, params, tokens, forward):
    # Layers of zero output but for a bias of 1: each adds its own mask to the residual stream.
    config = dataclasses.replace(config, mlp_dropout=0.5)
    blocks = jax.tree.map(jnp.zeros_like, params['blocks'])
    blocks['mlp']['down']['bias'] += 1.0
    zero = {'wte': jnp.zeros((384, 32)), 'wpe': jnp.zeros((24, 32)), 'lm_head': jnp.eye(384, 32)}
    plain = {'scale': jnp.ones(32), 'bias': jnp.zeros(32)}
    untied = dataclasses.replace(config, tie_embeddings=False)
    logits = forward(untied)(zero | {'blocks': blocks, 'ln_f': plain}, tokens, jax.random.key(0))
    # One shared mask would leave two values a token; two masks leave 0, 2 and 4 before the LayerNorm.
    assert all(len(np.unique(row.round(3))) == 3 for row in np.asarray(logits[0, :, :32]))
