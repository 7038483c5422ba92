"""Self-attention against NumPy, its two dropouts, and decoding with a key-value cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jaxprs import largest_array
from numpy_reference import float64, gpt_logits, self_attention

from gpt_jax.models import GPT, GPTConfig, unstack_layers
from gpt_jax.models.gpt import CausalSelfAttention, TokenInfo


@pytest.fixture(scope='module')
def layer(params):
    return jax.tree.map(lambda array: array[0], params['blocks']['attention'])


@pytest.fixture(scope='module')
def x_BTD():  # noqa: N802
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 32), np.float32))


def attend(config, layer, x_BTD, key=None, index=0):
    rngs = {} if key is None else {'dropout': key}
    info = TokenInfo.of(x_BTD[..., 0])
    return CausalSelfAttention(config, config.band(index)).apply({'params': layer}, x_BTD, info, index, rngs=rngs)[0]


def test_self_attention_equals_numpy(config, layer, x_BTD):
    y_BTD = quick.jit(functools.partial(attend, config))(layer, x_BTD)
    np.testing.assert_allclose(y_BTD, self_attention(float64(x_BTD), float64(layer)), rtol=1e-4, atol=1e-5)


def test_attention_with_dropout_configured_equals_numpy_without_an_rng(config, layer, x_BTD):
    config = dataclasses.replace(config, attention_dropout=0.9, resid_dropout=0.9)
    y_BTD = quick.jit(functools.partial(attend, config))(layer, x_BTD)
    np.testing.assert_allclose(y_BTD, self_attention(float64(x_BTD), float64(layer)), rtol=1e-4, atol=1e-5)


def test_the_path_that_makes_all_probabilities_equals_numpy_where_it_drops_none(config, layer, x_BTD):
    # 1 - 1e-9 is 1 in float32: the code of dropout runs, and keeps everything.
    config = dataclasses.replace(config, attention_dropout=1e-9)
    y_BTD = quick.jit(functools.partial(attend, config))(layer, x_BTD, jax.random.key(0))
    np.testing.assert_allclose(y_BTD, self_attention(float64(x_BTD), float64(layer)), rtol=1e-4, atol=1e-5)


def test_attention_dropout_drops_probabilities_and_keeps_their_mean(config, layer, x_BTD):
    config = dataclasses.replace(config, attention_dropout=0.25)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.asarray(quick.jit(jax.vmap(functools.partial(attend, config, layer, x_BTD[:1, :6])))(keys))
    expected = self_attention(float64(x_BTD[:1, :6]), float64(layer))
    standard_error = draws.std(axis=0) / np.sqrt(len(keys))
    assert (standard_error > 0).all()
    assert (np.abs(draws.mean(axis=0) - expected) < 6 * standard_error).all()
    # The first token sees itself alone: each head's one probability is dropped or kept, 2**4 outcomes in all.
    assert len(np.unique(draws[:, 0, 0].round(5), axis=0)) == 16


def test_resid_dropout_zeroes_the_output_of_attention_at_its_rate(config, layer, x_BTD):
    config = dataclasses.replace(config, resid_dropout=0.25)
    ones = {'kernel': jnp.zeros_like(layer['out']['kernel']), 'bias': jnp.ones(32)}
    y_BTD = np.asarray(attend(config, layer | {'out': ones}, x_BTD, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y_BTD), [0, 1 / 0.75], rtol=1e-6)
    assert abs(np.mean(y_BTD == 0) - 0.25) < 0.05  # 4 standard deviations of 1 280 draws


# Decoding with a cache.


@pytest.fixture(scope='module')
def step(config):
    """One call with a cache; compiled once a number of tokens."""

    @quick.jit
    def step(params, tokens, cache, positions):
        return GPT(config).apply({'params': params}, tokens, cache=cache, positions=positions)

    return step


def decode(step, params, tokens, cache, chunks):
    """Feeds `tokens` in chunks of the given sizes; all logits joined."""
    start, parts = 0, []
    for size in chunks:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (tokens.shape[0], size))
        logits, cache = step(params, tokens[:, start : start + size], cache, positions)
        parts.append(logits)
        start += size
    assert start == tokens.shape[1]
    return np.concatenate(parts, axis=1), cache


@pytest.mark.parametrize('chunks', [[7] + [1] * 13, [7, 7, 1, 1, 1, 1, 1, 1], [20]])
def test_cached_decoding_equals_the_full_forward_however_the_tokens_are_fed(config, params, tokens, step, chunks):
    # 24 slots for 20 tokens: those never written must not be seen.
    cached, cache = decode(step, params, tokens, GPT(config).init_cache(2, 24), chunks)
    np.testing.assert_allclose(cached, gpt_logits(params, tokens, 300), rtol=1e-4, atol=1e-4)
    assert cache['lengths'].tolist() == [20, 20]


@pytest.mark.parametrize('form', ['unstacked', 'scan_layers'])
def test_cached_decoding_takes_unstacked_and_scanned_layers(config, params, tokens, form):
    config = dataclasses.replace(config, scan_layers=form == 'scan_layers')
    params = unstack_layers(params) if form == 'unstacked' else params
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
    apply = quick.jit(lambda p, cache: GPT(config).apply({'params': p}, tokens, cache=cache, positions=positions))
    cached, _ = apply(params, GPT(config).init_cache(2, 24))
    np.testing.assert_allclose(cached, gpt_logits(stacked(params), tokens, 300), rtol=1e-4, atol=1e-4)


def stacked(params):
    if not isinstance(params['blocks'], tuple):
        return params
    return params | {'blocks': jax.tree.map(lambda *layers: np.stack(layers), *params['blocks'])}


def decode_padded(config, params, tokens, lengths, prompt, step, padding):
    """Prompts flush right in `prompt` slots, then one token at a time; a list of each row's own logits."""
    pads = prompt - np.asarray(lengths)
    width = tokens.shape[1]
    padded = np.full((len(lengths), width + pads.max()), padding, np.int32)
    for row, pad in enumerate(pads):
        padded[row, pad : pad + width] = tokens[row]
    cache, parts = GPT(config).init_cache(len(lengths), 24), []
    for start, stop in [(0, prompt)] + [(slot, slot + 1) for slot in range(prompt, prompt + 4)]:
        positions = np.arange(start, stop) - pads[:, None]
        logits, cache = step(params, padded[:, start:stop], cache, positions)
        parts.append(logits)
    joined = np.concatenate(parts, axis=1)
    return [joined[row, pad:] for row, pad in enumerate(pads)]


