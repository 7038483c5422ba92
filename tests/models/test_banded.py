"""GPT-3's alternating pattern: against NumPy, in both forms of the layers, in the cache, and split over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from numpy_reference import float64, gpt_logits, self_attention

from gpt_jax.models import GPT, GPTConfig
from gpt_jax.models.gpt import CausalSelfAttention, TokenInfo
from gpt_jax.parallel import MeshConfig, activate, batch_sharding, make_mesh, tree_shardings

BAND = 5
CLOSE = {'rtol': 1e-4, 'atol': 1e-4}


def alternating(config, n_layer=2, **changes):
    return dataclasses.replace(config, attention_pattern='alternating', band_size=BAND, n_layer=n_layer, **changes)


@pytest.fixture(scope='module')
def deep(params):
    """A function: number of layers -> parameters, those of the tiny model's two layers in turn."""

    @functools.cache
    def make(n_layer):
        # Each layer is another multiple of the first two: no two are equal.
        repeated = jax.tree.map(
            lambda array: jnp.stack([array[i % 2] * (1 + 0.1 * i) for i in range(n_layer)]), params['blocks']
        )
        return params | {'blocks': repeated}

    return make


@pytest.fixture(scope='module')
def step(config):
    """One call with a cache; compiled once a number of tokens and layers."""

    @functools.partial(quick.jit, static_argnames='config')
    def step(config, params, tokens, cache, positions):
        return GPT(config).apply({'params': params}, tokens, cache=cache, positions=positions)

    return step


def test_the_layers_are_dense_and_banded_in_turn_and_the_first_is_dense():
    config = GPTConfig(100, 32, n_layer=5, n_head=1, d_model=4, attention_pattern='alternating', band_size=7)
    assert [config.band(layer) for layer in range(5)] == [None, 7, None, 7, None]
    assert {dataclasses.replace(config, attention_pattern='dense').band(layer) for layer in range(5)} == {None}


@pytest.mark.parametrize('n_layer', [1, 2, 3, 4])
@pytest.mark.parametrize('scan_layers', [False, True])
def test_a_whole_model_equals_numpy_scanned_in_pairs_or_unrolled(config, deep, tokens, forward, n_layer, scan_layers):
    params = deep(n_layer)
    logits = forward(alternating(config, n_layer, scan_layers=scan_layers))(params, tokens)
    np.testing.assert_allclose(logits, gpt_logits(params, tokens, 300, band=BAND), **CLOSE)
    if n_layer > 1:
        assert np.abs(logits - gpt_logits(params, tokens, 300)).max() > 0.01


def test_scanned_pairs_have_the_gradients_of_unrolled_layers(config, deep, tokens, targets):
    params = deep(3)

    def gradients(scan_layers):
        model = GPT(alternating(config, 3, scan_layers=scan_layers))
        loss = lambda p: model.apply({'params': p}, tokens, targets, method='token_losses').mean()  # noqa: E731
        return quick.jit(jax.grad(loss))(params)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradients(True), gradients(False))


def test_scanned_pairs_compile_one_pair(config, deep, tokens):
    model = GPT(alternating(config, 4, scan_layers=True))
    text = str(jax.make_jaxpr(lambda p: model.apply({'params': p}, tokens))(deep(4)))
    assert text.count('length=2') == 1
    assert text.count('f32[32,96]') <= 6  # the kernels of query, key and value of two layers, not of four


