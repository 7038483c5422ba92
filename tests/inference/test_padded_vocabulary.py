"""A model with more ids than its tokenizer has tokens: the others are never written, by no strategy."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import train_char
from gpt_jax.inference import (
    Beams,
    BestOf,
    Contrastive,
    Engine,
    Sampling,
    Speculative,
    StoppingCriteria,
    generate,
    sample_text,
)
from gpt_jax.inference.debug import Debugger, ModelInspector
from gpt_jax.models import GPT, GPTConfig

IDS, GREEDY = 40, Sampling(greedy=True)
NEVER = -1


class Holes:
    """A tokenizer of 12 tokens, with holes among their ids and many ids behind them; every other id is likelier."""

    tokens = (0, 1, 2, 5, 6, 7, 11, 12, 13, 20, 21, 22)

    def is_token(self, size):
        return np.isin(np.arange(size), self.tokens)


@pytest.fixture(scope='module')
def padded():
    """The model whose likeliest ids are no tokens, its engine, and a smaller draft of it."""

    def model_of(n_layer, seed):
        model = GPT(GPTConfig(IDS, 32, n_layer=n_layer, n_head=2, d_model=16, tie_embeddings=False))
        params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))['params']
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params)
        # Of whatever is read: the final bias points along the heads of ids that are no tokens.
        direction = np.ones(16, np.float32)
        params['ln_f']['bias'] = params['ln_f']['bias'] + 2 * direction
        is_token = np.pad(Holes().is_token(IDS), (0, params['lm_head'].shape[0] - IDS))
        params['lm_head'] = params['lm_head'] + np.where(is_token, 0, 1)[:, None] * direction
        return model, params

    (model, params), (draft, draft_params) = model_of(1, 0), model_of(1, 1)
    return types.SimpleNamespace(
        model=model,
        params=params,
        engine=Engine(model, params, tokenizer=Holes()),
        bare=Engine(model, params),
        draft=Engine(draft, draft_params, tokenizer=Holes()),
        bare_draft=Engine(draft, draft_params),
    )


def strategies(padded):
    return {
        'greedy': (GREEDY, None),
        'sample': (Sampling(), None),
        'top_k beyond all tokens': (Sampling(top_k=30), None),
        'all filters': (Sampling(top_k=20, top_p=0.9, min_p=0.01, typical_p=0.95, temperature=3.0), None),
        'processors': (Sampling(repetition_penalty=2.0, no_repeat_ngram_size=1, min_new_tokens=3), None),
        'best of': (Sampling(), BestOf(3)),
        'beams': (GREEDY, Beams(4, num_return_sequences=4)),
        'more beams than tokens': (GREEDY, Beams(14, num_return_sequences=14)),
        'groups of beams': (GREEDY, Beams(4, num_beam_groups=2, diversity_penalty=5.0, num_return_sequences=4)),
        'contrastive': (GREEDY, Contrastive(0.6, 4)),
        'more candidates than tokens': (GREEDY, Contrastive(0.9, 30)),
        'lookup': (GREEDY, Speculative(3, ngram=1)),
        'drafts': (Sampling(), Speculative(3, padded and padded.draft)),
        'drafts of anything': (Sampling(temperature=2.0), Speculative(3, padded and padded.bare_draft)),
    }


QUICK = ('all filters', 'groups of beams', 'more candidates than tokens', 'drafts of anything')


@pytest.mark.parametrize(
    'name', [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in strategies(None)]
)
def test_only_tokens_are_written_by_any_strategy(padded, name):
    is_token = Holes().is_token(IDS)
    # An id that is no token in the prompt as well: prompt lookup drafts it.
    prompts, stopping = [[1, 30, 1], [7]], StoppingCriteria(8, NEVER)
    sampling, strategy = strategies(padded)[name]
    for generations in generate(padded.engine, prompts, sampling, stopping, strategy=strategy):
        for generation in generations:
            assert all(is_token[token] for token in generation.tokens)
            assert all(np.isfinite(generation.logprobs))


def test_the_model_would_write_other_ids_were_they_not_kept_from_it(padded):
    ((free,),) = generate(padded.bare, [[1]], GREEDY, StoppingCriteria(8, NEVER))
    assert not any(Holes().is_token(IDS)[token] for token in free.tokens)


def test_probabilities_are_those_among_tokens(padded):
    ((found,),) = generate(padded.engine, [[1, 2]], GREEDY, StoppingCriteria(1, NEVER))
    logits = np.asarray(padded.model.apply({'params': padded.params}, jnp.array([[1, 2]])))[0, -1].astype(np.float64)
    kept = np.where(Holes().is_token(IDS), logits, -np.inf)
    assert found.tokens == [int(kept.argmax())]
    assert found.logprobs[0] == pytest.approx(kept.max() - np.log(np.exp(kept).sum()), abs=1e-4)


def test_a_vocabulary_without_holes_has_the_programs_and_bits_of_before(padded):
    everything = types.SimpleNamespace(is_token=lambda size: np.ones(size, bool))
    engine = Engine(padded.model, padded.params, tokenizer=everything)
    assert jax.tree.structure(engine.params) == jax.tree.structure(padded.bare.params)
    with_it, without = (generate(e, [[1]], Sampling(), StoppingCriteria(8, NEVER)) for e in (engine, padded.bare))
    assert with_it == without


def test_a_preview_is_text_of_tokens(padded):
    tokenizer = train_char(['abcdef'])
    settings = {'prompt': 'ab', 'max_new_tokens': 12, 'temperature': 2.0, 'top_k': 0}
    text = sample_text(padded.model, padded.params, tokenizer, seed=2**32 - 1, **settings)
    assert text.startswith('ab')
    assert set(text.replace('<|unknown|>', '').replace('<|endoftext|>', '')) <= set('abcdef')


def test_the_debugger_offers_and_takes_tokens_alone(padded):
    tokenizer = train_char(['abcdef'])
    inspector = ModelInspector(padded.model, padded.params, tokenizer)
    debugger = Debugger(inspector, tokenizer, tokenizer.encode('ab'), 8)
    state, reply = debugger.start(GREEDY)
    state, reply = debugger.respond(dataclasses.replace(state, top=50), 'show')
    assert len([row for row in reply[-1].rows if row[3]]) == tokenizer.vocab_size
    assert 'must be a whole number, 1 to 8' in debugger.respond(state, 'pick 9')[1][0]
    assert '0 to 7' in debugger.respond(state, 'force #8')[1][0]
    state, _ = debugger.respond(state, 'run')
    assert all(taken.token < tokenizer.vocab_size for taken in state.taken)
    assert debugger.respond(state, 'lens')[1][-1].rows


@pytest.mark.parametrize('ends', [(11, 5, 22)])
def test_each_of_several_ends_of_text_ends_one(padded, ends):
    plain, stopping = StoppingCriteria(25, NEVER), StoppingCriteria(25, NEVER, eos_token_ids=ends)
    for seed in range(3):
        ((whole,),) = generate(padded.engine, [[1]], Sampling(), plain, seed=seed)
        place = next((place for place, token in enumerate(whole.tokens) if token in ends), None)
        for strategy in (None, BestOf(1)):
            ((ended,),) = generate(padded.engine, [[1]], Sampling(), stopping, seed=seed, strategy=strategy)
            assert ended.tokens == whole.tokens[:place]
            assert ended.finish_reason == ('length' if place is None else 'stop')
    put_off = dataclasses.replace(GREEDY, min_new_tokens=10)
    for strategy in (None, Beams(3)):
        ((ended,),) = generate(padded.engine, [[1]], put_off, stopping, strategy=strategy)
        assert len(ended.tokens) >= 10
        assert not set(ended.tokens) & set(ends)


def test_a_checkpoints_own_ends_count_where_they_are_tokens():
    tokenizer = train_char(['ab'])
    loaded = types.SimpleNamespace(
        tokenizer=tokenizer, model=types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=10))
    )
    for stated, ends in (((), (3,)), ((1, 3), (1, 3)), ((50256,), (3,)), ((1, 50256, -1), (1,)), ((7,), (3,))):
        loaded.eos_token_ids = stated
        assert StoppingCriteria.of(loaded, 5).ends == ends


def test_a_tokenizer_with_holes_is_what_the_engine_is_told(padded):
    document = '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":'
    document += '{"type":"Split","pattern":{"Regex":""},"behavior":"Isolated","invert":false},"post_processor":null,'
    document += '"decoder":{"type":"Fuse"},"model":{"type":"WordLevel","vocab":{"a":3,"<|unknown|>":9,"<|endoftext|>":5'
    tokenizer = Tokenizer.from_json(document + '},"unk_token":"<|unknown|>"}}')
    engine = Engine(padded.model, padded.params, tokenizer=tokenizer)
    ((found,),) = generate(engine, [[3]], Sampling(temperature=5.0), StoppingCriteria(20, NEVER))
    assert set(found.tokens) <= {3, 5, 9}
    assert tokenizer.decode([3, 4, 39, 3]) == 'aa'
