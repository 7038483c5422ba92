"""Sliding windows on functions with known answers, against PyTorch, and against the validation loss of training."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.data.tokenizer import train_bpe, train_char
from gpt_jax.errors import InputError
from gpt_jax.evaluation import model_losses, perplexity, strided_losses, text_perplexity
from gpt_jax.models import GPT, GPTConfig

BIGRAM = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.2, 0.2, 0.6]])


def of_a_bigram(tokens, targets):
    """Losses of the model that knows the last token alone: the same whatever the windows are."""
    return -np.log(BIGRAM[tokens % 3, targets % 3])


def seen_tokens(tokens, targets):
    """A 'loss' that tells which target it is of, and after how many tokens it was predicted."""
    return targets + np.broadcast_to(np.arange(1, tokens.shape[1] + 1), tokens.shape) / 1024


sizes = st.integers(1, 40).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context)))


@settings(deadline=None)
@given(st.integers(2, 200), sizes, st.integers(1, 9))
def test_every_token_but_the_first_is_scored_once_after_enough_others(count, context_and_stride, batch_size):
    context, stride = context_and_stride
    told = strided_losses(seen_tokens, range(count), context, stride, batch_size)
    place = np.arange(1, count)
    np.testing.assert_array_equal(told.astype(int), place)
    seen = (told - place) * 1024
    assert (seen >= np.minimum(place, context - stride + 1)).all()
    assert (seen <= np.minimum(place, context)).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=90), sizes, st.integers(1, 9))
def test_a_model_of_one_token_of_context_has_its_exact_loss_in_all_windows(tokens, context_and_stride, batch_size):
    expected = [-math.log(BIGRAM[a, b]) for a, b in itertools.pairwise(tokens)]
    losses = strided_losses(of_a_bigram, tokens, *context_and_stride, batch_size)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_a_stride_of_one_gives_each_token_all_the_context_there_is():
    told = strided_losses(seen_tokens, range(30), 8, 1)
    np.testing.assert_array_equal((told - np.arange(1, 30)) * 1024, np.minimum(np.arange(1, 30), 8))


def test_texts_of_many_lengths_need_few_shapes():
    shapes = set()

    def losses(tokens, targets):
        shapes.add(tokens.shape)
        return of_a_bigram(tokens, targets)

    for count in range(2, 500):
        strided_losses(losses, np.zeros(count, int), 64, 32, 8)
    assert len(shapes) <= 4 + 7
    assert max(shapes) <= (8, 64)


def test_progress_ends_at_the_number_of_windows():
    told = []
    strided_losses(of_a_bigram, np.zeros(100, int), 10, 5, 4, lambda done, total: told.append((done, total)))
    assert told == [(4, 19), (8, 19), (12, 19), (16, 19), (19, 19)]


@pytest.mark.parametrize(
    ('count', 'context', 'stride', 'batch_size', 'message'),
    [
        (9, 0, None, 1, 'context=0 must be at least 1'),
        (9, 4, 0, 1, 'stride=0 must be at least 1 and at most context=4'),
        (9, 4, 5, 1, 'stride=5 must be at least 1 and at most context=4'),
        (9, 4, 2, 0, 'batch_size=0 must be at least 1'),
        (1, 4, 2, 1, 'the text has 1 tokens, and the first is never scored'),
        (0, 4, 2, 1, 'the text has 0 tokens'),
    ],
)
def test_numbers_out_of_range_are_named(count, context, stride, batch_size, message):
    with pytest.raises(InputError, match=message):
        strided_losses(of_a_bigram, [0] * count, context, stride, batch_size)


# Of texts.


def uniform_over(size):
    return lambda tokens, targets: np.full(tokens.shape, math.log(size), np.float32)


def test_the_numbers_of_a_text_under_a_uniform_model_are_known():
    tokenizer = train_char(['abcdefé '])
    text = 'abc  dé\nfa'
    numbers = text_perplexity(uniform_over(16), tokenizer, text, context=6)
    assert list(numbers) == ['loss', 'perplexity', 'bits_per_byte', 'tokens', 'words', 'bytes', 'stride', 'context']
    # Scored is 'bc  dé\nfa': 9 characters, one of them of two bytes.
    assert (numbers['tokens'], numbers['words'], numbers['bytes']) == (9, 3, 10)
    assert (numbers['stride'], numbers['context']) == (3, 6)
    assert numbers['loss'] == pytest.approx(math.log(16))
    assert numbers['perplexity'] == pytest.approx(16)
    assert numbers['bits_per_byte'] == pytest.approx(4 * 9 / 10)


def test_bytes_are_those_after_the_first_token_whatever_it_stands_for():
    tokenizer = train_bpe(['the the the theme'] * 20, 300)
    text = 'the theme'
    first = len(tokenizer.token_bytes(tokenizer.encode(text)[0]))
    assert first > 1
    assert text_perplexity(uniform_over(2), tokenizer, text, 4)['bytes'] == len(text) - first
    # Half of a character is a token of its own; an unknown one stands for a whole character.
    assert text_perplexity(uniform_over(2), tokenizer, 'éa', 4)['bytes'] == 2
    assert text_perplexity(uniform_over(2), train_char(['ab']), 'éab', 4)['bytes'] == 2


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match='token 1 of the text has a loss that is not finite'):
        text_perplexity(lambda tokens, _: np.full(tokens.shape, np.nan), train_char(['ab']), 'abab', 2)


# Of a model.


@pytest.fixture(scope='module')
def small():
    """A model whose predictions depend on all that it sees, its parameters, and a text longer than its context."""
    model = GPT(GPTConfig(vocab_size=60, block_size=16, n_layer=2, n_head=2, d_model=32))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params)
    return model, params, rng.integers(0, 60, 75)


def test_each_loss_of_a_model_is_that_of_its_own_window(small):
    model, params, tokens = small
    losses = strided_losses(model_losses(model, params), tokens, 16, 5, 4)
    apply = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({'params': params}, tokens)))
    for place in (1, 15, 16, 17, 21, 22, 40, 74):
        # The first window reaches to place 16; each next one begins 5 later and scores the 5 that are new.
        start = 0 if place <= 16 else -(-(place - 16) // 5) * 5
        window = np.zeros((1, 16), np.int32)
        window[0, : place - start] = tokens[start:place]
        assert losses[place - 1] == pytest.approx(-float(apply(window)[0, place - start - 1, tokens[place]]), abs=1e-4)


@pytest.mark.slow
def test_the_loss_is_that_of_the_strided_recipe_in_pytorch(small):
    torch = pytest.importorskip('torch', reason='compares with PyTorch')
    transformers = pytest.importorskip('transformers', reason='compares with Hugging Face')
    model, params, tokens = small
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    theirs.load_state_dict(as_gpt2(params, torch))
    ids, max_length, stride, done, nats = torch.tensor(tokens)[None], 16, 6, 0, 0.0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : done - end if done else 1] = -100
        with torch.no_grad():
            # The model shifts the labels, and takes the mean over those that are left.
            nats += theirs(window, labels=labels).loss.item() * (labels[:, 1:] != -100).sum().item()
        done = end
        if end == ids.shape[1]:
            break
    losses = strided_losses(model_losses(model, params), tokens, max_length - 1, stride, 3)
    assert losses.sum(dtype=np.float64) == pytest.approx(nats, rel=1e-5)


def as_gpt2(params, torch):
    """Our parameters under Hugging Face's names."""
    flat = {}
    for layer in range(2):
        block = jax.tree.map(lambda array, layer=layer: array[layer], params['blocks'])
        parts = {
            'ln_1.weight': block['ln_1']['scale'],
            'ln_1.bias': block['ln_1']['bias'],
            'ln_2.weight': block['ln_2']['scale'],
            'ln_2.bias': block['ln_2']['bias'],
            'attn.c_attn.weight': block['attention']['qkv']['kernel'].reshape(32, 96),
            'attn.c_attn.bias': block['attention']['qkv']['bias'].reshape(96),
            'attn.c_proj.weight': block['attention']['out']['kernel'].reshape(32, 32),
            'attn.c_proj.bias': block['attention']['out']['bias'],
            'mlp.c_fc.weight': block['mlp']['up']['kernel'],
            'mlp.c_fc.bias': block['mlp']['up']['bias'],
            'mlp.c_proj.weight': block['mlp']['down']['kernel'],
            'mlp.c_proj.bias': block['mlp']['down']['bias'],
        }
        flat |= {f'transformer.h.{layer}.{name}': array for name, array in parts.items()}
    flat |= {'transformer.wte.weight': params['wte'][:60], 'transformer.wpe.weight': params['wpe']}
    flat |= {'transformer.ln_f.weight': params['ln_f']['scale'], 'transformer.ln_f.bias': params['ln_f']['bias']}
    flat['lm_head.weight'] = flat['transformer.wte.weight']
    return {name: torch.tensor(np.asarray(array)) for name, array in flat.items()}


