"""Cross-entropy of the next token against NumPy, and what of the logits is ever held."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxprs import equations, largest_array
from numpy_reference import cross_entropy, float64, gpt_logits, log_softmax

from gpt_jax.models import GPT, GPTConfig, losses
from gpt_jax.models.layers import copy_table, embed_tokens


def problem(seed, batch, time, width, vocab_size, padded):
    rng = np.random.default_rng(seed)
    x_BTD = rng.standard_normal((batch, time, width), np.float32)
    head_VD = rng.standard_normal((padded, width), np.float32)
    targets_BT = rng.integers(0, vocab_size, (batch, time), np.int32)
    return x_BTD, head_VD, targets_BT, rng.standard_normal((batch, time), np.float32)


def cross_entropies(x, head, targets, vocab_size):
    return losses.linear_cross_entropy(x, copy_table(head, x.dtype, targets), targets, vocab_size)


def losses_and_gradients(x, head, targets, weights, vocab_size):
    value, pullback = jax.vjp(lambda x, head: cross_entropies(x, head, targets, vocab_size), x, head)
    return value, pullback(weights)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 13),
    vocab_size=st.integers(1, 40),
    padding=st.integers(0, 20),
    chunk_elements=st.sampled_from([1, 60, 200, 500, 10**6]),
)
@example(batch=2, time=12, vocab_size=30, padding=2, chunk_elements=200)  # 4 chunks of 3
@example(batch=2, time=11, vocab_size=30, padding=2, chunk_elements=200)  # a prime length: 11 chunks of 1
@example(batch=2, time=12, vocab_size=32, padding=0, chunk_elements=10**6)  # one chunk, no padding
def test_losses_and_gradients_equal_numpy_however_time_is_cut(batch, time, vocab_size, padding, chunk_elements):
    x, head, targets, weights = problem(time, batch, time, 5, vocab_size, vocab_size + padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.CHUNK_ELEMENTS, 'cpu', chunk_elements)
        value, (dx, dhead) = quick.jit(losses_and_gradients, static_argnums=4)(x, head, targets, weights, vocab_size)

    x, head = float64((x, head[:vocab_size]))
    logits = x @ head.T
    np.testing.assert_allclose(value, cross_entropy(logits, targets), rtol=1e-5, atol=1e-5)
    dlogits = (np.exp(log_softmax(logits)) - np.eye(vocab_size)[targets]) * weights[..., None]
    np.testing.assert_allclose(dx, dlogits @ head, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dhead[:vocab_size], np.einsum('btv,btd->vd', dlogits, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(dhead[vocab_size:], np.zeros((padding, 5)))


def test_losses_of_extreme_logits_are_finite():
    x, head, targets, _ = problem(0, 1, 4, 5, 30, 32)
    value = cross_entropies(1e3 * x, 1e2 * head, targets, 30)
    np.testing.assert_allclose(value, cross_entropy(1e5 * float64(x) @ float64(head[:30]).T, targets), rtol=1e-5)


def test_masked_logits_are_float32_and_minus_infinity_on_the_padding():
    x, head, _, _ = problem(0, 2, 3, 5, 30, 32)
    logits = losses.masked_logits(jnp.asarray(x, jnp.bfloat16), jnp.asarray(head), 30)
    assert logits.dtype == jnp.float32
    assert (np.asarray(logits[..., 30:]) == -np.inf).all()
    np.testing.assert_allclose(logits[..., :30], x @ head[:30].T, atol=0.1)


def test_token_losses_are_the_log_softmax_of_the_model_in_numpy(params, tokens, targets, token_losses):
    value = token_losses(params)
    assert (value.shape, value.dtype) == (tokens.shape, jnp.float32)
    expected = cross_entropy(gpt_logits(params, tokens, 300), targets)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_token_losses_of_an_untied_model_are_those_of_its_own_head(config, params, tokens, targets):
    config = dataclasses.replace(config, tie_embeddings=False)
    params = params | {'lm_head': params['wte'][::-1]}
    value = quick.jit(lambda p: GPT(config).apply({'params': p}, tokens, targets, method='token_losses'))(params)
    expected = cross_entropy(gpt_logits(params, tokens, 300), targets)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_token_losses_have_the_gradients_of_log_softmax_of_the_logits(config, params, tokens, targets, gradients):
    def mean_loss(p):
        log_probabilities = jax.nn.log_softmax(GPT(config).apply({'params': p}, tokens))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1))

    expected = quick.jit(jax.grad(mean_loss))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradients, expected)


@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_token_losses_never_hold_the_logits_of_the_batch(direction):
    config = GPTConfig(vocab_size=50257, block_size=512, n_layer=1, n_head=1, d_model=8)
    model, batch, time = GPT(config), 4, 512
    tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']

    def loss(params, tokens):
        return model.apply({'params': params}, tokens, tokens, method='token_losses').mean()

    full = batch * time * config.vocab_size
    function = loss if direction == 'forward' else jax.grad(loss)
    assert largest_array(jax.make_jaxpr(function)(params, tokens)) < full / 8
    # The measure itself sees them where they are.
    logits = jax.make_jaxpr(lambda params, tokens: model.apply({'params': params}, tokens))(params, tokens)
    assert largest_array(logits) >= full


def test_a_fresh_model_loses_the_entropy_of_a_uniform_guess(fresh, token_losses):
    assert abs(np.mean(token_losses(fresh)) / math.log(300) - 1) < 0.02


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_the_gradient_of_a_table_in_16_bits_is_added_up_in_float32(dtype):
    # 3 000 gradients of 1 for one token: sums in 16 bits stop growing at 256 (bf16) or 2 048 (fp16).
    tokens = jnp.zeros((2, 1500), jnp.int32)

    def total(table):
        return embed_tokens(copy_table(table, dtype, tokens), tokens).astype(jnp.float32).sum()

    gradient = jax.grad(total)(jnp.ones((128, 2), jnp.float32))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient[0], [3000, 3000])


@pytest.mark.parametrize(('platform', 'chunks'), [('cpu', 32), ('cuda', 1), ('tpu', 1)])
def test_chunks_are_sized_by_the_device_that_is_compiled_for(monkeypatch, platform, chunks):
    monkeypatch.setattr(losses, 'target_device', lambda: types.SimpleNamespace(platform=platform))
    x, head = jax.ShapeDtypeStruct((4, 1024, 8), jnp.float32), jax.ShapeDtypeStruct((50304, 8), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
    traced = jax.make_jaxpr(lambda x, head, targets: cross_entropies(x, head, targets, 50257))(x, head, targets)
    (scan,) = (equation for equation in equations(traced) if equation.primitive.name == 'scan')
    assert scan.params['length'] == chunks