@pytest.mark.parametrize('key', [None, jax.random.key(0)])
def test_a_banded_layer_equals_numpy_with_and_without_dropout(config, params, key):
    # 1 - 1e-9 is 1 in float32: with a key the code of dropout runs, and keeps everything.
    config = alternating(config, attention_dropout=1e-9)
    layer = jax.tree.map(lambda array: array[1], params['blocks']['attention'])
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 32), np.float32))
    module = CausalSelfAttention(config, config.band(1))
    info = TokenInfo.of(x_BTD[..., 0], None, None)
    rngs = {} if key is None else {'dropout': key}
    y_BTD, _ = module.apply({'params': layer}, x_BTD, info, 1, rngs=rngs)
    np.testing.assert_allclose(y_BTD, self_attention(float64(x_BTD), float64(layer), BAND), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scale', [None, 1.0])
def test_projections_without_a_bias_and_scores_of_another_scale_equal_numpy(config, params, tokens, forward, scale):
    config = alternating(config, qkv_bias=False, attention_scale=scale)
    fresh = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)['params']
    assert set(fresh['blocks']['attention']['qkv']) == {'kernel'}
    attention = params['blocks']['attention']
    attention = attention | {'qkv': {'kernel': attention['qkv']['kernel']}}
    params = params | {'blocks': params['blocks'] | {'attention': attention}}
    expected = gpt_logits(params, tokens, 300, BAND, scale)
    np.testing.assert_allclose(forward(config)(params, tokens), expected, **CLOSE)


# Cached decoding.


@pytest.mark.slow
@pytest.mark.parametrize('chunks', [[7] + [1] * 13, [3, 9, 1, 1, 4, 1, 1], [20], [1] * 20], ids=str)
def test_cached_decoding_equals_the_full_forward_however_the_tokens_are_fed(config, deep, tokens, step, chunks):
    config, params = alternating(config, 3), deep(3)
    cache, start, parts = GPT(config).init_cache(2, 24), 0, []
    for size in chunks:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        logits, cache = step(config, params, tokens[:, start : start + size], cache, positions)
        parts.append(logits)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), gpt_logits(params, tokens, 300, BAND), **CLOSE)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padded_rows_decode_as_if_alone(config, deep, tokens, step, side):
    config, params = alternating(config, 3), deep(3)
    lengths, prompt = np.array([9, 3]), 9
    order = np.arange(prompt) - (prompt - lengths[:, None] if side == 'left' else 0)
    positions = np.where((order >= 0) & (order < lengths[:, None]), order, -1)
    padded = np.take_along_axis(np.asarray(tokens), np.maximum(positions, 0), axis=1)
    logits, cache = step(config, params, padded, GPT(config).init_cache(2, 24), positions)
    last = np.argmax(positions, axis=1)
    parts = [np.asarray(logits)[np.arange(2), last][:, None]]
    for offset in range(6):
        positions = (lengths + offset)[:, None]
        logits, cache = step(
            config, params, np.take_along_axis(np.asarray(tokens), positions, axis=1), cache, positions
        )
        parts.append(logits)
    joined = np.concatenate(parts, axis=1)
    for row, length in enumerate(lengths):
        alone = gpt_logits(params, tokens[row : row + 1, : length + 6], 300, BAND)[0, length - 1 :]
        np.testing.assert_allclose(joined[row], alone, **CLOSE)


def test_a_banded_layers_cache_holds_no_more_than_its_band(config):
    cache = GPT(alternating(config, 3)).init_cache(2, 24)
    assert [array.shape[2] for array in cache['key']] == [24, BAND, 24]
    assert [array.shape[2] for array in cache['value']] == [24, BAND, 24]
    short = GPT(alternating(config, 3)).init_cache(2, 4)
    assert [array.shape[2] for array in short['key']] == [4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(8, 1, 1, 1), (2, 4, 1, 1)])
def test_losses_and_gradients_are_the_same_on_the_data_and_fsdp_axes(config, deep, mesh):
    model, params = GPT(alternating(config, 2)), deep(2)
    tokens = np.random.default_rng(3).integers(0, 300, (8, 24), np.int32)

    def loss(params, tokens):
        return model.apply({'params': params}, tokens, tokens[:, ::-1], method='token_losses').mean()

    expected = quick.jit(jax.value_and_grad(loss))(params, tokens)
    mesh = make_mesh(MeshConfig(*mesh))
    shardings = tree_shardings(mesh, params, params)

    def split_loss(params, tokens):
        with activate(mesh):
            return jax.value_and_grad(loss)(params, tokens)

    split = quick.jit(split_loss, in_shardings=(shardings, batch_sharding(mesh)))(params, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), split, expected)
