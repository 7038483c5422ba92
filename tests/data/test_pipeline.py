import dataclasses
import json
import os
import time

import numpy as np
import platformdirs
import pytest

from gpt_jax.data import DataConfig, Tokenizer, load_corpus, prepare, python_docs
from gpt_jax.data.tokenizer import train_char
from gpt_jax.errors import InputError

SHARDS = ['train-00000.bin', 'validation-00001.bin']  # of a running text: each split in parts of its own
FILES = ['manifest.json', 'tokenizer.json', *SHARDS]


def prepare_one(*args, **keys):
    """What `prepare` makes of a single corpus."""
    (prepared,) = prepare(*args, **keys).prepared.values()
    return prepared


def quiet(line):
    assert '\n' not in line


@pytest.fixture
def config(tmp_path, sample_text):
    """A small text file with a cache of its own, not made yet."""
    path = tmp_path / 'text.txt'
    path.write_text(sample_text, encoding='utf-8')
    return DataConfig('text', str(path), vocab_size=300, cache_dir=str(tmp_path / 'cache'))


def folders(config):
    return sorted(os.listdir(config.cache_dir))


def refusal(config):
    with pytest.raises(InputError) as caught:
        prepare_one(config, log=quiet)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_embedded_corpus_comes_back_from_its_shards(prepared_docs):
    _, prepared, _ = prepared_docs
    for split, shard in (('train', prepared.train), ('validation', prepared.validation)):
        documents = list(load_corpus(DataConfig()).documents(split))
        assert prepared.tokenizer.decode(shard[:]) == ''.join(text + '<|endoftext|>' for text in documents)
        assert np.count_nonzero(shard[:] == prepared.tokenizer.end_of_text) == len(documents)
        assert shard[:][-1] == prepared.tokenizer.end_of_text
        size = prepared.train_bytes if split == 'train' else prepared.validation_bytes
        assert size == sum(len(text.encode()) for text in documents)


def test_one_line_is_logged_for_each_stage(prepared_docs):
    _, prepared, lines = prepared_docs
    assert [line.split(':')[0] for line in lines] == ['tokenizer', 'python_docs', 'tokens']
    assert lines[0].startswith('tokenizer: bpe, 512 tokens')
    assert lines[1].endswith(f' {(prepared.train_bytes + prepared.validation_bytes) / 1e6:.1f} MB')


def test_prepared_data_is_reused_without_reading_the_corpus(prepared_docs, monkeypatch):
    cache, first, _ = prepared_docs
    monkeypatch.setattr(python_docs, 'documents', lambda: pytest.fail('the corpus was read'))
    lines = []
    start = time.perf_counter()
    second = prepare_one(DataConfig(vocab_size=512, cache_dir=str(cache)), log=lines.append)
    assert time.perf_counter() - start < 1.0
    assert lines == [f'data: reused from {first.folder}']
    assert (second.fingerprint, second.train_bytes, second.validation_bytes) == (
        first.fingerprint,
        first.train_bytes,
        first.validation_bytes,
    )
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    np.testing.assert_array_equal(second.validation[:], first.validation[:])


def test_folder_holds_shards_and_a_manifest_that_tells_the_counts(config):
    prepared = prepare_one(config, log=quiet)
    assert sorted(os.listdir(prepared.folder)) == [FILES[0], 'parts', 'source.json', *FILES[1:]]
    manifest = json.loads((prepared.folder / 'manifest.json').read_text())
    assert manifest['documents'] == {'train': 1, 'validation': 1}
    assert manifest['tokens'] == {'train': len(prepared.train), 'validation': len(prepared.validation)}
    assert manifest['bytes'] == {'train': prepared.train_bytes, 'validation': prepared.validation_bytes}
    assert manifest['fingerprint'] == prepared.fingerprint


def test_same_data_has_the_same_fingerprint_in_another_cache(config, tmp_path):
    other = dataclasses.replace(config, cache_dir=str(tmp_path / 'other'))
    assert prepare_one(config, log=quiet).fingerprint == prepare_one(other, log=quiet).fingerprint


@pytest.mark.parametrize('change', [{'tokenizer': 'char'}, {'vocab_size': 290}])
def test_another_tokenizer_is_other_data(config, change):
    first = prepare_one(config, log=quiet)
    other = prepare_one(dataclasses.replace(config, **change), log=quiet)
    assert other.fingerprint != first.fingerprint
    assert other.folder != first.folder


