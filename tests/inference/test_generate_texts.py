"""Decoding with a cache against whole forward passes without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.data.tokenizer import train_char
from gpt_jax.errors import InputError
from gpt_jax.inference import (
    Engine,
    Request,
    Sampling,
    SamplingBatch,
    StoppingCriteria,
    generate,
    make_requests,
    sample_text,
)
from gpt_jax.inference import engine as engines
from gpt_jax.inference.generate import decode, start_rows
from gpt_jax.models import GPT, GPTConfig

VOCAB, BLOCK = 60, 128
END = VOCAB - 1  # never likely enough to be drawn: see `params`
GREEDY, DRAWN = Sampling(greedy=True), Sampling(temperature=0.9, top_k=20)
PROMPT = [3, 14, 15, 9, 2, 6]


@pytest.fixture(scope='module')
def model():
    return GPT(GPTConfig(VOCAB, BLOCK, n_layer=2, n_head=2, d_model=32, tie_embeddings=False))


@pytest.fixture(scope='module')
def params(model):
    """Large enough that positions and earlier tokens matter, with an end of text that is very unlikely."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params)
    # The last LayerNorm's bias pushes END down whatever the text is.
    params['ln_f']['bias'] = params['ln_f']['bias'].at[0].set(10.0)
    params['lm_head'] = params['lm_head'].at[:, 0].set(0.0).at[END, 0].set(-10.0)
    return params


@pytest.fixture(scope='module')
def log_probabilities(model, params):
    """tokens -> the model's log-probabilities [len(tokens), vocab], from one forward pass of the whole context."""
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({'params': params}, tokens)))

    def run(tokens):
        padded = np.zeros((1, BLOCK), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(padded))[0, : len(tokens)]

    return run


@pytest.fixture(scope='module')
def engine(model, params):
    return Engine(model, params)


@pytest.fixture(scope='module')
def complete(engine):
    """A function: one prompt, how many new tokens, how they are chosen -> its continuations."""

    def run(prompt, count, sampling, end_of_text=END, **settings):
        (results,) = generate(engine, [prompt], sampling, StoppingCriteria(count, end_of_text), **settings)
        return results

    return run


# 31, 32 and 33 lie around the edge of a bucket; 40 tokens after 100 leave the prompt's bucket for the next one.
@pytest.mark.parametrize(('length', 'count'), [(1, 12), (31, 4), (32, 4), (33, 4), (100, 28)])
def test_greedy_decoding_is_the_argmax_of_repeated_forward_passes(complete, log_probabilities, length, count):
    tokens = list(np.random.default_rng(length).integers(0, END, length))
    (result,) = complete(tokens, count, GREEDY)
    for _ in range(count):
        tokens.append(int(log_probabilities(tokens)[-1].argmax()))
    assert result.tokens == tokens[length:]
    assert len(set(result.tokens)) > 1
    assert result.finish_reason == 'length'


@pytest.mark.parametrize('sampling', [GREEDY, DRAWN], ids=['greedy', 'drawn'])
def test_log_probabilities_are_the_models_own_before_temperature_and_filters(complete, log_probabilities, sampling):
    for result in complete(PROMPT, 20, sampling, num_samples=2):
        expected = log_probabilities(PROMPT + result.tokens)[len(PROMPT) - 1 : -1]
        expected = expected[np.arange(20), result.tokens]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)


def test_a_sample_depends_on_seed_and_index_and_not_on_how_many_are_drawn(complete):
    three = complete(PROMPT, 20, DRAWN, num_samples=3, seed=5)
    one = complete(PROMPT, 20, DRAWN, num_samples=1, seed=5)
    assert three[0].tokens == one[0].tokens
    assert len({tuple(result.tokens) for result in three}) == 3


def test_the_same_seed_draws_the_same_and_another_one_another(complete):
    first, same, other = (complete(PROMPT, 20, DRAWN, seed=seed)[0].tokens for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_more_new_tokens_begin_with_the_same_ones(complete):
    # The second needs a cache of another length.
    short, long = (complete(PROMPT, count, DRAWN)[0].tokens for count in (10, 60))
    assert (len(short), len(long)) == (10, 60)
    assert long[:10] == short


def test_drawn_tokens_are_among_the_top_k(complete, log_probabilities):
    sampling = Sampling(temperature=3.0, top_k=2)
    for result in complete(PROMPT, 20, sampling, num_samples=4):
        order = np.argsort(-log_probabilities(PROMPT + result.tokens)[len(PROMPT) - 1 : -1], axis=-1)
        assert all(token in row[:2] for token, row in zip(result.tokens, order, strict=True))
        assert any(token == row[1] for token, row in zip(result.tokens, order, strict=True))


@pytest.mark.parametrize('sampling', [Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-4)])
def test_draws_from_one_token_are_greedy(complete, sampling):
    assert complete(PROMPT, 20, sampling)[0].tokens == complete(PROMPT, 20, GREEDY)[0].tokens


