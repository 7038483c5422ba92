"""Which files of a dataset are which split and config: the real client's and `datasets`' answers, put to our use."""

import json
import subprocess
import sys

import pytest
from local_hub import Dataset
from small_datasets import card, parquet

# All cases in one process: `datasets` takes seconds to import.
PROGRAM = """
import json, sys
from gpt_jax.data import DataConfig, load_corpus
from gpt_jax.errors import InputError
for corpus in sys.argv[1:]:
    try:
        resolved = load_corpus(DataConfig(corpus)).resolve()
        found = {}
        for split, path, size in resolved.files:
            found.setdefault(split, []).append(path)
        print(json.dumps([found, resolved.format, dict(resolved.options)]))
    except InputError as error:
        print(json.dumps(str(error)))
"""

WIKITEXT = [
    f'wikitext-{n}/{split}-00000-of-00001.parquet' for n in (2, 103) for split in ('train', 'validation', 'test')
]
CARD = [
    {'config_name': 'small', 'data_files': 'sample/10BT/*'},
    {'config_name': 'large', 'default': True, 'data_files': [{'split': 'train', 'path': ['data/a/*', 'data/b/*']}]},
    {'config_name': 'both', 'data_files': [{'split': 'train', 'path': 'x/t*'}, {'split': 'dev', 'path': 'x/d*'}]},
    {'config_name': 'folder', 'data_dir': 'x'},
]
SEMICOLONS = [{'config_name': 'default', 'data_files': 'table.csv', 'sep': ';'}]
FILES = [
    'sample/10BT/0.parquet',
    'data/a/0.parquet',
    'data/b/1.parquet',
    'data/c/2.parquet',
    'x/t.parquet',
    'x/d.parquet',
]

CASES = {
    # Without a card names tell the splits.
    'split-in-name': (
        (['data/train-0.parquet', 'data/test-0.parquet'], None, ()),
        {'train': ['data/train-0.parquet']},
    ),
    'no-split': ((['b.parquet', 'a.parquet', 'README.md'], None, ()), {'train': ['a.parquet', 'b.parquet']}),
    'folder': ((['plain_text/train/0000.parquet'], None, ()), {'train': ['plain_text/train/0000.parquet']}),
    'named-folder': ((['plain_text/train/0.parquet'], 'plain_text', ()), {'train': ['plain_text/train/0.parquet']}),
    'partial': ((['d/partial-train/0.parquet'], 'd', ()), {'train': ['d/partial-train/0.parquet']}),
    'split-folders': (
        (['train/0.parquet', 'valid/0.parquet', 'test/0.parquet'], None, ()),
        {'train': ['train/0.parquet'], 'validation': ['valid/0.parquet']},
    ),
    'one-of-two-folders': (
        (WIKITEXT, 'wikitext-103', ()),
        {
            'train': ['wikitext-103/train-00000-of-00001.parquet'],
            'validation': ['wikitext-103/validation-00000-of-00001.parquet'],
        },
    ),
    'part-of-a-word': (
        (['a/trained-models.parquet', 'a/x.parquet'], 'a', ()),
        {'train': ['a/trained-models.parquet', 'a/x.parquet']},
    ),
    'default-folder': (
        (['default/train/0.parquet', 'other/train/0.parquet'], None, ()),
        {'train': ['default/train/0.parquet']},
    ),
    'csv': ((['train.csv'], None, ()), {'train': ['train.csv']}),
    # A card tells configs and their files.
    'card-small': ((FILES, 'small', CARD), {'train': ['sample/10BT/0.parquet']}),
    'card-default': ((FILES, None, CARD), {'train': ['data/a/0.parquet', 'data/b/1.parquet']}),
    'card-both': ((FILES, 'both', CARD), {'train': ['x/t.parquet'], 'validation': ['x/d.parquet']}),
    'card-folder': ((FILES, 'folder', CARD), {'train': ['x/d.parquet', 'x/t.parquet']}),
    'card-options': ((['table.csv'], None, SEMICOLONS), {'train': ['table.csv']}),
    # What is unknown or not chosen is refused with the known ones.
    'folders-none-chosen': ((WIKITEXT, None, ()), 'several configs'),
    'folders-unknown': ((WIKITEXT, 'wikitext-1', ()), "no config 'wikitext-1'"),
    'card-none-chosen': ((FILES, None, CARD[::2]), 'several configs'),
    'card-unknown': ((FILES, 'none', CARD), "no config 'none'"),
}

pytestmark = pytest.mark.slow


@pytest.fixture
def resolved(hub, environment):
    """Case -> what the program prints of it."""
    addresses = []
    for name, ((files, config, configs), _) in CASES.items():
        content = {path: parquet(['text']) if path.endswith('.parquet') else b'text\n' for path in files}
        configs = list(configs)
        if configs:
            content['README.md'] = card(configs)
        hub.datasets[f'me/{name}'] = Dataset({'main': content}, {'configs': configs} if configs else {})
        addresses.append(f'hub:me/{name}' + (f':{config}' if config else ''))
    command = [sys.executable, '-c', PROGRAM, *addresses]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240)
    return dict(zip(CASES, map(json.loads, result.stdout.splitlines()), strict=True))


def test_names_and_cards_tell_splits_and_configs_and_what_is_not_there_is_refused(resolved):
    for name, (_, expected) in CASES.items():
        if isinstance(expected, str):
            assert expected in resolved[name], name
            assert any(known in resolved[name] for known in ('wikitext-103', 'small')), name
        else:
            assert resolved[name][0] == expected, name
    assert resolved['csv'][1:] == ['csv', {}]
    assert resolved['card-options'][1:] == ['csv', {'sep': ';'}]
    assert resolved['card-default'][1:] == ['parquet', {}]
