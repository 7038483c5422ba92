import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import gpt2, train_bpe, train_char
from gpt_jax.errors import InputError

AWKWARD = [
    '',
    ' leading and trailing  ',
    '\r\n\t\x00\x1b\x7f',
    'e\u0301 \u2028\u00a0\ufeff\ufffd',
    '\U0001f469\u200d\U0001f4bb \U0010ffff',
    '<|endoftext|>',
    'a<|endoftext|> <|unknown|>b',
]


@pytest.mark.parametrize('text', AWKWARD)
def test_bpe_round_trips_awkward_text(small_bpe, text):
    ids = small_bpe.encode(text)
    assert small_bpe.decode(ids) == text
    assert b''.join(small_bpe.token_bytes(id_) for id_ in ids) == text.encode()


@given(st.text())
def test_bpe_round_trips_every_text(small_bpe, text):
    ids = small_bpe.encode(text)
    assert small_bpe.decode(ids) == text
    assert small_bpe.end_of_text not in ids
    assert all(0 <= id_ < small_bpe.vocab_size for id_ in ids)


@given(st.text(alphabet='abc \n\r\té\U0001f600'))
def test_char_round_trips_text_of_known_characters(text):
    tokenizer = train_char(['abc \n\r\t', 'é\U0001f600'])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert b''.join(tokenizer.token_bytes(id_) for id_ in ids) == text.encode()


def test_char_gives_one_token_to_every_unseen_character():
    tokenizer = train_char(['ab'])
    unknown = tokenizer.encode('z')
    assert tokenizer.vocab_size == 4  # a, b, unknown, end of text
    assert tokenizer.encode('azb\u00e9') == [0, *unknown, 1, *unknown]
    assert tokenizer.end_of_text not in tokenizer.encode('<|endoftext|>')


def test_literal_end_of_text_is_plain_text_also_after_reloading(small_bpe, tmp_path):
    small_bpe.save(tmp_path / 'tokenizer.json')
    for tokenizer in (small_bpe, Tokenizer.load(tmp_path / 'tokenizer.json'), Tokenizer.from_json(small_bpe.to_json())):
        assert tokenizer.end_of_text not in tokenizer.encode('a<|endoftext|>b')
        assert tokenizer.end_of_text not in tokenizer.encode_batch(['a<|endoftext|>b'])[0]


def test_end_of_text_that_a_file_lists_as_an_ordinary_token_still_never_comes_from_text(small_bpe):
    content = json.loads(small_bpe.to_json())
    content['added_tokens'][0]['special'] = False
    listed = Tokenizer.from_json(json.dumps(content))
    content['added_tokens'] = []
    unlisted = Tokenizer.from_json(json.dumps(content))
    for tokenizer in (listed, unlisted, Tokenizer.from_json(listed.to_json())):
        assert tokenizer.end_of_text == small_bpe.end_of_text
        assert tokenizer.end_of_text not in tokenizer.encode('a<|endoftext|>b')


def test_special_tokens_of_a_text_are_taken_where_asked(small_bpe):
    a, b, end = small_bpe.encode('a '), small_bpe.encode(' b'), small_bpe.end_of_text
    assert small_bpe.encode('a <|endoftext|> b<|endoftext|>', special=True) == [*a, end, *b, end]
    char = train_char(['ab'])
    assert char.encode('a<|endoftext|>b', special=True) == [0, char.end_of_text, 1]


def test_token_ids_above_int32_are_refused(small_bpe):
    content = json.loads(small_bpe.to_json())
    content['model']['vocab']['far away'] = 2**31
    with pytest.raises(InputError, match='token id 2147483648, above int32'):
        Tokenizer.from_json(json.dumps(content))


def test_end_of_text_token_is_kept_by_decode(small_bpe):
    assert small_bpe.decode([*small_bpe.encode('a'), small_bpe.end_of_text]) == 'a<|endoftext|>'


def test_batch_is_the_same_as_one_by_one(small_bpe):
    assert small_bpe.encode_batch(AWKWARD) == [small_bpe.encode(text) for text in AWKWARD]


def test_saved_tokenizer_is_the_same(small_bpe, tmp_path, sample_text):
    path = tmp_path / 'tokenizer.json'
    small_bpe.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.fingerprint == small_bpe.fingerprint
    assert loaded.encode(sample_text) == small_bpe.encode(sample_text)
    assert [entry.name for entry in tmp_path.iterdir()] == ['tokenizer.json']


def test_kinds(small_bpe):
    assert small_bpe.kind == 'bpe'
    assert train_char(['ab']).kind == 'char'


def test_bpe_learns_merges_up_to_the_vocabulary_asked_for(sample_text):
    assert train_bpe([sample_text], 257).vocab_size == 257
    larger = train_bpe([sample_text], 300)
    assert larger.vocab_size == 300
    assert (
        len(larger.encode(sample_text))
        < len(sample_text.encode())
        == len(train_bpe([sample_text], 257).encode(sample_text))
    )


def test_bpe_knows_all_bytes_whatever_it_was_trained_on():
    tokenizer = train_bpe(['a'], 300)
    assert {tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)} >= {bytes([byte]) for byte in range(256)}


def test_bpe_training_is_the_same_in_another_process(sample_text, small_bpe):
    code = (
        'import sys; from gpt_jax.data.tokenizer import train_bpe;'
        'print(train_bpe([sys.stdin.buffer.read().decode()], 320).fingerprint)'
    )
    for cores in ('0', '1'):
        result = subprocess.run(
            [sys.executable, '-c', code],
            input=sample_text.encode(),
            capture_output=True,
            check=True,
            env=os.environ | {'TOKENIZERS_PARALLELISM': cores, 'PYTHONPATH': os.pathsep.join(sys.path)},
        )
        assert result.stdout.decode().strip() == small_bpe.fingerprint


