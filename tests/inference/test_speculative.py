"""Speculative decoding changes the time that a text takes and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gpt_jax.errors import InputError
from gpt_jax.inference import Engine, Sampling, Speculative, StoppingCriteria, generate, make_requests
from gpt_jax.inference.speculative import Drafter, look_up
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
    # Bands of 4: draft tokens that are not accepted must not have pushed out what the band still reaches.
    return make(0, attention_pattern='alternating', band_size=4)


@pytest.fixture(scope='module')
def draft():
    return make(1, n_layer=1)


def speculated(engine, strategy, sampling, stopping, seed=0, prompt=PROMPT):
    ((result,),) = generate(engine, [prompt], sampling, stopping, strategy=strategy, seed=seed)
    return result, strategy.acceptance


FILTERED = Sampling(greedy=True, repetition_penalty=1.5, no_repeat_ngram_size=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('source', 'tokens', 'sampling'),
    [('draft', 4, FILTERED), ('lookup', 4, FILTERED), ('lookup', 1, GREEDY), ('itself', 4, GREEDY)],
    ids=['draft', 'lookup', 'lookup of one', 'itself'],
)
def test_greedy_text_is_that_of_one_token_at_a_time(engine, draft, source, tokens, sampling):
    strategy = Speculative(tokens, {'draft': draft, 'lookup': None, 'itself': engine}[source], ngram=1)
    stopping = StoppingCriteria(BLOCK - len(PROMPT), -1)  # the text fills the context to its last position
    ((expected,),) = generate(engine, [PROMPT], sampling, stopping)
    found, acceptance = speculated(engine, strategy, sampling, stopping)
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert found.finish_reason == 'length'
    assert 0 <= acceptance.accepted <= acceptance.drafted
    if source == 'itself':
        assert acceptance.rate > 0.9  # the last draft lies beyond the last token


def test_end_of_text_in_the_draft_ends_the_text(engine):
    ((whole,),) = generate(engine, [PROMPT], GREEDY, StoppingCriteria(30, -1))
    end = next(token for token in whole.tokens if whole.tokens.index(token) >= 4)
    stopping = StoppingCriteria(30, end)
    ((expected,),) = generate(engine, [PROMPT], GREEDY, stopping)
    found, _ = speculated(engine, Speculative(4, engine), GREEDY, stopping)
    assert (found.tokens, found.finish_reason) == (expected.tokens, 'stop')


@pytest.mark.parametrize(
    ('text', 'ngram', 'expected'),
    [
        ([1, 2, 3, 1, 2], 2, [3, 1, 2]),
        ([1, 2, 3, 1, 2, 4, 5, 6, 7, 1, 2], 2, [4, 5, 6]),  # the last time counts
        ([1, 2, 3, 2], 1, [3, 2]),
        ([7, 7, 7], 2, [7]),
        ([1, 2, 3], 1, []),
        ([1], 2, []),
    ],
)
def test_the_text_is_looked_up_for_its_own_end(text, ngram, expected):
    # What lies behind the text must not be found.
    tokens = jnp.array([[*text, 1, 2, 3, 7, 7, 7]])
    draft = look_up(Drafter(3, ngram, None), tokens[0], jnp.array(len(text)))
    assert draft.tokens_T[draft.made_T].tolist() == expected
    assert draft.made_T.tolist() == [True] * len(expected) + [False] * (3 - len(expected))


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
    strategy = Speculative(2, draft if source == 'draft' else None, ngram=1)
    # The pair of tokens after the first one, which nothing drafts: the first is conditioned on.
    counts = {}
    for seed in range(1000):
        found, acceptance = speculated(engine, strategy, sampling, StoppingCriteria(3, -1), seed)
        counts.setdefault(found.tokens[0], []).append(tuple(found.tokens[1:]))
    assert 0.02 < acceptance.rate < 0.98
    first, pairs = max(counts.items(), key=lambda item: len(item[1]))
    expected = joint(engine, sampling, [*PROMPT, first]) * len(pairs)
    observed = np.zeros_like(expected)
    np.add.at(observed, tuple(np.transpose(pairs)), 1)
    assert not observed[expected == 0].any()
    common = expected >= 5
    observed, expected = (np.append(a[common], a[~common & (expected > 0)].sum()) for a in (observed, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.slow
def test_what_cannot_be_drafted_is_refused(engine, draft):
    requests = make_requests(BLOCK, [PROMPT], StoppingCriteria(10, -1), 1)
    with pytest.raises(InputError, match='draft_tokens=0 must be at least 1'):
        Speculative(0)
    with pytest.raises(InputError, match='allow_sliding does not go with speculative'):
        Speculative().check_settings(GREEDY, StoppingCriteria(10, -1, allow_sliding=True))
    small = GPT(GPTConfig(VOCAB + 1, 8, n_layer=1, n_head=1, d_model=4))
    other = Engine(small, small.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])
    with pytest.raises(InputError, match='vocabulary of 31 tokens and the model one of 30'):
        Speculative(draft=other).check(engine, requests, StoppingCriteria(10, -1))
    short = Engine(GPT(GPTConfig(VOCAB, 8, n_layer=2, n_head=2, d_model=16)), {'blocks': {}} | dict(draft.params))
    with pytest.raises(InputError, match='exceed block_size=8 of the draft'):
        Speculative(draft=short).check(engine, requests, StoppingCriteria(10, -1))
