"""Filters, searches and draws against `transformers`: its logits processors, and its `generate`."""

import dataclasses
import functools
import itertools

import pytest

REASON = "compares with transformers: pip install -e '.[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
transformers = pytest.importorskip('transformers', reason=REASON)

import hypothesis  # noqa: E402
import hypothesis.extra.numpy  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from scipy import stats  # noqa: E402
from transformers import generation  # noqa: E402

from gpt_jax import inference  # noqa: E402
from gpt_jax.inference import Beams, Engine, Sampling, StoppingCriteria, filters  # noqa: E402
from gpt_jax.models import GPT  # noqa: E402

VOCAB, END = 24, 23
GREEDY = Sampling(greedy=True)
# No two are equal, so that the order is sure; distances well above rounding.
LOGITS = st.permutations(range(-40, 8)).map(lambda order: np.array(order[:VOCAB], np.float32) / 5)
TEXT = hypothesis.extra.numpy.arrays(np.int32, st.integers(1, 12), elements=st.integers(0, 4))
PERCENT = st.integers(1, 99).map(lambda percent: percent / 100)
many_examples = hypothesis.settings(max_examples=100, deadline=None)


@functools.cache
def program(used):
    """All filters of a chain as one compiled function; a chain's numbers are arguments."""
    return jax.jit(lambda chain, logits, *text: chain.warp(chain.process(logits, *text)))


def ours(sampling, logits, text=(0,), new=0):
    """Filtered logits; texts are padded to one length, as in decoding."""
    padded = np.full((1, 16), 99, np.int32)
    padded[0, : len(text)] = text
    chain = sampling.chain(VOCAB, END)
    arguments = (logits[None], padded, np.array([len(text)], np.int32), np.array([new], np.int32))
    return np.asarray(program(chain.used)(chain, *arguments))[0]


def theirs(processors, logits, text=(0,)):
    processors = generation.LogitsProcessorList(processors)
    return processors(torch.tensor([list(map(int, text))]), torch.from_numpy(logits[None])).numpy()[0]


def agree(found, expected):
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@many_examples
@hypothesis.given(LOGITS, st.integers(1, 30))
def test_top_k_keeps_what_transformers_keeps(logits, top_k):
    agree(ours(Sampling(top_k=top_k), logits), theirs([generation.TopKLogitsWarper(top_k)], logits))


@many_examples
@hypothesis.given(LOGITS, PERCENT)
def test_top_p_keeps_what_transformers_keeps(logits, top_p):
    sums = np.cumsum(np.sort(np.exp(logits - logits.max()).astype(np.float64))[::-1])
    hypothesis.assume(np.abs(sums / sums[-1] - top_p).min() > 1e-5)
    agree(ours(Sampling(top_p=top_p), logits), theirs([generation.TopPLogitsWarper(top_p)], logits))


@many_examples
@hypothesis.given(LOGITS, PERCENT)
def test_min_p_keeps_what_transformers_keeps(logits, min_p):
    hypothesis.assume(np.abs(np.exp(logits - logits.max()) - min_p).min() > 1e-5)
    agree(ours(Sampling(min_p=min_p), logits), theirs([generation.MinPLogitsWarper(min_p)], logits))


@many_examples
@hypothesis.given(LOGITS, PERCENT)
def test_typical_p_keeps_what_transformers_keeps(logits, typical_p):
    logprobs = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    distances = np.abs(logprobs - (np.exp(logprobs) * logprobs).sum())
    order = np.argsort(distances)
    hypothesis.assume(np.diff(distances[order]).min() > 1e-4)
    hypothesis.assume(np.abs(np.cumsum(np.exp(logprobs[order])) - typical_p).min() > 1e-5)
    agree(ours(Sampling(typical_p=typical_p), logits), theirs([generation.TypicalLogitsWarper(typical_p)], logits))


@many_examples
@hypothesis.given(LOGITS, TEXT, st.integers(5, 20).map(lambda tenths: tenths / 10))
def test_the_repetition_penalty_is_that_of_transformers(logits, text, penalty):
    processor = generation.RepetitionPenaltyLogitsProcessor(penalty)
    agree(ours(Sampling(repetition_penalty=penalty), logits, text), theirs([processor], logits, text))


@many_examples
@hypothesis.given(LOGITS, TEXT, st.integers(1, 4))
def test_ngrams_are_banned_as_in_transformers(logits, text, size):
    processor = generation.NoRepeatNGramLogitsProcessor(size)
    agree(
        np.asarray(
            jax.jit(filters.ban_repeated_ngrams, static_argnums=3)(
                logits[None], np.pad(text, (0, 16 - len(text)))[None], np.array([len(text)]), size
            )
        )[0],
        theirs([processor], logits, text),
    )


@many_examples
@hypothesis.given(LOGITS, TEXT, st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=4))
def test_words_are_banned_as_in_transformers(logits, text, words):
    processor = generation.NoBadWordsLogitsProcessor(words, END)
    agree(ours(Sampling(bad_words_ids=tuple(map(tuple, words))), logits, text), theirs([processor], logits, text))


@pytest.mark.parametrize('new', [0, 3, 4])
def test_the_end_is_put_off_as_in_transformers(new):
    logits, text = np.arange(VOCAB, dtype=np.float32), range(5 + new)
    processor = generation.MinNewTokensLengthLogitsProcessor(5, 4, END)
    agree(ours(Sampling(min_new_tokens=4), logits, text, new), theirs([processor], logits, text))


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """A random model of transformers, and ours with the same weights."""
    from gpt_jax.models import huggingface

    peer = peers.gpt2(vocab_size=VOCAB, n_positions=64)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.mul_(2)  # likely and unlikely tokens, so that filters and beams have something to choose from
    folder = tmp_path_factory.mktemp('peer')
    peer.save_pretrained(folder)
    config, params = huggingface.load(folder)
    return peer, Engine(GPT(config), params)


