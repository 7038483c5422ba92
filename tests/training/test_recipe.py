import re

import pytest

from gpt_jax.config import as_dict
from gpt_jax.errors import InputError
from gpt_jax.models import PRESETS
from gpt_jax.training import recipe_values, resolve
from gpt_jax.training.recipe import facts, notes, provenance

# GPT-3 (2020), table 2.1: learning rate, and the batch as tokens are rounded there, in tokens of 2048-token sequences.
TABLE = {
    '125m': (6.0e-4, 0.5e6),
    '350m': (3.0e-4, 0.5e6),
    '760m': (2.5e-4, 0.5e6),
    '1.3b': (2.0e-4, 1e6),
    '2.7b': (1.6e-4, 1e6),
    '6.7b': (1.2e-4, 2e6),
    '13b': (1.0e-4, 2e6),
    '175b': (0.6e-4, 3.2e6),
}
VERSIONS = [('gpt2', None), ('gpt3', None), *(('gpt3', name) for name in PRESETS if name.startswith('gpt3-'))]


@pytest.mark.parametrize('size', TABLE)
def test_gpt3_takes_learning_rate_and_batch_from_the_papers_table(size):
    learning_rate, batch_tokens = TABLE[size]
    values = recipe_values('gpt3', f'gpt3-{size}')
    assert values['optimizer.learning_rate'].value == learning_rate
    assert values['train.batch_size'].value * 2048 == pytest.approx(batch_tokens, rel=0.05)
    assert values['optimizer.learning_rate'].source == values['train.batch_size'].source == 'paper: GPT-3, table 2.1'


@pytest.mark.parametrize('size', TABLE)
def test_gpt3_takes_the_rest_from_appendix_b(size):
    values = {key: value.value for key, value in recipe_values('gpt3', f'gpt3-{size}').items()}
    del values['optimizer.learning_rate'], values['train.batch_size']
    assert values == {
        'model.attention_pattern': 'alternating',
        'model.dropout': 0.0,
        'optimizer.beta1': 0.9,
        'optimizer.beta2': 0.95,
        'optimizer.epsilon': 1e-8,
        'optimizer.weight_decay': 0.1,
        'optimizer.clip_norm': 1.0,
        'schedule.warmup_tokens': 375e6,
        'schedule.decay_tokens': 260e9,
        'schedule.final_fraction': 0.1,
    }


def test_gpt2_takes_its_batch_from_the_paper_and_the_rest_from_gpt1():
    values = recipe_values('gpt2')
    assert {key: value.value for key, value in values.items()} == {
        'model.attention_pattern': 'dense',
        'model.dropout': 0.1,
        'optimizer.learning_rate': 2.5e-4,
        'optimizer.beta1': 0.9,
        'optimizer.beta2': 0.999,
        'optimizer.epsilon': 1e-8,
        'optimizer.weight_decay': 0.01,
        'optimizer.clip_norm': 1.0,
        'schedule.warmup_steps': 2000,
        'schedule.final_fraction': 0.0,
        'train.batch_size': 512,
    }
    published = [key for key, value in values.items() if value.source.startswith('paper')]
    assert published == ['model.attention_pattern', 'train.batch_size']


@pytest.mark.parametrize(('version', 'preset'), VERSIONS)
def test_every_value_has_a_source_that_says_whether_it_is_assumed(version, preset):
    for key, value in (recipe_values(version, preset) | facts(version, preset)).items():
        assert re.match(r'(paper|assumed): \S', value.source), key


@pytest.mark.parametrize(
    ('preset', 'row'),
    [(None, '125m'), ('gpt3-ada', '125m'), ('gpt3-babbage', '350m'), ('gpt3-curie', '2.7b'), ('gpt3-davinci', '175b')],
)
def test_a_size_that_the_paper_does_not_have_takes_the_nearest_row_and_says_so(preset, row):
    values = recipe_values('gpt3', preset)
    assert (values['optimizer.learning_rate'].value, values['train.batch_size'].value) == (
        TABLE[row][0],
        recipe_values('gpt3', f'gpt3-{row}')['train.batch_size'].value,
    )
    assert values['train.batch_size'].source.startswith('assumed')


def test_a_size_of_another_version_or_an_unknown_version_is_refused():
    with pytest.raises(InputError, match=r"model\.preset='gpt2-small' is not a size of GPT-3"):
        recipe_values('gpt3', 'gpt2-small')
    with pytest.raises(InputError, match=r"model\.version='gpt5' must be gpt2 or gpt3"):
        recipe_values('gpt5')


def test_the_batch_ramps_from_32k_tokens_over_4_to_12_billion_the_longer_the_larger_the_batch():
    rows = [facts('gpt3', f'gpt3-{size}') for size in TABLE]
    assert {row['ramp_first_tokens'].value for row in rows} == {32_000}
    lengths = [row['ramp_tokens'].value for row in rows]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (4e9, 12e9)
    assert all(row['ramp_tokens'].source.startswith('assumed: GPT-3, appendix B') for row in rows)


def test_gpt3_trains_on_300_billion_tokens_of_2048_and_its_bands_are_assumed():
    values = facts('gpt3', 'gpt3-175b')
    assert (values['training_tokens'].value, values['context'].value, values['band_size'].value) == (300e9, 2048, 256)
    assert values['band_size'].source.startswith('assumed')
    assert facts('gpt2')['training_tokens'].value is None


def test_the_two_rows_that_contradict_themselves_and_the_tiers_are_explained():
    assert '24 x 128 = 3072' in notes('gpt3-1.3b')[0]
    assert '40 x 128 = 5120' in notes('gpt3-13b')[0]
    assert 'gpt3-2.7b' in notes('gpt3-curie')[0]
    silent = [name for name in PRESETS if not notes(name)]
    assert len(silent) == 4 + 8 - 2  # GPT-2's four, and the six rows that hold


def test_what_an_experiment_changes_is_marked_with_what_the_recipe_has(tiny_config):
    config = tiny_config({'model.version': 'gpt3', 'optimizer.learning_rate': 1e-3})
    found = provenance(as_dict(resolve(config)))
    assert found['optimizer.beta2'].source == 'paper: GPT-3, appendix B'
    assert found['optimizer.learning_rate'].value == 1e-3
    assert found['optimizer.learning_rate'].source.startswith('set by the config; learning_rate=0.0006 (')
    # Another key of the same length stands in the recipe's place.
    assert 'schedule.warmup_tokens' not in found
    assert found['schedule.warmup_steps'].value == 2
    assert 'warmup_tokens=375,000,000 (paper: GPT-3, appendix B)' in found['schedule.warmup_steps'].source
