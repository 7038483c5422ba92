import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from gpt_jax.data import Batches, DataConfig, prepare_sources, prepare_sources_piece
from gpt_jax.data.tokenizer import train_bpe
from gpt_jax.errors import InputError

TEXTS = {'latin.txt': 'lorem ipsum dolor sit amet. ' * 400, 'digits.txt': '31415 92653 58979 32384. ' * 400}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sources')
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def quiet(line):
    pass


@pytest.fixture(scope='module')
def config(folder):
    mixture = f'{folder}/latin.txt:3,{folder}/digits.txt:1'
    return DataConfig(mixture=mixture, tokenizer='bpe', vocab_size=300, cache_dir=str(folder / 'cache'))


@pytest.fixture(scope='module')
def mixed(config):
    return prepare_sources(config, log=quiet)


def test_all_sources_are_in_the_ids_of_one_tokenizer_that_learned_from_each(mixed, folder):
    assert list(mixed.prepared) == [f'{folder}/{name}' for name in TEXTS]
    assert list(mixed.weights.values()) == [Fraction(3, 4), Fraction(1, 4)]
    for (name, text), prepared in zip(TEXTS.items(), mixed.prepared.values(), strict=True):
        assert prepared.tokenizer.fingerprint == mixed.tokenizer.fingerprint
        start = mixed.tokenizer.decode(prepared.train[:20])
        assert text.startswith(start), name
        # Merges of its own words: a tokenizer of the other text alone would give one token a byte.
        assert len(prepared.train) < 0.5 * prepared.train_bytes


def test_the_shared_tokenizer_is_learned_once(config, mixed, folder):
    lines = []
    again = prepare_sources(config, log=lines.append)
    assert again.tokenizer.fingerprint == mixed.tokenizer.fingerprint
    assert again.fingerprint == mixed.fingerprint
    assert [line.split(' from')[0] for line in lines] == ['data: reused', 'data: reused']


def test_each_source_brings_its_share_of_the_rows(mixed):
    batches = Batches(mixed.train, 8, 16, seed=0)
    texts = [mixed.tokenizer.decode(row) for step in range(50) for row in batches.rows(step)['tokens']]
    assert np.mean([any(map(str.isdigit, text)) for text in texts]) == 0.25


def test_one_corpus_is_a_mixture_of_one(folder):
    path = str(folder / 'latin.txt')
    alone = prepare_sources(DataConfig(path=path, vocab_size=300, cache_dir=str(folder / 'cache')), log=quiet)
    assert alone.weights == {path: 1}
    assert alone.fingerprint == alone.prepared[path].fingerprint


def test_a_given_tokenizer_is_used_for_all_sources(config):
    given = train_bpe(TEXTS.values(), 280)
    data = prepare_sources(config, given, log=quiet)
    assert {prepared.tokenizer.fingerprint for prepared in data.prepared.values()} == {given.fingerprint}


def test_characters_of_all_sources_are_known(config):
    data = prepare_sources(dataclasses.replace(config, tokenizer='char'), log=quiet)
    for text in TEXTS.values():
        assert data.tokenizer.decode(data.tokenizer.encode(text)) == text
    assert data.tokenizer.vocab_size == len(set(''.join(TEXTS.values()))) + 2  # unknown, end of text


def test_a_source_that_is_no_corpus_and_no_file_is_named(folder):
    with pytest.raises(InputError, match=r'^data\.mixture=.*: nowhere\.txt is no file and no corpus; .*python_docs'):
        prepare_sources(DataConfig(mixture='python_docs:1,nowhere.txt:1', cache_dir=str(folder)), log=quiet)


def test_a_path_beside_a_mixture_is_refused(folder):
    with pytest.raises(InputError, match=r'^data\.path=x\.txt beside data\.mixture=python_docs:1: '):
        prepare_sources(DataConfig(mixture='python_docs:1', path='x.txt', cache_dir=str(folder)), log=quiet)


def test_a_mixture_is_prepared_in_pieces(config, mixed):
    # All is there already: any piece finds the others' parts.
    again = prepare_sources_piece(config, (2, 3), log=quiet)
    assert again.fingerprint == mixed.fingerprint


def test_one_piece_of_a_new_mixture_is_not_all_of_it(config, folder):
    # A small file is one part, which is the first piece's.
    elsewhere = dataclasses.replace(config, vocab_size=290)
    assert prepare_sources_piece(elsewhere, (2, 2), log=quiet) is None
    assert prepare_sources_piece(elsewhere, (1, 2), log=quiet) is not None