def test_fingerprint_follows_the_vocabulary(sample_text, small_bpe):
    assert train_bpe([sample_text], 319).fingerprint != small_bpe.fingerprint
    assert train_bpe([sample_text], 320).fingerprint == small_bpe.fingerprint


def test_too_small_bpe_vocabulary_is_refused():
    with pytest.raises(InputError, match=r'^data\.vocab_size=256: .*257$'):
        train_bpe(['a'], 256)


@pytest.mark.parametrize('use', [lambda t: t.encode('ab\ud800'), lambda t: t.encode_batch(['a', 'ab\ud800'])])
def test_lone_surrogate_is_refused(small_bpe, use):
    with pytest.raises(InputError, match=r'surrogate .* at character 2'):
        use(small_bpe)


@pytest.mark.parametrize('train', [train_char, lambda texts: train_bpe(texts, 300)])
def test_lone_surrogate_in_training_text_is_refused(train):
    with pytest.raises(InputError, match='surrogate'):
        train(['a', '\udfff'])


def test_a_negative_id_is_refused(small_bpe):
    for use in (lambda: small_bpe.decode([1, -1]), lambda: small_bpe.token_bytes(-1)):
        with pytest.raises(InputError, match='token id -1'):
            use()


@pytest.mark.parametrize('id_', [320, 10**9, 2**40])
def test_an_id_that_no_token_has_is_the_empty_text(small_bpe, id_):
    for tokenizer in (small_bpe, train_char(['ab'])):
        assert tokenizer.token_bytes(id_) == b''
        assert tokenizer.decode([1, id_, 0]) == tokenizer.decode([1, 0])
        assert tokenizer.is_token(400).sum() == tokenizer.vocab_size


@pytest.mark.parametrize('content', [None, b'', b'{}', b'\xff', b'{"version": "1.0", "model": {"type": "BP'])
def test_damaged_tokenizer_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / 'tokenizer.json'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)
    assert '\n' not in str(caught.value)


def gpt2_folder(folder, names):
    """GPT-2's file format with a vocabulary of 260: the 256 byte symbols, three merges and end of text."""
    symbols = [train_bpe(['a'], 257)._inner.id_to_token(id_) for id_ in range(1, 257)]
    merges = [('h', 'e'), ('l', 'l'), ('he', 'll')]
    tokens = [*symbols, *(''.join(merge) for merge in merges), '<|endoftext|>']
    vocabulary, merge_file = names
    (folder / vocabulary).write_text(json.dumps({token: id_ for id_, token in enumerate(tokens)}), encoding='utf-8')
    lines = '\n'.join(' '.join(merge) for merge in merges)
    (folder / merge_file).write_text(f'#version: 0.2\n{lines}\n', encoding='utf-8')


@pytest.mark.parametrize('names', [('encoder.json', 'vocab.bpe'), ('vocab.json', 'merges.txt')])
def test_gpt2_files_are_read_under_both_of_their_names(tmp_path, names):
    gpt2_folder(tmp_path, names)
    tokenizer = gpt2(tmp_path)
    assert tokenizer.end_of_text == 259
    assert tokenizer.vocab_size == 260
    assert [tokenizer.token_bytes(id_) for id_ in tokenizer.encode('hello é')] == [
        b'hell',
        b'o',
        b' ',
        b'\xc3',
        b'\xa9',
    ]


def test_directory_with_a_tokenizer_json_is_read(tmp_path, small_bpe):
    small_bpe.save(tmp_path / 'tokenizer.json')
    assert gpt2(tmp_path).fingerprint == small_bpe.fingerprint


@pytest.mark.parametrize('missing', ['encoder.json', 'vocab.bpe'])
def test_missing_gpt2_file_is_named(tmp_path, missing):
    gpt2_folder(tmp_path, ('encoder.json', 'vocab.bpe'))
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=missing):
        gpt2(tmp_path)


def test_missing_tokenizer_directory_is_named(tmp_path):
    with pytest.raises(InputError, match=r'data\.tokenizer=.*/nowhere: no such directory'):
        gpt2(tmp_path / 'nowhere')


def test_damaged_gpt2_vocabulary_is_refused(tmp_path):
    gpt2_folder(tmp_path, ('encoder.json', 'vocab.bpe'))
    (tmp_path / 'encoder.json').write_text('[]')
    with pytest.raises(InputError, match=r'encoder\.json'):
        gpt2(tmp_path)


def test_tokenizer_without_end_of_text_is_refused(tmp_path, small_bpe):
    (tmp_path / 'tokenizer.json').write_text(small_bpe.to_json().replace('<|endoftext|>', '</s>'))
    with pytest.raises(InputError, match=r'endoftext'):
        gpt2(tmp_path)


def test_unreachable_hub_is_one_line_with_the_ways_out(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError('no route\nto host')

    def not_cached(*args, local_files_only=False, **kwargs):
        assert local_files_only, 'the slow download must not be tried where the hub does not answer'
        raise huggingface_hub.errors.LocalEntryNotFoundError('not here')

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', not_cached)
    monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', unreachable)
    with pytest.raises(InputError) as caught:
        gpt2('gpt2')
    assert '\n' not in str(caught.value)
    for part in ('data.tokenizer=gpt2', 'HF_HUB_OFFLINE', '--config.data.tokenizer=DIR'):
        assert part in str(caught.value)


def test_gpt2_comes_from_the_cache_of_the_hub_where_it_is_there(monkeypatch, tmp_path, small_bpe):
    import huggingface_hub

    small_bpe.save(tmp_path / 'tokenizer.json')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda *args, **kwargs: str(tmp_path / 'tokenizer.json'))
    assert gpt2('gpt2').fingerprint == small_bpe.fingerprint