def test_a_higher_temperature_draws_less_likely_tokens(complete):
    cold, hot = (
        np.mean([result.logprobs for result in complete(PROMPT, 20, Sampling(temperature=t), num_samples=4)])
        for t in (0.3, 3.0)
    )
    assert cold > hot + 0.5


def test_it_stops_at_end_of_text_and_leaves_it_out(complete):
    tokens = complete(PROMPT, 20, GREEDY)[0].tokens
    end = next(token for token in tokens if tokens.index(token) >= 3)
    place = tokens.index(end)
    (result,) = complete(PROMPT, 20, GREEDY, end_of_text=end)
    assert result.tokens == tokens[:place]
    assert len(result.logprobs) == place
    assert result.finish_reason == 'stop'


def test_one_sample_that_stops_does_not_stop_the_others(complete):
    unstopped = [result.tokens for result in complete(PROMPT, 40, DRAWN, num_samples=6)]
    places = {token: {row.index(token) for row in unstopped if token in row} for token in range(END)}
    end = max(places, key=lambda token: len(places[token]))
    assert len(places[end]) > 1
    results = complete(PROMPT, 40, DRAWN, end_of_text=end, num_samples=6)
    for result, tokens in zip(results, unstopped, strict=True):
        assert result.tokens == (tokens[: tokens.index(end)] if end in tokens else tokens)
        assert result.finish_reason == ('stop' if end in tokens else 'length')


def test_end_of_text_as_the_last_token_that_was_asked_for_is_a_stop(complete):
    tokens = complete(PROMPT, 20, GREEDY)[0].tokens
    end = next(token for token in tokens if tokens.index(token) >= 3)
    (result,) = complete(PROMPT, tokens.index(end) + 1, GREEDY, end_of_text=end)
    assert result.finish_reason == 'stop'
    (result,) = complete(PROMPT, tokens.index(end), GREEDY, end_of_text=end)
    assert result.finish_reason == 'length'


def test_an_empty_prompt_starts_a_new_document(complete):
    assert complete([], 5, GREEDY) == complete([END], 5, GREEDY)


def test_a_prompt_and_its_continuation_may_fill_the_context(complete):
    assert len(complete([1] * (BLOCK - 1), 1, GREEDY)[0].tokens) == 1


@pytest.mark.parametrize(
    ('length', 'count', 'samples', 'message'),
    [
        (128, 1, 1, 'the prompt has 128 tokens and the model sees block_size=128 in all.* at most 127'),
        (100, 29, 1, '100 tokens of prompt and max_new_tokens=29 exceed block_size=128; use max_new_tokens=28'),
        (5, 0, 1, 'max_new_tokens=0 must be at least 1'),
        (5, 1, 0, 'num_samples=0 must be at least 1'),
    ],
)
def test_counts_that_do_not_fit_are_named(complete, length, count, samples, message):
    with pytest.raises(InputError, match=message) as error:
        complete([1] * length, count, GREEDY, num_samples=samples)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'temperature': 0.0}, 'temperature=0.0 must be above 0'),
        ({'temperature': float('nan')}, 'temperature=nan must be above 0'),
        ({'top_k': -1}, 'top_k=-1'),
        ({'top_p': 0.0}, 'top_p=0.0'),
        ({'top_p': 1.1}, 'top_p=1.1'),
    ],
)
def test_settings_out_of_range_are_named(values, message):
    with pytest.raises(InputError, match=message):
        Sampling(**values)


def test_requests_of_one_bucket_compile_once(complete):
    def compiled():
        return [program._cache_size() for program in (engines._prefill, start_rows, decode)]

    complete(PROMPT, 20, DRAWN)
    before = compiled()
    complete(PROMPT[:3], 11, Sampling(temperature=0.3, top_k=20), seed=9)
    assert compiled() == before
    complete(PROMPT * 6, 11, DRAWN, num_samples=3)  # 36 tokens, the next bucket, in a batch of a size of its own
    assert compiled() == [count + 1 for count in before]


@pytest.fixture(scope='module')
def tokenizer():
    letters = ''.join(chr(ord('A') + index) for index in range(VOCAB - 2))
    tokenizer = train_char([letters])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (VOCAB, END)
    return tokenizer


@pytest.mark.parametrize('length', [0, 5, 120, 300])
def test_a_preview_is_the_prompt_and_what_fits_after_its_end(complete, model, params, tokenizer, length):
    prompt = 'ABCDEFGHIJ' * (length // 10) + 'XYZAB'[: length % 10]
    text = sample_text(model, params, tokenizer, prompt=prompt, max_new_tokens=20, temperature=0.9, top_k=20, seed=3)
    tokens = tokenizer.encode(prompt)[-(BLOCK - 1) :]
    count = min(20, BLOCK - max(len(tokens), 1))
    expected = complete(tokens, count, DRAWN, seed=3)[0].tokens
    assert text == prompt + tokenizer.decode(expected)


# Several prompts.


@pytest.mark.slow
def test_prompts_of_different_lengths_continue_as_if_alone(engine):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, END, length).tolist() for length in (3, 40, 1, 17, 33)]
    for sampling in (GREEDY, DRAWN):
        together = generate(engine, prompts, sampling, StoppingCriteria(12, END), num_samples=2, seed=3)
        split = generate(engine, prompts, sampling, StoppingCriteria(12, END), num_samples=2, seed=3, batch_size=3)
        assert [[r.tokens for r in results] for results in split] == [[r.tokens for r in rs] for rs in together]
        if sampling is GREEDY:
            for prompt, results in zip(prompts, together, strict=True):
                (alone,) = generate(engine, [prompt], sampling, StoppingCriteria(12, END))[0]
                assert results[0].tokens == results[1].tokens == alone.tokens
                np.testing.assert_allclose(results[0].logprobs, alone.logprobs, atol=1e-4)