@pytest.mark.slow
def test_windows_side_by_side_give_the_validation_loss_of_training(finished_run, corpus):
    text = corpus.read_text(encoding='utf-8')
    tokenizer = finished_run.tokenizer
    held_out = [*tokenizer.encode(text[int(len(text) * 0.9) :]), tokenizer.end_of_text]
    losses = strided_losses(model_losses(finished_run.model, finished_run.params), held_out, 32, 32)
    assert losses.mean(dtype=np.float64) == pytest.approx(finished_run.val_loss, rel=1e-5)


def test_a_batch_that_no_memory_holds_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(perplexity, 'host_memory', lambda: 10**6)
    with pytest.raises(InputError, match=r'batch_size=4096 windows of 64 tokens .* there are 0.0 GB; use a smaller'):
        strided_losses(None, list(range(10000)), 64, 1, batch_size=4096)
    monkeypatch.setattr(perplexity, 'memory_of', lambda devices: 10**6)
    losses = perplexity.model_losses(GPT(GPTConfig(50257, 1024, n_layer=12, n_head=12, d_model=768)), None)
    with pytest.raises(InputError, match='batch_size=8 windows of 1024 tokens take at least'):
        losses(np.zeros((8, 1024), np.int32), np.zeros((8, 1024), np.int32))


def test_special_tokens_of_a_text_are_scored_as_such_where_asked():
    tokenizer = train_bpe(['a text, and another one'], 270)
    seen = []

    def losses(tokens_BT, targets_BT):
        seen.append(targets_BT.copy())
        return np.ones(tokens_BT.shape)

    text = 'a text<|endoftext|>another one'
    plain = text_perplexity(losses, tokenizer, text, 32)
    parsed = text_perplexity(losses, tokenizer, text, 32, parse_special=True)
    assert parsed['tokens'] < plain['tokens']
    assert parsed['bytes'] == plain['bytes']
    assert parsed['words'] == plain['words'] == len(text[1:].split())
    assert [(tokenizer.end_of_text in each) for each in (seen[0][seen[0] > 0], seen[1])] == [False, True]
