import jax
import jax.numpy as jnp
import pytest

from gpt_jax.models import GPT, PRESETS, GPTConfig
from gpt_jax.models.config import causal_flops_per_token, parameters_by_part, training_flops_per_token

VARIANTS = {
    'plain': {},
    'own head': {'tie_embeddings': False},
    'no query, key and value bias': {'qkv_bias': False},
    'wide MLP': {'mlp_expansion': 6},
}


def pairs(config, dense):
    """Query-key pairs of a sequence that all layers are counted with, one by one."""
    total = 0
    for layer in range(config.n_layer):
        band = config.band(layer)
        for position in range(1, config.block_size + 1):
            total += dense(position) if band is None else min(position, band)
    return total


@pytest.mark.parametrize('fields', VARIANTS.values(), ids=VARIANTS)
def test_the_parts_add_up_to_the_arrays_of_the_model(fields):
    config = GPTConfig(128, 16, n_layer=3, n_head=2, d_model=8, **fields)
    params = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), int))['params']
    assert sum(parameters_by_part(config).values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('name', PRESETS)
def test_the_parts_of_a_published_size_add_up_to_its_count(name):
    assert sum(parameters_by_part(PRESETS[name]).values()) == PRESETS[name].num_parameters


def test_flops_are_six_a_weight_and_twelve_a_pair_of_tokens():
    # 12 layers of 12 d^2 weights and 13 d biases and gains, one more gain and bias, and the head.
    d, vocab, context, layers = 768, 50257, 1024, 12
    weights = layers * (12 * d * d + 13 * d) + 2 * d + vocab * d
    config = GPTConfig(vocab, context, layers, n_head=12, d_model=d)
    assert training_flops_per_token(config) == 6 * weights + 12 * layers * d * context
    assert training_flops_per_token(config) == pytest.approx(8.6e8, rel=0.01)  # as nanoGPT's


@pytest.mark.parametrize(('band', 'layers'), [(1, 4), (7, 3), (31, 2)])
def test_a_banded_layer_is_counted_with_the_keys_its_queries_see(band, layers):
    config = GPTConfig(64, 32, layers, n_head=2, d_model=8, attention_pattern='alternating', band_size=band)
    weights = config.num_parameters - 32 * 8
    counted = 12 * 8 * pairs(config, dense=lambda _: 32) / 32
    assert training_flops_per_token(config) == pytest.approx(6 * weights + counted)
    seen = 12 * 8 * pairs(config, dense=lambda position: position) / 32
    assert causal_flops_per_token(config) == pytest.approx(6 * weights + seen)


def test_a_band_as_long_as_the_context_is_dense():
    sizes = (64, 32, 2, 2, 8)
    banded = GPTConfig(*sizes, attention_pattern='alternating', band_size=32)
    for count in (training_flops_per_token, causal_flops_per_token):
        assert count(banded) == count(GPTConfig(*sizes))