def test_the_loop_ends_when_every_row_has_ended(engine, complete):
    tokens = complete(PROMPT, 30, GREEDY)[0].tokens
    end = next(token for token in tokens if tokens.index(token) >= 3)
    batch = SamplingBatch(engine, 2, len(PROMPT) + 30, GREEDY, StoppingCriteria(30, end))
    batch.add([Request(PROMPT), Request(PROMPT)])
    batch.advance(32)
    assert not batch.unfinished
    # What has been read: the prompt, and every new token but the last, which ended the text.
    assert batch._state.cache['lengths'].tolist() == [len(PROMPT) + tokens.index(end)] * 2


@pytest.mark.parametrize('rows', [1, 2])
def test_a_step_writes_to_its_cache_in_place(engine, rows, as_users):
    batch = SamplingBatch(engine, rows, len(PROMPT) + 20, GREEDY, StoppingCriteria(20, END))
    batch.add([Request(PROMPT)] * rows)
    batch.advance(1)
    arguments = (engine.model, None, engine.params, batch._state, 8, 20, batch._chain)
    program = decode.lower(*arguments).compile(compiler_options=as_users).as_text()
    # One row is written as a slice, several by a scatter.
    cache, write = f'f32[{rows},2,32,16]{{3,2,1,0}}', 'dynamic-update-slice' if rows == 1 else 'scatter'
    assert f'{cache} {write}(' in program
    assert f'{cache} copy(' not in program


def test_a_text_that_outgrows_the_context_goes_on_from_its_last_half(engine, log_probabilities):
    prompts = [[1, 2, 3] * 42, [5] * 120, [7] * 20, list(range(END)) * 3]
    stopping = StoppingCriteria(90, END, allow_sliding=True)
    for prompt, (result,) in zip(prompts, generate(engine, prompts, GREEDY, stopping), strict=True):
        text, start = list(prompt), 0
        for _ in range(90):
            if len(text) - start > BLOCK:
                start = len(text) - BLOCK // 2
            text.append(int(log_probabilities(text[start:])[-1].argmax()))
        assert result.tokens == text[len(prompt) :]


# Requests that join and leave.


@pytest.mark.parametrize('sampling', [GREEDY, DRAWN], ids=['greedy', 'drawn'])
def test_requests_join_and_leave_a_running_batch_and_their_texts_are_those_made_alone(engine, sampling):
    rng = np.random.default_rng(6)
    stopping = StoppingCriteria(12, END)
    prompts = [rng.integers(0, END, length).tolist() for length in (5, 40, 2, 23, 9)]
    requests = make_requests(BLOCK, prompts, stopping)
    alone = [result for (result,) in generate(engine, prompts, sampling, stopping, seed=3, batch_size=1)]
    batch = SamplingBatch(engine, 4, 60, sampling, stopping, seed=3)
    first, second, third = batch.add(requests[:3])
    batch.advance(5)
    (fourth,) = batch.add(requests[3:4])  # into the row that nobody had
    batch.advance(3)
    removed = batch.remove(second)
    (fifth,) = batch.add(requests[4:])  # in its place
    assert fifth == second
    finished = {}
    while batch.unfinished:
        batch.advance(1)
        finished |= {row: batch.by_row[row] for row in (first, third, fourth, fifth)}
    assert 5 <= len(removed.tokens) < 12
    assert removed.tokens == alone[1].tokens[: len(removed.tokens)]
    assert removed.finish_reason is None
    for row, index in ((first, 0), (third, 2), (fourth, 3), (fifth, 4)):
        assert finished[row].tokens == alone[index].tokens
        np.testing.assert_allclose(finished[row].logprobs, alone[index].logprobs, atol=1e-4)
        assert finished[row].finish_reason == 'length'


def test_a_batch_takes_no_more_than_it_has_room_for(engine):
    batch = SamplingBatch(engine, 2, 20, GREEDY, StoppingCriteria(5, END))
    with pytest.raises(ValueError, match='3 requests for 2 free rows'):
        batch.add([Request([1])] * 3)
    with pytest.raises(ValueError, match=r'a prompt of 40 tokens .* exceed the length of the batch'):
        batch.add([Request([1] * 40)])
