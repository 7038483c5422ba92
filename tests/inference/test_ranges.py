"""Numbers that cannot be meant, and requests that no machine can hold: refused by name, before anything is made."""

import sys
import types

import numpy as np
import pytest

from gpt_jax.errors import InputError
from gpt_jax.inference import (
    Beams,
    BestOf,
    Contrastive,
    Sampling,
    Speculative,
    StoppingCriteria,
    check_settings,
    generate,
)
from gpt_jax.inference.generate import row_keys
from gpt_jax.models import GPT, GPTConfig

NAN, INF = float('nan'), float('inf')
STOPPING, GREEDY = StoppingCriteria(8, 0), Sampling(greedy=True)
OUT_OF_RANGE = [
    *[(Sampling, 'temperature', value) for value in (NAN, INF, 0.0, -1.0, 1e-30, 1e30)],
    *[(Sampling, 'top_k', value) for value in (-1, 2**31, 10**30, 1.5)],
    *[(Sampling, name, value) for name in ('top_p', 'typical_p') for value in (NAN, 0.0, -0.1, 1.1)],
    *[(Sampling, 'min_p', value) for value in (NAN, -0.1, 1.1)],
    *[(Sampling, 'repetition_penalty', value) for value in (NAN, INF, 0.0, -1.0, 1e30)],
    *[(Sampling, name, value) for name in ('no_repeat_ngram_size', 'min_new_tokens') for value in (-1, 2**31)],
    *[(Beams, 'num_beams', value) for value in (0, -1, 100000, 10**12)],
    *[(Beams, 'length_penalty', value) for value in (NAN, INF, 1e30)],
    *[(Beams, 'diversity_penalty', value) for value in (NAN, INF, -1.0, 1e30)],
    *[(BestOf, 'best_of', value) for value in (0, -1, 10**12)],
    *[(Contrastive, 'penalty_alpha', value) for value in (NAN, -0.1, 1.1)],
    *[(Contrastive, 'top_k', value) for value in (0, -1, 10**12)],
    *[(Speculative, 'draft_tokens', value) for value in (0, -1, 10**12)],
    *[(lambda **count: StoppingCriteria(end_of_text=0, **count), 'max_new_tokens', value) for value in (0, -1, 10**12)],
    *[
        (lambda **count: check_settings(Sampling(), STOPPING, **count), name, value)
        for name in ('num_samples', 'batch_size')
        for value in (0, -1, 10**12, 2.5, True)
    ],
    *[(lambda **seed: check_settings(Sampling(), STOPPING, **seed), 'seed', value) for value in (-1, 2**32, 2**64)],
]


@pytest.mark.parametrize(('make', 'name', 'value'), OUT_OF_RANGE)
def test_a_number_out_of_range_is_named(make, name, value):
    with pytest.raises(InputError, match=f'^{name}=') as caught:
        make(**{name: value})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('sampling', 'strategy', 'counts', 'message'),
    [
        (Sampling(min_new_tokens=9), None, {}, 'min_new_tokens=9 exceeds max_new_tokens=8'),
        (GREEDY, BestOf(2), {}, 'best_of=2 with greedy decoding'),
        (Sampling(), Beams(2), {}, 'num_beams=2 with sampling'),
        (Sampling(), Contrastive(), {}, 'contrastive search draws nothing'),
        (GREEDY, Beams(2), {'num_samples': 2}, 'num_samples=2 of a search'),
    ],
)
def test_settings_that_contradict_each_other_are_named(sampling, strategy, counts, message):
    with pytest.raises(InputError, match=message):
        check_settings(sampling, STOPPING, strategy, **counts)


@pytest.fixture
def engine(monkeypatch):
    """An engine without weights, on a machine of 4 GB: what gets past the checks would fail."""
    for name in ('memory_of', 'host_memory'):
        monkeypatch.setattr(sys.modules['gpt_jax.inference.generate'], name, lambda *_: 4 * 10**9)
    config = GPTConfig(50257, 1024, n_layer=12, n_head=12, d_model=768)
    return types.SimpleNamespace(
        model=GPT(config), mesh=None, cache_dtype=np.dtype('float32'), params=None, batch_size=lambda rows: rows
    )


@pytest.mark.parametrize(
    ('sampling', 'strategy', 'stopping', 'counts', 'message'),
    [
        (Sampling(), None, STOPPING, {'num_samples': 10**9}, '1000000000 texts of up to 8 new tokens take'),
        (Sampling(), BestOf(10**9), STOPPING, {}, 'and this machine has 4.0 GB'),
        (
            Sampling(),
            None,
            StoppingCriteria(2**31 - 1, 0, None, True),
            {},
            '1 texts of up to 2147483647 new tokens take',
        ),
        (Sampling(), None, STOPPING, {'num_samples': 10**5, 'batch_size': 10**5}, 'most for the KV cache, and there'),
        (GREEDY, Beams(4096), STOPPING, {}, 'a batch of 4096 texts of 10 tokens takes'),
        (GREEDY, Contrastive(top_k=10**6), STOPPING, {}, 'a batch of 50257 texts'),
    ],
)
def test_what_no_memory_holds_is_refused_with_the_numbers(engine, sampling, strategy, stopping, counts, message):
    with pytest.raises(InputError, match=message) as caught:
        generate(engine, [[1, 2]], sampling, stopping, strategy=strategy, **counts)
    assert 'GB' in str(caught.value)


@pytest.mark.parametrize('token', [-1, 50257, 2**40])
def test_a_prompt_of_ids_that_the_model_has_not_is_refused(engine, token):
    with pytest.raises(InputError, match=f'token {token} of a prompt is not among the 50257'):
        generate(engine, [[1], [3, token]], Sampling(), STOPPING)


def test_a_seed_above_int32_is_one_of_its_own_and_one_below_is_that_of_before():
    import jax

    draws = np.zeros((1, 2), np.int32)
    keys = [np.asarray(jax.random.key_data(row_keys(seed, draws))) for seed in (7, np.uint32(7), np.uint32(2**32 - 1))]
    assert np.array_equal(keys[0], keys[1])
    assert not np.array_equal(keys[0], keys[2])