PROMPTS = [[5, 17, 2], [3, 3, 14, 15, 9, 2, 6, 5, 3, 5, 8], [1]]
FILTERS = {
    'repetition_penalty': 1.3,
    'no_repeat_ngram_size': 3,
    'bad_words_ids': [[7], [2, 6]],
    'min_new_tokens': 4,
}


def generate(peer, prompt, end, count=16, **settings):
    """(new tokens up to the end, score or None) of each sequence that transformers returns."""
    made = peer.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        eos_token_id=end,
        pad_token_id=end,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    texts = [row[len(prompt) :].tolist() for row in made.sequences]
    texts = [text[: text.index(end)] if end in text else text for text in texts]
    return texts, getattr(made, 'sequences_scores', None)


def ends(peer):
    """A token that greedy text reaches late, one that it reaches early, and one that it does not."""
    (text,), _ = generate(peer, PROMPTS[0], -1)
    return sorted(set(text), key=text.index)[-1], text[2], next(t for t in range(VOCAB) if t not in text)


@pytest.mark.parametrize('filtered', [False, True])
def test_greedy_texts_are_those_of_transformers_token_for_token(pair, filtered):
    peer, engine = pair
    settings = FILTERS if filtered else {}
    compared = set()
    for end in ends(peer):
        found = inference.generate(engine, PROMPTS, Sampling(greedy=True, **settings), StoppingCriteria(16, end))
        for prompt, (result,) in zip(PROMPTS, found, strict=True):
            expected, _ = generate(peer, prompt, end, **settings)
            assert result.tokens == expected[0]
            compared.add(len(result.tokens))
    assert len(compared) > 2
    print(f'\nfidelity: | greedy text{", filtered" * filtered} | GPT2LMHeadModel.generate | identical | identical |')


@pytest.mark.slow
@pytest.mark.parametrize('num_beams', [2, 4])
def test_beam_searches_are_those_of_transformers_token_for_token(pair, num_beams, fidelity):
    peer, engine = pair
    worst, lengths, rotating = 0.0, set(), itertools.cycle(ends(peer))
    for length_penalty, early_stopping in itertools.product((0.0, 1.0, 2.0, -1.0), (False, True, 'never')):
        end = next(rotating)
        beams = Beams(num_beams, length_penalty, early_stopping, num_return_sequences=num_beams)
        settings = dataclasses.asdict(beams)
        del settings['num_beam_groups'], settings['diversity_penalty']
        found = inference.generate(engine, PROMPTS, GREEDY, StoppingCriteria(16, end), strategy=beams)
        for prompt, results in zip(PROMPTS, found, strict=True):
            texts, scores = generate(peer, prompt, end, **settings)
            assert [result.tokens for result in results] == texts, (beams, end)
            errors = np.abs(scores.numpy() - [result.score for result in results]) / np.maximum(1, np.abs(scores))
            worst = max(worst, float(errors.max()))
            lengths |= {len(text) for text in texts}
    assert len(lengths) > 3
    print(f'\nfidelity: | texts of {num_beams} beams | GPT2LMHeadModel.generate | identical | identical |')
    fidelity(f'scores of {num_beams} beams, relative', 'GPT2LMHeadModel.generate', worst, 1e-5)


@pytest.mark.slow
def test_filtered_beam_searches_are_those_of_transformers_token_for_token(pair):
    peer, engine = pair
    for end in ends(peer):
        beams, sampling = Beams(3, num_return_sequences=3), Sampling(greedy=True, **FILTERS)
        found = inference.generate(engine, PROMPTS, sampling, StoppingCriteria(16, end), strategy=beams)
        for prompt, results in zip(PROMPTS, found, strict=True):
            texts, _ = generate(peer, prompt, end, num_beams=3, num_return_sequences=3, **FILTERS)
            assert [result.tokens for result in results] == texts
    print('\nfidelity: | texts of 3 beams, filtered | GPT2LMHeadModel.generate | identical | identical |')


def test_draws_follow_the_distribution_of_transformers(pair):
    peer, engine = pair
    count, prompt = 4096, PROMPTS[1]
    warpers = [
        generation.RepetitionPenaltyLogitsProcessor(1.3),
        generation.TemperatureLogitsWarper(1.4),
        generation.TopKLogitsWarper(18),
        generation.TopPLogitsWarper(0.95),
        generation.MinPLogitsWarper(0.02),
    ]
    with torch.no_grad():
        logits = peer(torch.tensor([prompt])).logits[0, -1].numpy()
    expected = torch.softmax(torch.from_numpy(theirs(warpers, logits, prompt)).double(), -1).numpy()
    sampling = Sampling(temperature=1.4, top_k=18, top_p=0.95, min_p=0.02, repetition_penalty=1.3)
    (results,) = inference.generate(
        engine, [prompt], sampling, StoppingCriteria(1, -1), num_samples=count, seed=1, batch_size=count
    )
    observed = np.bincount([result.tokens[0] for result in results], minlength=VOCAB)
    assert observed[expected == 0].sum() == 0
    assert (expected > 0).sum() > 4
    p_value = stats.chisquare(observed[expected > 0], count * expected[expected > 0]).pvalue
    assert p_value > 1e-3
    print(f"\nfidelity: | {count} draws, chi-square: p-value | transformers' processors | {p_value:.2f} | 0.001 |")