def test_left_padded_rows_decode_as_if_alone(config, params, tokens, step):
    lengths, prompt = (7, 3), 7
    rows = decode_padded(config, params, tokens, lengths, prompt, step, padding=0)
    for row, length in enumerate(lengths):
        alone = gpt_logits(params, tokens[row : row + 1, : length + 4], 300)[0]
        np.testing.assert_allclose(rows[row], alone, rtol=1e-4, atol=1e-4)
    single, _ = decode(step, params, tokens[1:, :7], GPT(config).init_cache(1, 24), [7])
    np.testing.assert_allclose(rows[1], single[0], atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(config, params, tokens, step):
    zeros, others = (decode_padded(config, params, tokens, (7, 3), 7, step, padding) for padding in (0, 299))
    for row, other in zip(zeros, others, strict=True):
        np.testing.assert_array_equal(row, other)


def test_a_cache_holds_each_layers_keys_and_values_in_the_compute_dtype(config):
    cache = GPT(dataclasses.replace(config, compute_dtype='bf16')).init_cache(3, 16)
    for name in ('key', 'value'):
        assert [(array.shape, array.dtype) for array in cache[name]] == [((3, 4, 16, 8), jnp.bfloat16)] * 2
    assert cache['positions'].shape == (3, 16)
    assert cache['lengths'].tolist() == [0, 0, 0]


def test_a_cache_longer_than_the_model_is_refused_with_both_numbers(config):
    with pytest.raises(ValueError, match=r'25 tokens.*block_size=24'):
        GPT(config).init_cache(2, 25)


def test_a_cache_without_positions_is_refused(config, params, tokens):
    with pytest.raises(ValueError, match='positions'):
        GPT(config).apply({'params': params}, tokens, cache=GPT(config).init_cache(2, 24))


def test_more_tokens_than_the_cache_has_slots_are_refused(config, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
    with pytest.raises((TypeError, ValueError)):
        GPT(config).apply({'params': params}, tokens, cache=GPT(config).init_cache(2, 10), positions=positions)


# Prompts read into an empty cache.


@pytest.mark.parametrize('pattern', ['dense', 'alternating'])
def test_a_prefill_gives_the_logits_after_each_prompt_and_the_cache_of_one_token_at_a_time(
    params, config, tokens, pattern
):
    config = dataclasses.replace(config, attention_pattern=pattern, band_size=4)
    model = GPT(config)

    @quick.jit
    def prefill(tokens, lengths):
        cache = model.init_cache(2, 24)
        return model.apply({'params': params}, tokens, lengths, cache, method='prefill')

    @quick.jit
    def step(cache, token, positions):
        logits, cache = model.apply({'params': params}, token[:, None], cache=cache, positions=positions[:, None])
        return logits[:, 0], cache

    lengths = jnp.array([9, 14])
    logits, cache = prefill(tokens, lengths)
    band = None if pattern == 'dense' else 4
    for row, length in enumerate((9, 14)):
        expected = gpt_logits(params, tokens[row : row + 1, :length], 300, band=band)[0, -1]
        np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-4)
    assert cache['lengths'].tolist() == [9, 14]
    logits, _ = step(cache, tokens[jnp.arange(2), lengths], lengths)
    for row, length in enumerate((9, 14)):
        expected = gpt_logits(params, tokens[row : row + 1, : length + 1], 300, band=band)[0, -1]
        np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_a_prefill_holds_neither_all_scores_nor_the_logits_of_all_tokens():
    config = GPTConfig(50_000, 4096, n_layer=2, n_head=1, d_model=8, attention_pattern='alternating')

    def prefill(tokens):
        model = GPT(config)
        params = jax.tree.map(jnp.zeros_like, jax.eval_shape(model.init, jax.random.key(0), tokens[:, :1])['params'])
        cache = model.init_cache(1, 4096)
        return model.apply({'params': params}, tokens, jnp.array([4000]), cache, method='prefill')

    largest = largest_array(jax.make_jaxpr(prefill)(jnp.zeros((1, 4096), jnp.int32)))
    assert largest <= 4096 * 4096 // 8
