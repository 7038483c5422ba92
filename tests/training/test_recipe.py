import re

import pytest

from gpt_jax.errors import InputError
from gpt_jax.models import PRESETS
from gpt_jax.training import recipe

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
    values = recipe('gpt3', f'gpt3-{size}')
    assert values['optimizer.learning_rate'].value == learning_rate
    assert values['train.batch_size'].value * 2048 == pytest.approx(batch_tokens, rel=0.05)
    assert values['optimizer.learning_rate'].source == values['train.batch_size'].source == 'paper: GPT-3, table 2.1'


@pytest.mark.parametrize('size', TABLE)
def test_gpt3_takes_the_rest_from_appendix_b(size):
    values = {key: value.value for key, value in recipe('gpt3', f'gpt3-{size}').items()}
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
    values = recipe('gpt2')
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
    for key, value in recipe(version, preset).items():
        assert re.match(r'(paper|assumed): \S', value.source), key


@pytest.mark.parametrize(
    ('preset', 'row'),
    [(None, '125m'), ('gpt3-ada', '125m'), ('gpt3-babbage', '350m'), ('gpt3-curie', '2.7b'), ('gpt3-davinci', '175b')],
)
def test_a_size_that_the_paper_does_not_have_takes_the_nearest_row_and_says_so(preset, row):
    values = recipe('gpt3', preset)
    assert (values['optimizer.learning_rate'].value, values['train.batch_size'].value) == (
        TABLE[row][0],
        recipe('gpt3', f'gpt3-{row}')['train.batch_size'].value,
    )
    assert values['train.batch_size'].source.startswith('assumed')


def test_a_size_of_another_version_or_an_unknown_version_is_refused():
    with pytest.raises(InputError, match=r"model\.preset='gpt2-small' is not a size of GPT-3"):
        recipe('gpt3', 'gpt2-small')
    with pytest.raises(InputError, match=r"model\.version='gpt5' must be gpt2 or gpt3"):
        recipe('gpt5')
