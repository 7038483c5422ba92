"""GPT-2's tokenizer beside tiktoken, OpenAI's own implementation of it.

The vocabulary is a tiny one made here; where GPT_JAX_GPT2_FILES names a folder with GPT-2's encoder.json and vocab.bpe,
the same is checked for the real one.
"""

import json
import os
import pathlib

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from gpt_jax.data.tokenizer import END_OF_TEXT, gpt2, train_bpe

FILES = os.environ.get('GPT_JAX_GPT2_FILES')
needs_files = pytest.mark.skipif(not FILES, reason='GPT_JAX_GPT2_FILES names no folder with encoder.json and vocab.bpe')
# GPT-2's pattern, as OpenAI's encoder.py publishes it.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
TRAINING = "It's 1234 o'clock: we'll say hello, hello -- the naïve café, 東京!\n\n    the other   three\t" * 3
LARGEST = 0x110000
SURROGATES = range(0xD800, 0xE000)


def byte_symbols():
    """Byte -> the character that stands for it in GPT-2's files: itself where it is printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def openai(folder):
    """Tiktoken's tokenizer of GPT-2's files: rank of a token = its id, which vocab.bpe's order gives."""
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    ids = json.loads((folder / 'encoder.json').read_text(encoding='utf-8'))
    end_of_text = ids.pop(END_OF_TEXT)
    ranks = {bytes(byte_of[symbol] for symbol in token): id_ for token, id_ in ids.items()}
    return tiktoken.Encoding('gpt2', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text})


def write_tiny_files(folder):
    """A vocabulary of some hundred merges in GPT-2's format, byte tokens in GPT-2's order."""
    merges = json.loads(train_bpe([TRAINING], 360).to_json())['model']['merges']
    # GPT-2's first 256 ids: the printable bytes, then the others, each in order.
    symbols = sorted(byte_symbols())
    assert set(symbols) == set(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(''.join(pair) for pair in merges), END_OF_TEXT]
    assert len(set(tokens)) == len(tokens)
    (folder / 'encoder.json').write_text(json.dumps({token: id_ for id_, token in enumerate(tokens)}))
    lines = [' '.join(pair) for pair in merges]
    (folder / 'vocab.bpe').write_text('\n'.join(['#version: 0.2', *lines, '']), encoding='utf-8')


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tiny_gpt2')
    write_tiny_files(folder)
    return gpt2(folder), openai(folder)


@pytest.fixture(scope='session')
def real():
    return gpt2(FILES), openai(pathlib.Path(FILES))


BOTH = pytest.mark.parametrize('pair', ['tiny', pytest.param('real', marks=needs_files)])

TEXTS = [
    '',
    ' ',
    "I'll say: it's ours, we've DON'T 'S 's",
    'a  b   c    ',
    '\n\n\t  x\r\ny \u00a0z\u3000w \u200bq',
    'x1y22z333 ½ ٣ Ⅷ ²',
    'naïve cafe\u0301 東京 \U0001f469\u200d\U0001f4bb \U0010ffff \ufeff',
    '<|endoftext|> <|endoftext|',
    '\x00\x01\x7f\x80\x9f\xad',
]


@BOTH
@pytest.mark.parametrize('text', TEXTS)
def test_awkward_texts_get_openais_ids(pair, text, request):
    ours, theirs = request.getfixturevalue(pair)
    assert ours.encode(text) == theirs.encode_ordinary(text)


# What pre-tokenizers stumble over, more often than chance would have it.
PIECES = st.sampled_from(["'s", "'LL", ' ', '  ', '\n', '\r\n', '\t', '\u00a0', '12', '.', 'the', ' hello', '\u0301'])


@BOTH
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_text_gets_openais_ids(pair, data, request):
    ours, theirs = request.getfixturevalue(pair)
    text = data.draw(st.text() | st.lists(PIECES | st.text(max_size=3)).map(''.join))
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


@BOTH
@pytest.mark.parametrize('character', ['a', ' ', '\n', 'é', '7', '!'])
def test_long_unbroken_strings_get_openais_ids(pair, character, request):
    # 100 000 times: an algorithm of quadratic time would run for minutes.
    ours, theirs = request.getfixturevalue(pair)
    text = 'x' + 100_000 * character
    assert ours.encode(text) == theirs.encode_ordinary(text)


@BOTH
@pytest.mark.slow
def test_all_of_unicode_gets_openais_ids(pair, request):
    ours, theirs = request.getfixturevalue(pair)
    characters = [chr(code) for code in range(LARGEST) if code not in SURROGATES]
    # The real vocabulary sees all of them; the tiny one, which is always here, every eighth block. OpenAI's time grows
    # with the square of a word's length, and a block may be one word.
    for start in range(0, len(characters), 512 if pair == 'real' else 8 * 512):
        for separator in ('', 'x', ' 7'):
            text = separator.join(characters[start : start + 512])
            assert ours.encode(text) == theirs.encode_ordinary(text), hex(ord(characters[start]))


def test_known_strings_get_the_ids_that_the_merges_give_by_hand(tmp_path):
    merges = ['h e', 'l l', 'he ll', 'Ġ w', 'hell o']
    tokens = [*sorted(byte_symbols()), *(merge.replace(' ', '') for merge in merges), END_OF_TEXT]
    (tmp_path / 'encoder.json').write_text(json.dumps({token: id_ for id_, token in enumerate(tokens)}))
    (tmp_path / 'vocab.bpe').write_text('\n'.join(['#version: 0.2', *merges, '']), encoding='utf-8')
    tokenizer = gpt2(tmp_path)
    assert tokenizer.end_of_text == 261
    # '!' is 0 as in GPT-2, where letters follow ASCII; 220 is the space and 198 the end of a line.
    assert tokenizer.encode('hello world') == [260, 259, 78, 81, 75, 67]
    assert tokenizer.encode('!hell\n') == [0, 258, 198]
    assert tokenizer.encode('  w') == [220, 259]
    assert tokenizer.encode('é') == [127, 102]
    assert tokenizer.encode('llhe') == [257, 256]


@needs_files
def test_published_ids_of_the_real_vocabulary(real):
    tokenizer, _ = real
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.kind) == (50257, 50256, 'gpt2')
    assert tokenizer.encode('Hello world') == [15496, 995]
    assert tokenizer.encode('!\n ') == [0, 198, 220]


@BOTH
def test_end_of_text_comes_from_text_only_where_it_is_asked_for(pair, request):
    ours, theirs = request.getfixturevalue(pair)
    for text in ('<|endoftext|>', 'a<|endoftext|>b', 'a <|endoftext|><|endoftext|> b<|endoftext', ''):
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.end_of_text not in ours.encode(text)
        assert ours.encode(text, special=True) == theirs.encode(text, allowed_special='all')