def test_changed_text_is_prepared_anew(config, sample_text):
    first = prepare_one(config, log=quiet)
    with open(config.path, 'a', encoding='utf-8') as file:
        file.write('One more line.')
    second = prepare_one(config, log=quiet)
    assert second.fingerprint != first.fingerprint
    assert second.tokenizer.decode(second.validation[:]).endswith('One more line.<|endoftext|>')


def test_char_tokenizer_covers_validation_text_it_never_saw(config):
    with open(config.path, 'a', encoding='utf-8') as file:
        file.write('\u2603')
    prepared = prepare_one(dataclasses.replace(config, tokenizer='char'), log=quiet)
    assert prepared.tokenizer.decode(prepared.validation[:]).endswith('<|unknown|><|endoftext|>')


def test_tokenizer_directory_is_used_and_its_content_is_the_key(config, tmp_path):
    folder = tmp_path / 'tokenizer'
    folder.mkdir()
    train_char(['abcdefg ']).save(folder / 'tokenizer.json')
    config = dataclasses.replace(config, tokenizer=str(folder))
    first = prepare_one(config, log=quiet)
    assert first.tokenizer.fingerprint == Tokenizer.load(folder / 'tokenizer.json').fingerprint
    train_char(['abcdefgh ']).save(folder / 'tokenizer.json')
    assert prepare_one(config, log=quiet).folder != first.folder


def test_a_given_tokenizer_is_used_instead_of_the_configured_one(config):
    given_one = train_char(['abcdefg '])
    prepared = prepare_one(config, given_one, log=quiet)
    assert prepared.tokenizer.fingerprint == given_one.fingerprint
    assert prepare_one(config, log=quiet).tokenizer.fingerprint != given_one.fingerprint
    assert prepare_one(config, given_one, log=quiet).folder == prepared.folder


def test_resuming_with_the_tokenizer_made_here_reuses_its_shards(config):
    first = prepare_one(config, log=quiet)
    lines = []
    assert prepare_one(config, first.tokenizer, log=lines.append).folder == first.folder
    assert lines == [f'data: reused from {first.folder}']
    assert len(folders(config)) == 1


@pytest.mark.parametrize('name', FILES)
def test_deleted_file_is_made_anew(config, name):
    first = prepare_one(config, log=quiet)
    (first.folder / name).unlink()
    second = prepare_one(config, log=quiet)
    assert second.fingerprint == first.fingerprint
    assert folders(config) == [first.folder.name]


@pytest.mark.parametrize('name', FILES)
def test_truncated_file_is_refused_by_name(config, name):
    folder = prepare_one(config, log=quiet).folder
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) - 3])
    assert refusal(config).startswith(f'{folder / name}: ')


@pytest.mark.parametrize(
    'damage', [{'tokens': {'train': 1, 'validation': 1}}, {'bytes': {}}, {'fingerprint': 'x'}, {'bytes': None}]
)
def test_manifest_that_does_not_fit_its_data_is_refused(config, damage):
    folder = prepare_one(config, log=quiet).folder
    manifest = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(json.dumps(manifest | damage))
    message = refusal(config)
    assert message.startswith(str(folder))
    assert 'delete it' in message


def test_exchanged_tokenizer_is_refused(config):
    folder = prepare_one(config, log=quiet).folder
    train_char(['abc']).save(folder / 'tokenizer.json')
    assert refusal(config).startswith(f'{folder / "tokenizer.json"}: not the tokenizer')


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'corpus': 'nope'}, 'data.corpus=nope'),
        ({'path': '/nowhere/x.txt'}, 'data.path=/nowhere/x.txt'),
        ({'tokenizer': 'bpee'}, 'data.tokenizer=bpee'),
        ({'vocab_size': 256}, 'data.vocab_size=256'),
    ],
)
def test_bad_configuration_is_refused_by_key_before_anything_is_written(config, change, says):
    config = dataclasses.replace(config, **change)
    assert says in refusal(config)
    assert not os.path.exists(config.cache_dir)


def test_cache_that_cannot_be_written_is_refused_by_key(config):
    assert 'data.cache_dir=' in refusal(dataclasses.replace(config, cache_dir=config.path))


def test_default_cache_is_in_the_users_cache_folder(config, monkeypatch, tmp_path):
    monkeypatch.setattr(platformdirs, 'user_cache_dir', lambda name: str(tmp_path / name))
    prepared = prepare_one(dataclasses.replace(config, cache_dir=None), log=quiet)
    assert prepared.folder.parent == tmp_path / 'gpt_jax' / 'data'
