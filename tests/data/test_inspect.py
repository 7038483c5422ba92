import dataclasses
import json

import numpy as np
import pytest

from gpt_jax.data import DataConfig, corpus, prepare, shards
from gpt_jax.data.shards import inspect
from gpt_jax.errors import InputError


def prepare_one(*args, **keys):
    """What `prepare` makes of a single corpus."""
    (prepared,) = prepare(*args, **keys).prepared.values()
    return prepared


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Documents of 1 to 60 characters, one token each, in several shards."""
    monkeypatch.setattr(corpus, 'PART_BYTES', 500)
    path = tmp_path / 'text.txt'
    path.write_text('\n\n'.join('abc'[n % 3] * n for n in range(1, 61)))
    config = DataConfig('text', str(path), documents='block', tokenizer='char', cache_dir=str(tmp_path / 'cache'))
    return prepare_one(dataclasses.replace(config, validation_fraction=0.2), log=lambda line: None)


def test_the_report_tells_counts_vocabulary_lengths_and_windows(prepared, monkeypatch):
    monkeypatch.setattr(shards, 'STRETCH', 37)  # documents go over its ends
    lines = list(inspect(prepared.folder))
    text = '\n'.join(lines)
    for split, tokens in (('train', prepared.train), ('validation', prepared.validation)):
        assert f'{split}: {tokens.documents} documents, {len(tokens):,} tokens, ' in text
    assert '  vocabulary: 4 of 5 tokens are used (80.0%)' in lines  # all but the unknown one
    counted = {}
    start = lines.index('  documents by their tokens:') + 1
    for line in lines[start:]:
        if ' to ' not in line:
            break
        low, _, high, count, *_ = line.replace(',', '').split()
        counted[int(low), int(high)] = int(count)
    ends = np.flatnonzero(prepared.train[:] == prepared.tokenizer.end_of_text)
    lengths = np.diff(ends, prepend=-1) - 1
    assert sum(counted.values()) == len(lengths) == prepared.train.documents
    for (low, high), count in counted.items():
        assert count == np.count_nonzero((lengths >= low) & (lengths <= high))
    first = prepared.tokenizer.decode(prepared.train[:48])
    assert f'  tokens 0 on: {first!r}' in lines


def test_a_damaged_shard_is_found_though_its_time_is_the_old_one(prepared):
    import os

    path = prepared.train.shards[1].path
    time = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(time, time))
    with pytest.raises(InputError, match=rf'{path.name}: damaged, the sha256'):
        list(inspect(prepared.folder))


def test_a_folder_that_is_not_finished_is_refused(prepared, tmp_path):
    (prepared.folder / 'manifest.json').unlink()
    for folder in (prepared.folder, tmp_path / 'nowhere'):
        with pytest.raises(InputError, match=r'no finished data there'):
            list(inspect(folder))


def test_replaced_bytes_are_reported(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'ab\xff cd' * 20)
    lines = []
    config = DataConfig('text', str(tmp_path / 'a.txt'), tokenizer='char', cache_dir=str(tmp_path / 'cache'))
    prepared = prepare_one(dataclasses.replace(config, invalid_bytes='replace'), log=lines.append)
    assert any(line.endswith('20 times U+FFFD in the place of invalid bytes') for line in lines)
    assert json.loads((prepared.folder / 'manifest.json').read_text())['replaced_bytes'] == 20
    assert 'invalid bytes: 20 times U+FFFD in their place' in list(inspect(prepared.folder))
