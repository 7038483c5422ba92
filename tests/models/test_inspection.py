"""What is seen inside a model, against NumPy and against the model itself."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy_reference import block, causal_weights, float64, gpt_logits, layer_norm

from gpt_jax.models import GPT, attention_maps, lens_logits, residual_streams, unstack_layers

LOOSE = {'rtol': 1e-4, 'atol': 1e-4}


@pytest.fixture(scope='module')
def banded(config):
    return dataclasses.replace(config, n_layer=3, attention_pattern='alternating', band_size=5)


@pytest.fixture(scope='module')
def banded_params(params):
    """Three layers of two: the first one comes again."""
    return params | {'blocks': jax.tree.map(lambda array: array[np.array([0, 1, 0])], params['blocks'])}


def reference(params, tokens, config):
    """Residual streams and attention probabilities of every layer, in NumPy."""
    p = float64(params)
    streams, maps = [p['wte'][np.asarray(tokens)] + p['wpe'][: tokens.shape[1]]], []
    for layer in range(config.n_layer):
        layer_params = jax.tree.map(lambda array, layer=layer: array[layer], p['blocks'])
        qkv = layer_params['attention']['qkv']
        x_BTD = layer_norm(streams[-1], **layer_params['ln_1'])
        q, k = (np.einsum('btd,dnk->bntk', x_BTD, qkv['kernel'][:, i]) + qkv['bias'][i][:, None] for i in (0, 1))
        band = config.band(layer)
        maps.append(causal_weights(q, k, band))
        streams.append(block(streams[-1], layer_params, band))
    return streams, maps


@pytest.mark.parametrize('pattern', ['dense', 'alternating'])
def test_streams_and_attention_equal_numpy_in_every_layer(config, params, banded, banded_params, tokens, pattern):
    config, params = (config, params) if pattern == 'dense' else (banded, banded_params)
    streams_LBTD = residual_streams(GPT(config), params, tokens)
    expected, maps = reference(params, tokens, config)
    assert streams_LBTD.shape == (config.n_layer + 1, 2, 20, 32)
    np.testing.assert_allclose(streams_LBTD, expected, **LOOSE)
    for layer in range(config.n_layer):
        weights_BNTS = attention_maps(GPT(config), params, streams_LBTD, layer)
        assert weights_BNTS.shape == (2, 4, 20, 20)
        np.testing.assert_allclose(weights_BNTS, maps[layer], **LOOSE)
        np.testing.assert_allclose(weights_BNTS.sum(axis=-1), 1, atol=1e-5)


def test_the_lens_on_the_last_stream_is_the_model(config, params, untied, untied_params, tokens, forward):
    for each, tree in ((config, params), (untied, untied_params)):
        streams_LBTD = residual_streams(GPT(each), tree, tokens)
        np.testing.assert_allclose(lens_logits(GPT(each), tree, streams_LBTD[-1]), forward(each)(tree, tokens), **LOOSE)


def test_the_lens_on_an_earlier_stream_is_a_model_that_ends_there(config, params, tokens):
    logits_LBTV = lens_logits(GPT(config), params, residual_streams(GPT(config), params, tokens))
    assert logits_LBTV.shape == (3, 2, 20, 300)
    shorter = params | {'blocks': jax.tree.map(lambda array: array[:1], params['blocks'])}
    np.testing.assert_allclose(logits_LBTV[1], gpt_logits(shorter, tokens, 300), **LOOSE)


def test_stacked_and_unstacked_parameters_are_seen_alike(config, params, tokens):
    model, unstacked = GPT(config), unstack_layers(params)
    streams_LBTD = residual_streams(model, unstacked, tokens)
    np.testing.assert_array_equal(streams_LBTD, residual_streams(model, params, tokens))
    np.testing.assert_array_equal(
        attention_maps(model, unstacked, streams_LBTD, 1), attention_maps(model, params, streams_LBTD, 1)
    )


@pytest.mark.slow
@pytest.mark.parametrize('pattern', ['dense', 'alternating'])
def test_scores_divided_by_the_layers_number_are_those_of_divided_queries(
    banded, banded_params, tokens, pattern, forward
):
    usual = dataclasses.replace(banded, attention_pattern=pattern)
    by_layer = dataclasses.replace(usual, scale_attn_by_inverse_layer_idx=True)
    number = np.arange(1, 4, dtype=np.float32)
    qkv = banded_params['blocks']['attention']['qkv']
    divided = {
        'kernel': qkv['kernel'].at[:, :, 0].divide(number[:, None, None, None]),
        'bias': qkv['bias'].at[:, 0].divide(number[:, None, None]),
    }
    blocks = banded_params['blocks'] | {'attention': banded_params['blocks']['attention'] | {'qkv': divided}}
    expected = forward(usual)(banded_params | {'blocks': blocks}, tokens)
    np.testing.assert_allclose(forward(by_layer)(banded_params, tokens), expected, **LOOSE)
    streams_LBTD = residual_streams(GPT(by_layer), banded_params, tokens)
    np.testing.assert_allclose(lens_logits(GPT(by_layer), banded_params, streams_LBTD[-1]), expected, **LOOSE)
    for layer in range(3):
        maps = attention_maps(GPT(by_layer), banded_params, streams_LBTD, layer)
        np.testing.assert_allclose(
            maps, attention_maps(GPT(usual), banded_params | {'blocks': blocks}, streams_LBTD, layer), **LOOSE
        )
