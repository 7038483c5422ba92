"""The debugger on a GPT: it shows what the model says and takes what `generate` takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.data.tokenizer import train_char
from gpt_jax.inference import Engine, Sampling, StoppingCriteria, generate
from gpt_jax.inference.debug import Debugger
from gpt_jax.inference.debug.choice import ModelInspector, choose
from gpt_jax.models import GPT, GPTConfig

LETTERS = [chr(ord('A') + index) for index in range(58)]
PROMPT = [3, 14, 15, 9, 2, 6]
SETTINGS = (
    Sampling(greedy=True, no_repeat_ngram_size=2),
    Sampling(temperature=0.9, top_k=20, top_p=0.95),
    Sampling(temperature=1.3, min_p=0.02, typical_p=0.9, repetition_penalty=1.2, min_new_tokens=4),
)


@pytest.fixture(scope='module')
def model():
    return GPT(GPTConfig(60, 64, n_layer=2, n_head=2, d_model=32, attention_pattern='alternating', band_size=4))


@pytest.fixture(scope='module')
def params(model):
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params)


@pytest.fixture(scope='module')
def inspector(model, params):
    return ModelInspector(model, params)


@pytest.fixture(scope='module')
def tokenizer():
    tokenizer = train_char(LETTERS)
    assert tokenizer.vocab_size == 60
    return tokenizer


def test_the_last_row_of_the_lens_is_what_the_model_says_comes_next(model, params, inspector):
    apply = jax.jit(lambda tokens: model.apply({'params': params}, tokens))
    for length in (1, 6, 32, 33, 64):
        tokens = np.random.default_rng(length).integers(0, 60, length)
        lens_LV = inspector.lens(list(tokens))
        assert lens_LV.shape == (3, 60)
        padded = np.zeros((1, 64), np.int32)
        padded[0, :length] = tokens
        np.testing.assert_allclose(lens_LV[-1], apply(padded)[0, length - 1], rtol=1e-4, atol=1e-4)


def test_attention_is_that_of_the_text_without_its_padding(inspector):
    for layer, band in ((0, 99), (1, 4)):
        maps_NTS = inspector.attention(PROMPT, layer)
        assert maps_NTS.shape == (2, 6, 6)
        np.testing.assert_allclose(maps_NTS.sum(axis=-1), 1, atol=1e-5)
        distance = np.arange(6)[:, None] - np.arange(6)
        np.testing.assert_array_equal(maps_NTS > 0, np.broadcast_to((distance >= 0) & (distance < band), (2, 6, 6)))


def test_another_text_is_looked_at_anew(inspector):
    first, other = inspector.lens(PROMPT), inspector.lens(PROMPT[::-1])
    assert not np.allclose(first[-1], other[-1])
    np.testing.assert_array_equal(inspector.lens(PROMPT), first)


@pytest.mark.slow
@pytest.mark.parametrize('sampling', SETTINGS)
def test_it_takes_the_tokens_that_generate_takes(model, params, inspector, tokenizer, sampling):
    ((expected,),) = generate(
        Engine(model, params), [PROMPT], sampling, StoppingCriteria(12, tokenizer.end_of_text), num_samples=1, seed=5
    )
    debugger = Debugger(inspector, tokenizer, PROMPT, 12)
    state, _ = debugger.respond(debugger.start(sampling, seed=5)[0], 'run')
    taken = [each for each in state.taken if each.token != tokenizer.end_of_text]
    assert [each.token for each in taken] == expected.tokens
    np.testing.assert_allclose(np.log([each.probability for each in taken]), expected.logprobs, atol=1e-4)


def test_every_filter_in_use_is_shown_by_name_and_in_the_order_it_acts(inspector):
    choice = choose(SETTINGS[2], inspector.lens(PROMPT)[-1], PROMPT, new=2, ends=59, seed=0)
    assert choice.names == (
        *('model', 'repetition_penalty=1.2', 'min_new_tokens=4', 'temperature=1.3', 'min_p=0.02', 'typical_p=0.9'),
    )
    assert choice.probabilities[1, 59] > 0
    assert choice.probabilities[2, 59] == 0
    np.testing.assert_allclose(choice.probabilities.sum(axis=-1), 1)
    assert choice.probabilities[-1, choice.chosen] > 0
    banned = Sampling(greedy=True, bad_words_ids=((choice.chosen,),))
    assert choose(banned, inspector.lens(PROMPT)[-1], PROMPT, 0, 59, 0).names == ('model', 'bad_words_ids')
