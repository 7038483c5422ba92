"""Prepared data in a bucket: made here, kept there, read through a local copy."""

import dataclasses
import json

import numpy as np
import pytest

from gpt_jax.data import DataConfig, corpus, parts, prepare, shards, shared
from gpt_jax.errors import InputError

CACHE = 'gs://bucket/data'


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function: from here on this is another machine, with caches of its own."""

    def become(name):
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / name))

    become('first')
    return become


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Text in some parts, as `DataConfig`."""
    monkeypatch.setattr(corpus, 'PART_BYTES', 2000)
    path = tmp_path / 'text.txt'
    path.write_text(
        ''.join(f'Paragraph {i} of a text in which there are some.\n\n' for i in range(200)), encoding='utf-8'
    )
    return DataConfig('text', str(path), documents='block', tokenizer='char', cache_dir=CACHE, num_workers=1)


def one(data):
    (prepared,) = data.prepared.values()
    return prepared


def assert_same(prepared, expected):
    assert prepared.fingerprint == expected.fingerprint
    for split in ('train', 'validation'):
        np.testing.assert_array_equal(getattr(prepared, split)[:], getattr(expected, split)[:])
    assert prepared.train_bytes == expected.train_bytes


def test_what_one_machine_prepared_another_fetches_once(bucket, machine, config, tmp_path):
    expected = one(prepare(dataclasses.replace(config, cache_dir=str(tmp_path / 'local')), log=str))
    assert_same(one(prepare(config, log=str)), expected)
    folder = f'data/{expected.folder.name}'
    there = {name.removeprefix(f'{folder}/') for name in bucket.names(folder)}
    made = {path.relative_to(expected.folder).as_posix() for path in expected.folder.rglob('*') if path.is_file()}
    assert there == {name for name in made if not name.endswith('.lock')}
    machine('second')
    writes, lines = [], []
    bucket.fails = lambda method, url: writes.append(url) if method == 'POST' else None
    prepared = one(prepare(config, log=lines.append))
    assert_same(prepared, expected)
    assert writes == []
    count = len(prepared.train.shards) + len(prepared.validation.shards)
    assert count > 4
    assert any(f'fetching {count} of {count} shards' in line for line in lines)
    assert lines[-1] == f'data: reused from {CACHE}/{expected.folder.name}'
    assert str(prepared.folder).startswith(str(tmp_path / 'second'))
    reads = []
    bucket.fails = lambda method, url: reads.append(url) if url.endswith('.bin') or '.bin?' in url else None
    assert_same(one(prepare(config, log=str)), expected)
    assert reads == []
    folder = shared.local_folder(f'{CACHE}/{expected.folder.name}', '--inspect=x', str)
    assert any('every sha256 verified' in line for line in shards.inspect(folder))


def test_machines_share_the_parts(bucket, machine, config, monkeypatch, tmp_path):
    """Two in turn, each its piece, and the one that finishes last completes the data."""
    expected = one(prepare(dataclasses.replace(config, cache_dir=str(tmp_path / 'local')), log=str))
    assert prepare(config, log=str, piece=(1, 2)) is None
    made, build = [], parts._write_part
    monkeypatch.setattr(parts, '_write_part', lambda job, *rest: (made.append(job.number), build(job, *rest)))
    machine('second')
    prepared = one(prepare(config, log=str))  # the other piece, and nothing twice
    assert_same(prepared, expected)
    numbers = sorted(int(name[-10:-5]) for name in bucket.names() if '/parts/' in name)
    assert sorted(made) == numbers[1::2]
    machine('first')
    assert_same(one(prepare(config, log=str, piece=(1, 2))), expected)


def test_what_a_killed_machine_finished_is_kept(bucket, machine, config, tmp_path):
    """It uploads what it had not, and makes the rest."""
    expected = one(prepare(dataclasses.replace(config, cache_dir=str(tmp_path / 'local')), log=str))
    posted = []

    def break_down(method, url):
        posted.extend([url] if method == 'POST' else [])
        return 403 if method == 'POST' and len(posted) > 7 else None

    bucket.fails = break_down
    with pytest.raises(InputError, match='Forbidden'):
        prepare(config, log=str)
    finished = [name for name in bucket.names() if '/parts/' in name]
    assert finished
    bucket.fails = lambda method, url: None
    assert_same(one(prepare(config, log=str)), expected)


def test_damage_there_is_named(bucket, machine, config):
    prepare(config, log=str)
    name = next(name for name in bucket.names() if name.endswith('.bin'))
    data = bytearray(bucket.read(name))
    data[-1] ^= 1
    bucket.write(name, bytes(data))
    machine('second')
    with pytest.raises(
        InputError, match=rf'gs://bucket/{name} is damaged; remove gs://bucket/data/\S+ to prepare it anew'
    ):
        prepare(config, log=str)
    machine('third')
    manifest = name.rpartition('/')[0] + '/manifest.json'
    bucket.write(manifest, json.dumps({'format': 2}).encode())
    with pytest.raises(InputError, match=rf'gs://bucket/{manifest}: damaged'):
        prepare(config, log=str)


def test_of_two_tokenizers_the_first_one_is_that_of_all(bucket, machine, config, tmp_path):
    """Another machine has learned one while this one learned its own."""
    folder = shared.SharedFolder(tmp_path / 'name', config.shared_cache)
    folder.folder.mkdir()
    (folder.folder / 'tokenizer.json').write_bytes(b'mine')
    assert folder.publish_first('tokenizer.json')
    (folder.folder / 'tokenizer.json').write_bytes(b'late')
    assert not folder.publish_first('tokenizer.json')
    assert (folder.folder / 'tokenizer.json').read_bytes() == b'mine'


def test_a_bucket_that_is_not_there_is_one_line(bucket, config):
    config = dataclasses.replace(config, cache_dir='gs://nobody-has-this/data')
    with pytest.raises(InputError, match=r'data\.cache_dir=gs://nobody-has-this/data: there is no bucket'):
        prepare(config, log=str)
