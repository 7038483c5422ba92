"""A tokenizer.json of somebody else's that panics, never ends, eats memory or contradicts itself is one line."""

import json

import pytest

from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import train_bpe, train_char
from gpt_jax.errors import InputError

TEXT = 'the quick brown fox jumps over the lazy dog'


@pytest.fixture(scope='module')
def plain():
    return json.loads(train_bpe([TEXT], 300).to_json())


def split(pattern):
    return {'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}}


def replace(pattern, content):
    return {'type': 'Replace', 'pattern': {'String': pattern}, 'content': content}


def added(id_):
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return {'id': id_, 'content': '<x>', 'special': True} | flags


def of_model(**changes):
    return lambda document: document['model'].update(changes)


HOSTILE = {
    'a damaged charsmap': {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}},
    'a charsmap that points outside of itself': {
        'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'BAAAAP////8='}
    },
    'a normalizer that replaces nothing by something': {'normalizer': replace('', 'x')},
    'pieces of length zero': {'pre_tokenizer': {'type': 'FixedLength', 'length': 0}},
    'choices within choices': split(r'^(\w+\s?)*$'),
    'overlapping choices': split('(a|aa)+$'),
    'no regular expression': split('('),
    'a prefix longer than a word': of_model(continuing_subword_prefix='#' * 40),
    'growth': {'normalizer': {'type': 'Sequence', 'normalizers': [replace('a', 'a' * 100)] * 3}},
    'a long prefix': {'normalizer': {'type': 'Prepend', 'prepend': 'x' * 10**6}},
    'an unknown token that is not there': {
        'model': {'type': 'WordLevel', 'unk_token': '[UNK]', 'vocab': {'<|endoftext|>': 0}}
    },
    'an unknown token beyond the vocabulary': {
        'model': {'type': 'Unigram', 'unk_id': 10**9, 'vocab': [['<|endoftext|>', 0.0], ['a', -1.0]]}
    },
    'one id for two tokens': lambda document: document['model']['vocab'].update(the=5),
    'an id beyond int32': lambda document: document['model']['vocab'].update(zzz=2**31),
    'an id beyond uint32': lambda document: document['model']['vocab'].update(zzz=2**32),
    'an added token beyond int32': lambda document: document['added_tokens'].append(added(2**31)),
    'an added token below zero': lambda document: document['added_tokens'].append(added(-1)),
    'a rule within a hundred rules': lambda document: document.update(normalizer=nested(100)),
}


def nested(depth):
    return {'type': 'Sequence', 'normalizers': [nested(depth - 1)] if depth else []}


@pytest.mark.parametrize('change', HOSTILE.values(), ids=HOSTILE)
def test_what_the_library_cannot_bear_is_one_line(plain, change, capfd):
    document = json.loads(json.dumps(plain))
    change(document) if callable(change) else document.update(change)
    with pytest.raises(InputError) as caught:
        Tokenizer.from_json(json.dumps(document))
    assert '\n' not in str(caught.value)
    assert str(caught.value).endswith('use another one')
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('text', ['', '[' * 200_000, '[]', '7', '{"model": 7}', '{"model": null}', '{}'])
def test_a_text_that_is_no_tokenizer_is_one_line(text):
    with pytest.raises(InputError, match=r'^not a tokenizer.json.*use another one$'):
        Tokenizer.from_json(text)


def test_a_panic_on_a_text_is_one_line(monkeypatch, plain):
    # As if the trial had not met the text on which the regular expression never ends.
    monkeypatch.setattr('gpt_jax.data.tokenizer_check._try_out', lambda _: None)
    tokenizer = Tokenizer.from_json(json.dumps(plain | split('(b|bb)+$')))
    assert tokenizer.decode(tokenizer.encode('a quick fox')) == 'aquickfox'
    for cut in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(InputError, match=r'cannot cut .*retry-limit-in-match over; use another one'):
            cut('b' * 60 + 'c')


@pytest.mark.parametrize('cut', [r"'s|\p{L}+| ?[^\s\p{L}]+|\s+", r'\d{1,3}'])
def test_an_unusual_one_that_works_is_taken(plain, cut):
    normalizers = {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}, replace('\r\n', '\n')]}
    cuts = [split(cut)['pre_tokenizer'], plain['pre_tokenizer'] | {'use_regex': False}]
    pre_tokenizer = {'type': 'Sequence', 'pretokenizers': cuts}
    tokenizer = Tokenizer.from_json(json.dumps(plain | {'normalizer': normalizers, 'pre_tokenizer': pre_tokenizer}))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize('make', [lambda: train_bpe([TEXT], 300), lambda: train_char([TEXT])])
def test_our_own_are_not_tried_out(make, monkeypatch):
    monkeypatch.setattr('gpt_jax.data.tokenizer_check._try_out', lambda _: pytest.fail('tried out'))
    text = make().to_json()
    assert Tokenizer.from_json(text).to_json() == text
