"""Guessing changes the time that a text takes and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gpt_jax.errors import InputError
from gpt_jax.inference import Ending, Engine, Sampling, generate, make_requests
from gpt_jax.inference.speculative import Guessing, Tally, check_speculation, speculate
from gpt_jax.models import GPT, GPTConfig

VOCAB, BLOCK = 30, 48
PROMPT = [3, 4, 5, 3, 4]
GREEDY = Sampling(greedy=True)


def make(seed, size=0.3, **sizes):
    model = GPT(GPTConfig(VOCAB, BLOCK, **({'n_layer': 2, 'n_head': 2, 'd_model': 16} | sizes)))
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))['params']
    rng = np.random.default_rng(seed)
    return Engine(model, jax.tree.map(lambda leaf: leaf + size * rng.standard_normal(leaf.shape, np.float32), params))


@pytest.fixture(scope='module')
def engine():
    # Bands of 4: guesses that are not taken must not have pushed out what the band still reaches.
    return make(0, attention_pattern='alternating', band_size=4)


@pytest.fixture(scope='module')
def draft():
    return make(1, n_layer=1)


def speculated(engine, guessing, sampling, ending, seed=0, prompt=PROMPT, rounds=8):
    tally = Tally()
    (request,) = make_requests(BLOCK, [prompt], ending, 1)
    check_speculation(engine, guessing, [request], ending)
    *_, last = speculate(engine, request, guessing, sampling, ending, seed, rounds, tally)
    return last, tally


@pytest.mark.parametrize('tokens', [1, 4])
@pytest.mark.parametrize('source', ['draft', 'lookup', 'itself'])
@pytest.mark.parametrize('sampling', [GREEDY, Sampling(greedy=True, repetition_penalty=1.5, no_repeat_ngram_size=3)])
def test_greedy_text_is_that_of_one_token_at_a_time(engine, draft, source, tokens, sampling):
    guessing = Guessing(tokens, {'draft': draft, 'lookup': None, 'itself': engine}[source], ngram=1)
    ending = Ending(BLOCK - len(PROMPT), -1)  # the text fills the context to its last position
    ((expected,),) = generate(engine, [PROMPT], sampling, ending)
    found, tally = speculated(engine, guessing, sampling, ending)
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert found.finish_reason == 'length'
    assert 0 <= tally.accepted <= tally.guessed
    if source == 'itself':
        assert tally.rate > 0.9  # the last guesses lie beyond the last token


def test_end_of_text_among_the_guesses_ends_the_text(engine):
    ((whole,),) = generate(engine, [PROMPT], GREEDY, Ending(30, -1))
    end = next(token for token in whole.tokens if whole.tokens.index(token) >= 4)
    ending = Ending(30, end)
    ((expected,),) = generate(engine, [PROMPT], GREEDY, ending)
    found, _ = speculated(engine, Guessing(4, engine), GREEDY, ending)
    assert (found.tokens, found.finish_reason) == (expected.tokens, 'stop')


def test_the_last_occurrence_of_the_ngram_is_looked_up(engine):
    # Sampled from what is nearly uniform, guesses of a prompt that repeats itself are made but seldom taken.
    hot = Sampling(temperature=50.0)
    _, tally = speculated(engine, Guessing(2, ngram=2), hot, Ending(2, -1), prompt=[1, 2, 3, 1, 2, 4, 1])
    assert tally.guessed == 0 or tally.accepted <= tally.guessed


def joint(engine, sampling, prompt):
    """Probability of each pair of next tokens, from whole forward passes and NumPy: [vocab, vocab]."""
    texts = np.array([[*prompt, token] for token in range(VOCAB)], np.int32)
    logits = np.asarray(engine.model.apply({'params': engine.params}, texts), np.float64)[:, len(prompt) - 1 :]

    def softmax(logits):
        logits = logits / sampling.temperature
        if sampling.top_k:
            logits = np.where(logits < np.sort(logits)[..., -sampling.top_k][..., None], -np.inf, logits)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    return softmax(logits[0, 0])[:, None] * softmax(logits[:, 1])


@pytest.mark.slow
@pytest.mark.parametrize('source', ['draft', 'lookup'])
def test_drawn_texts_are_distributed_as_those_of_the_model(engine, draft, source):
    sampling = Sampling(temperature=1.5, top_k=6)
    guessing = Guessing(2, draft if source == 'draft' else None, ngram=1)
    # The pair of tokens after the first one, which nothing guesses: the first is conditioned on.
    counts, total = {}, Tally()
    for seed in range(1500):
        found, tally = speculated(engine, guessing, sampling, Ending(3, -1), seed)
        counts.setdefault(found.tokens[0], []).append(tuple(found.tokens[1:]))
        total.guessed, total.accepted = total.guessed + tally.guessed, total.accepted + tally.accepted
    assert 0.02 < total.rate < 0.98
    first, pairs = max(counts.items(), key=lambda item: len(item[1]))
    expected = joint(engine, sampling, [*PROMPT, first]) * len(pairs)
    observed = np.zeros_like(expected)
    np.add.at(observed, tuple(np.transpose(pairs)), 1)
    assert not observed[expected == 0].any()
    common = expected >= 5
    observed, expected = (np.append(a[common], a[~common].sum()) for a in (observed, expected))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_what_cannot_be_guessed_is_refused(engine, draft):
    requests = make_requests(BLOCK, [PROMPT], Ending(10, -1), 1)
    with pytest.raises(InputError, match='draft_tokens=0 must be at least 1'):
        Guessing(0)
    with pytest.raises(InputError, match='allow_sliding does not go with speculative'):
        check_speculation(engine, Guessing(), requests, Ending(10, -1, allow_sliding=True))
    small = GPT(GPTConfig(VOCAB + 1, 8, n_layer=1, n_head=1, d_model=4))
    other = Engine(small, small.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])
    with pytest.raises(InputError, match='vocabulary of 31 tokens and the model one of 30'):
        check_speculation(engine, Guessing(draft=other), requests, Ending(10, -1))
    short = Engine(GPT(GPTConfig(VOCAB, 8, n_layer=2, n_head=2, d_model=16)), {'blocks': {}} | dict(draft.params))
    with pytest.raises(InputError, match='exceed block_size=8 of the draft'):
        check_speculation(engine, Guessing(draft=short), requests, Ending(10, -1))
