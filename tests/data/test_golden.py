"""Data prepared by an older version of this program, before `datasets` read the hub, are used as they are.

tests/golden/data holds what it made of `TEXT`, and of tests/hub's small datasets with `data.vocab_size=300`.
"""

import json
import pathlib
import shutil

import pytest

from gpt_jax.data import DataConfig, load_corpus, prepare

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'data'
TEXT = '\n\n'.join(f'Document {n} is about {"é" * (n % 9)} and the rest.' for n in range(60))


@pytest.fixture
def cache(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / 'cache')


@pytest.fixture
def config(cache, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    return DataConfig(path=str(tmp_path / 'text.txt'), documents='block', vocab_size=300, cache_dir=str(cache))


def only(data):
    (prepared,) = data.prepared.values()
    return prepared


def manifest(folder):
    return json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))


def test_a_folder_of_local_text_is_reused(config, cache):
    lines = []
    prepared = only(prepare(config, log=lines.append))
    folder = cache / 'text-1dbc3dc2899a9682'
    assert lines[-1] == f'data: reused from {folder}'
    assert prepared.fingerprint == manifest(folder)['fingerprint']
    texts = prepared.tokenizer.decode([*prepared.train[:], *prepared.validation[:]]).split('<|endoftext|>')[:-1]
    assert sorted(texts) == sorted(TEXT.split('\n\n'))


def test_a_folder_that_was_not_finished_is_continued(config, cache):
    folder = cache / 'text-1dbc3dc2899a9682'
    expected = manifest(folder)
    shard = (folder / 'train-00000.bin').stat().st_mtime_ns
    (folder / 'manifest.json').unlink()
    only(prepare(config, log=lambda line: None))
    assert manifest(folder)['shards'] == expected['shards']
    assert manifest(folder)['fingerprint'] == expected['fingerprint']
    assert (folder / 'train-00000.bin').stat().st_mtime_ns == shard


def test_a_folder_made_anew_has_the_same_tokens(config, cache, tmp_path):
    shutil.rmtree(cache)
    only(prepare(config, log=lambda line: None))
    made = manifest(cache / 'text-1dbc3dc2899a9682')
    golden = manifest(GOLDEN / 'text-1dbc3dc2899a9682')
    for key in ('corpus_fingerprint', 'documents', 'bytes', 'tokens'):
        assert made[key] == golden[key]
    for split, shards in golden['shards'].items():
        assert [shard['sha256'] for shard in made['shards'][split]] == [shard['sha256'] for shard in shards]


def test_a_folder_of_the_hub_is_reused_without_asking_it(cache, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    lines = []
    prepared = only(prepare(DataConfig('wikitext_103', vocab_size=300, cache_dir=str(cache)), log=lines.append))
    assert lines[-1] == f'data: reused from {cache / "wikitext_103-1cda178f60b4725b"}'
    assert (prepared.train.documents, prepared.validation.documents) == (4, 1)


@pytest.mark.parametrize('name', ['wikitext_103', 'openwebtext_10k'])
def test_the_fingerprint_of_a_hub_corpus_is_the_recorded_one(name):
    (path,) = [*GOLDEN.glob(f'{name}*/manifest.json'), *GOLDEN.glob(f'{name}-manifest.json')]
    golden = json.loads(path.read_text(encoding='utf-8'))
    corpus = load_corpus(DataConfig(name)).resolve(golden['source'])
    assert corpus.fingerprint == golden['corpus_fingerprint']
    assert corpus.split_rule == golden['split']
