"""Tokens added to a vocabulary: those of every file that may list them, with their ids and flags."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import gpt2_folder

from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import gpt2, pieces, train_bpe
from gpt_jax.errors import InputError

USER = '<|user turn|>'
# Content -> id; 260 is the first free one, and there are holes before 270 and 290.
ADDED = {USER: 260, '<é>': 261, '<日本>': 270, '<\U0001f642>': 290}


def full(content, **flags):
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': False} | flags
    return {'content': content, **flags}


def in_added_tokens(folder):
    (folder / 'added_tokens.json').write_text(json.dumps(ADDED), encoding='utf-8')


def in_tokenizer_config(folder):
    decoder = {str(id_): full(content) for content, id_ in ADDED.items()}
    (folder / 'tokenizer_config.json').write_text(json.dumps({'added_tokens_decoder': decoder}), encoding='utf-8')


def in_tokenizer_json(folder):
    document = json.loads(gpt2(folder).to_json())
    document['added_tokens'] += [full(content) | {'id': id_} for content, id_ in ADDED.items()]
    (folder / 'tokenizer.json').write_text(json.dumps(document), encoding='utf-8')


@pytest.fixture
def folder(tmp_path):
    gpt2_folder(tmp_path, ('vocab.json', 'merges.txt'))
    return tmp_path


@pytest.mark.parametrize('write', [in_added_tokens, in_tokenizer_config, in_tokenizer_json])
def test_added_tokens_are_kept_with_their_ids_wherever_they_are_listed(folder, write):
    write(folder)
    tokenizer = gpt2(folder)
    text = f'hello{USER}x <é>é<日本> \U0001f642<\U0001f642>'
    ids = tokenizer.encode(text)
    assert [id_ for id_ in ids if id_ >= 260] == [260, 261, 270, 290]
    assert tokenizer.decode(ids) == text == b''.join(map(tokenizer.token_bytes, ids)).decode()
    assert tokenizer.vocab_size == 291
    assert tokenizer.is_token(300).nonzero()[0].tolist() == [*range(262), 270, 290]
    assert tokenizer.decode([262, 289, 1]) == tokenizer.decode([1])
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.fingerprint, again.encode(text)) == (tokenizer.fingerprint, ids)


def test_special_tokens_are_plain_text_unless_asked_for(folder):
    in_added_tokens(folder)
    roles = {'additional_special_tokens': [USER], 'pad_token': {**full('[PAD]'), 'lstrip': True}}
    (folder / 'special_tokens_map.json').write_text(json.dumps(roles), encoding='utf-8')
    tokenizer = gpt2(folder, room=300)
    text = f'a{USER} [PAD]<|endoftext|><é>'
    assert [id_ for id_ in tokenizer.encode(text) if id_ >= 259] == [261]
    parsed = tokenizer.encode(text, special=True)
    # The space before it belongs to the padding token, as its flag lstrip says.
    assert parsed == [*tokenizer.encode('a'), 260, 291, 259, 261]
    assert tokenizer.encode_batch([text, text], special=True) == [parsed, parsed]
    assert tokenizer.find_special('no mark') is None
    assert tokenizer.find_special(f'a {USER}<|endoftext|>') == USER


def test_a_special_token_without_an_id_and_without_room_is_left_out(folder):
    (folder / 'special_tokens_map.json').write_text('{"pad_token": "[PAD]"}')
    without = [gpt2(folder, room).vocab_size for room in (None, 260, 261)]
    assert without == [260, 260, 261]
    (folder / 'special_tokens_map.json').unlink()
    assert gpt2(folder).fingerprint == gpt2(folder, 261).fingerprint


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('added_tokens.json', '[]', 'added_tokens.json does not list tokens'),
        ('added_tokens.json', '{"<x>": "many"}', "token id 'many' is no int32"),
        ('added_tokens.json', '{"<x>": true}', 'token id True is no int32'),
        ('added_tokens.json', '{"<x>": 4294967296}', 'token id 4294967296 is no int32'),
        ('added_tokens.json', '{"<x>": 3}', 'gives id 3 to both'),
        ('added_tokens.json', '{"": 260}', 'has no content'),
        ('added_tokens.json', '{', 'is not JSON'),
        ('special_tokens_map.json', '{"pad_token": 5}', 'added token 5: has no content'),
        ('special_tokens_map.json', '{"additional_special_tokens": 5}', 'does not list tokens'),
        ('tokenizer_config.json', '{"added_tokens_decoder": [1]}', 'added_tokens_decoder is no JSON object'),
        ('tokenizer_config.json', '{"added_tokens_decoder": {"260": {"content": "x", "lstrip": 1}}}', 'true or false'),
    ],
)
def test_a_file_that_lists_what_cannot_be_is_one_line(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        gpt2(folder)
    assert '\n' not in str(caught.value)
    assert str(folder) in str(caught.value)


@given(st.lists(st.one_of(st.sampled_from([*ADDED, ' ', 'a']), st.text(max_size=3)), max_size=8))
def test_text_with_added_tokens_round_trips(small_bpe, parts):
    document = json.loads(small_bpe.to_json())
    document['added_tokens'] += [full(content) | {'id': id_ + 100} for content, id_ in ADDED.items()]
    tokenizer = Tokenizer.from_json(json.dumps(document))
    text = ''.join(parts)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_text_has_the_ids_that_it_has_in_one_piece(small_bpe, monkeypatch, sample_text):
    whole = small_bpe.encode(sample_text * 20), small_bpe.encode_batch([sample_text] * 20)
    monkeypatch.setattr('gpt_jax.data.tokenizer.BATCH_CHARACTERS', 1000)
    assert (small_bpe.encode(sample_text * 20), small_bpe.encode_batch([sample_text] * 20)) == whole


def test_the_longest_token_bounds_how_short_a_text_can_become(small_bpe, sample_text):
    assert len(sample_text.encode()) / small_bpe.longest_token <= len(small_bpe.encode(sample_text))
    assert train_bpe(['a'], 257).longest_token == len('<|endoftext|>')


def test_unknown_characters_are_named(small_bpe):
    from gpt_jax.data.tokenizer import train_char

    assert train_char(['abc']).unknown_characters('a!b?!') == '!?'
    assert small_bpe.unknown_characters('\u4e2d') == ''


def test_no_piece_of_a_long_text_ends_in_an_added_token(small_bpe, monkeypatch):
    monkeypatch.setattr('gpt_jax.data.tokenizer.PIECE_CHARACTERS', 5)
    document = json.loads(small_bpe.to_json())
    added = [full(USER), full('<stop>', rstrip=True), full('<go>', lstrip=True)]
    document['added_tokens'] += [token | {'id': 400 + n} for n, token in enumerate(added)]
    tokenizer = Tokenizer.from_json(json.dumps(document))
    text = f'one two {USER}{USER} three <stop>   four five   <go> six {USER} ' * 3
    cut = list(pieces(text, tokenizer.marks))
    assert len(cut) > 10
    assert ''.join(cut) == text
    assert [id_ for piece in cut for id_ in tokenizer.encode(piece)] == tokenizer.encode(text)
