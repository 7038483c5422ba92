import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from gpt_jax.data import Batches, DataConfig, prepare
from gpt_jax.data.pipeline import parse_mixture
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
    return prepare(config, log=quiet)


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
    again = prepare(config, log=lines.append)
    assert again.tokenizer.fingerprint == mixed.tokenizer.fingerprint
    assert again.fingerprint == mixed.fingerprint
    assert [line.split(' from')[0] for line in lines] == ['data: reused', 'data: reused']


def test_each_source_brings_its_share_of_the_rows(mixed):
    batches = Batches(mixed.train, 8, 16, seed=0)
    texts = [mixed.tokenizer.decode(row) for step in range(50) for row in batches.rows(step)['tokens']]
    assert np.mean([any(map(str.isdigit, text)) for text in texts]) == 0.25


def test_one_corpus_is_a_mixture_of_one(folder):
    path = str(folder / 'latin.txt')
    alone = prepare(DataConfig(path=path, vocab_size=300, cache_dir=str(folder / 'cache')), log=quiet)
    assert alone.weights == {path: 1}
    assert alone.fingerprint == alone.prepared[path].fingerprint


def test_a_given_tokenizer_is_used_for_all_sources(config):
    given = train_bpe(TEXTS.values(), 280)
    data = prepare(config, given, log=quiet)
    assert {prepared.tokenizer.fingerprint for prepared in data.prepared.values()} == {given.fingerprint}


def test_characters_of_all_sources_are_known(config):
    data = prepare(dataclasses.replace(config, tokenizer='char'), log=quiet)
    for text in TEXTS.values():
        assert data.tokenizer.decode(data.tokenizer.encode(text)) == text
    assert data.tokenizer.vocab_size == len(set(''.join(TEXTS.values()))) + 2  # unknown, end of text


def test_a_source_that_is_no_corpus_and_no_file_is_named(folder):
    with pytest.raises(InputError, match=r'^data\.mixture=.*: nowhere\.txt is no file and no corpus; .*python_docs'):
        prepare(DataConfig(mixture='python_docs:1,nowhere.txt:1', cache_dir=str(folder)), log=quiet)


def test_a_path_beside_a_mixture_is_refused(folder):
    with pytest.raises(InputError, match=r'^data\.path=x\.txt beside data\.mixture=python_docs:1: '):
        prepare(DataConfig(mixture='python_docs:1', path='x.txt', cache_dir=str(folder)), log=quiet)


def test_a_mixture_is_prepared_in_pieces(config, mixed):
    # All is there already: any piece finds the others' parts.
    again = prepare(config, log=quiet, piece=(2, 3))
    assert again.fingerprint == mixed.fingerprint


def test_one_piece_of_a_new_mixture_is_not_all_of_it(config, folder):
    # A small file is one part, which is the first piece's.
    elsewhere = dataclasses.replace(config, vocab_size=290)
    assert prepare(elsewhere, log=quiet, piece=(2, 2)) is None
    assert prepare(elsewhere, log=quiet, piece=(1, 2)) is not None


def test_mixture_is_read_with_exact_weights_that_add_up_to_one():
    assert parse_mixture('python_docs:0.7,path/to/x.txt:0.3') == {
        'python_docs': Fraction(7, 10),
        'path/to/x.txt': Fraction(3, 10),
    }
    assert parse_mixture('a:1, b:3') == {'a': Fraction(1, 4), 'b': Fraction(3, 4)}
    assert parse_mixture('hub:some/repo@main:default:2,b:1e1') == {
        'hub:some/repo@main:default': Fraction(1, 6),
        'b': Fraction(5, 6),
    }
    assert list(parse_mixture('z:1,a:1')) == ['z', 'a']


@pytest.mark.parametrize(
    ('mixture', 'message'),
    [
        ('', "'' is no source with a weight"),
        ('a', "'a' is no source with a weight"),
        ('a:1,', "'' is no source with a weight"),
        (':1', "':1' is no source with a weight"),
        ('a:', "the weight '' of a is no number"),
        ('a:x', "the weight 'x' of a is no number"),
        ('a:nan', "the weight 'nan' of a is no number"),
        ('a:inf', "the weight 'inf' of a is no number"),
        ('a:1/0', "the weight '1/0' of a is no number"),
        ('a:-0.5,b:1', 'the weight -0.5 of a is not above 0'),
        ('a:1,b:0', 'the weight 0 of b is not above 0'),
        ('a:0,b:0', 'the weight 0 of a is not above 0'),
        ('a:1,b:1,a:1', 'a stands there twice'),
    ],
)
def test_mixture_that_cannot_be_is_one_line_with_the_key_its_value_and_the_form(mixture, message):
    with pytest.raises(InputError) as caught:
        parse_mixture(mixture)
    assert str(caught.value).startswith(f'data.mixture={mixture}: ')
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)
