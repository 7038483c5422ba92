import pytest

from gpt_jax.data.layout import splits
from gpt_jax.errors import InputError

WIKITEXT = [
    f'wikitext-{n}/{split}-00000-of-00001.parquet' for n in (2, 103) for split in ('train', 'validation', 'test')
]


def of(files, config=None, card=()):
    return splits(files, card, config, 'data.corpus=x')


@pytest.mark.parametrize(
    ('files', 'config', 'expected'),
    [
        (['data/train-0.parquet', 'data/test-0.parquet'], None, {'train': ['data/train-0.parquet']}),
        (['b.parquet', 'a.parquet', 'README.md'], None, {'train': ['a.parquet', 'b.parquet']}),
        (['plain_text/train/0000.parquet'], None, {'train': ['plain_text/train/0000.parquet']}),
        (['plain_text/train/0000.parquet'], 'plain_text', {'train': ['plain_text/train/0000.parquet']}),
        (['d/partial-train/0.parquet'], 'd', {'train': ['d/partial-train/0.parquet']}),
        (
            ['train/0.parquet', 'valid/0.parquet', 'test/0.parquet'],
            None,
            {'train': ['train/0.parquet'], 'validation': ['valid/0.parquet']},
        ),
        (
            WIKITEXT,
            'wikitext-103',
            {
                'train': ['wikitext-103/train-00000-of-00001.parquet'],
                'validation': ['wikitext-103/validation-00000-of-00001.parquet'],
            },
        ),
        (['a/trained-models.parquet', 'a/x.parquet'], 'a', {'train': ['a/trained-models.parquet', 'a/x.parquet']}),
        (['default/train/0.parquet', 'other/train/0.parquet'], None, {'train': ['default/train/0.parquet']}),
        (['train.csv'], None, {}),
    ],
)
def test_without_a_card_names_tell_the_splits(files, config, expected):
    assert of(files, config) == expected


CARD = [
    {'config_name': 'small', 'data_files': 'sample/10BT/*'},
    {'config_name': 'large', 'default': True, 'data_files': [{'split': 'train', 'path': ['data/a/*', 'data/b/*']}]},
    {'config_name': 'both', 'data_files': [{'split': 'train', 'path': 'x/t*'}, {'split': 'dev', 'path': 'x/d*'}]},
    {'config_name': 'folder', 'data_dir': 'x'},
]
FILES = [
    'sample/10BT/0.parquet',
    'data/a/0.parquet',
    'data/b/1.parquet',
    'data/c/2.parquet',
    'x/t.parquet',
    'x/d.parquet',
]


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        ('small', {'train': ['sample/10BT/0.parquet']}),
        (None, {'train': ['data/a/0.parquet', 'data/b/1.parquet']}),
        ('both', {'train': ['x/t.parquet'], 'validation': ['x/d.parquet']}),
        ('folder', {'train': ['x/d.parquet', 'x/t.parquet']}),
    ],
)
def test_a_card_tells_configs_and_their_files(config, expected):
    assert of(FILES, config, CARD) == expected


@pytest.mark.parametrize(
    ('files', 'config', 'card', 'says'),
    [
        (WIKITEXT, None, (), 'several configs'),
        (WIKITEXT, 'wikitext-1', (), "no config 'wikitext-1'"),
        (FILES, None, CARD[::2], 'several configs'),
        (FILES, 'none', CARD, "no config 'none'"),
    ],
)
def test_a_config_that_is_unknown_or_not_chosen_is_refused_with_the_known_ones(files, config, card, says):
    with pytest.raises(InputError, match=says) as caught:
        of(files, config, card)
    assert any(name in str(caught.value) for name in ('wikitext-103', 'small'))
