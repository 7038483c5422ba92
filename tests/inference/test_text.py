"""Text of growing continuations, and where it is printed."""

import contextlib
import io
import json
import os
import socket

import hypothesis
import pytest
from hypothesis import strategies as st

from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import train_bpe, train_char
from gpt_jax.errors import InputError
from gpt_jax.inference import (
    Generation,
    StopStrings,
    TextStream,
    Writer,
    check_prompt,
    harmless,
    prompt_loop,
    read_prompts,
    remarks,
    text_of,
    word_ids,
)
from gpt_jax.inference.debug.views import show_token

TEXT = 'naïve café, 日本語 and 🙂; a tab\tand a line\n'


@pytest.fixture(scope='module')
def tokenizer():
    return train_bpe([TEXT] * 3, 300)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def grown(*tokens_of_each, reason='length'):
    """Updates of continuations that grow by a token at a time, all of them at once."""
    longest = max(map(len, tokens_of_each))
    for count in range(1, longest + 1):
        for index, tokens in enumerate(tokens_of_each):
            if count <= len(tokens):
                done = reason if count == len(tokens) else None
                yield index, Generation(list(tokens[:count]), [-1.0] * count, done)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 299), max_size=12), st.integers(1, 4))
def test_pieces_join_to_what_the_tokenizer_decodes(tokenizer, ids, step):
    ids = [id_ % tokenizer.vocab_size for id_ in ids]
    stream = TextStream(tokenizer)
    pieces = [stream.feed(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert ''.join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_a_character_is_shown_when_its_last_byte_is_there(tokenizer):
    bytes_alone = {tokenizer.token_bytes(id_): id_ for id_ in range(tokenizer.vocab_size)}
    stream = TextStream(tokenizer)
    pieces = [stream.feed([bytes_alone[bytes([byte])]]) for byte in '🙂!'.encode()]
    assert pieces == ['', '', '', '🙂', '!']
    stream.feed([bytes_alone[b'\xf0']])
    assert stream.flush() == '\ufffd'


def test_nothing_of_a_stop_string_is_shown(tokenizer):
    ids = tokenizer.encode('naïve café, 日本語')
    stream = TextStream(tokenizer, ['fé, 日'])
    assert ''.join(stream.feed([id_]) for id_ in ids) + stream.flush() == 'naïve ca'
    assert text_of(tokenizer, ids, ['fé, 日']) == 'naïve ca'


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        (TEXT, TEXT),
        ('a\x1b[2Jb\r\x07\x00\x7f', 'a\\x1b[2Jb\\r\\x07\\x00\\x7f'),
        ('\x9b31m', '\\x9b31m'),
    ],
)
def test_control_characters_are_spelled_out_for_a_terminal(text, shown):
    assert harmless(text) == shown


def test_continuations_are_written_in_order_while_they_grow_together(tokenizer):
    long, short = tokenizer.encode('naïve café'), tokenizer.encode('日本')
    out = io.StringIO()
    Writer(out, tokenizer).write(['one ', 'two '], 1, grown(long, short))
    assert out.getvalue() == '--- prompt 1 of 2 ---\none naïve café\n--- prompt 2 of 2 ---\ntwo 日本\n'
    out = io.StringIO()
    Writer(out, tokenizer, echo=False).write(['one '], 2, grown(short, long))
    assert out.getvalue() == '--- sample 1 of 2 ---\n日本\n--- sample 2 of 2 ---\nnaïve café\n'


def test_an_object_has_the_text_before_the_stop_string_and_all_tokens(tokenizer):
    ids = tokenizer.encode('naïve café')
    out = io.StringIO()
    Writer(out, tokenizer, as_json=True, stop=[' c']).write(['one '], 1, grown(ids, reason='stop'))
    row = json.loads(out.getvalue())
    assert (row['prompt'], row['text'], row['tokens'], row['finish_reason']) == ('one ', 'naïve', ids, 'stop')


def test_what_is_written_so_far_is_a_whole_line_after_an_interrupt(tokenizer):
    def interrupted():
        yield from list(grown(tokenizer.encode('naïve café')))[:2]
        raise KeyboardInterrupt

    out = Terminal()
    with pytest.raises(KeyboardInterrupt):
        Writer(out, tokenizer).write(['\x1b'], 1, interrupted())
    assert out.getvalue().startswith('\\x1bn')
    assert out.getvalue().endswith('\n')
    assert Writer(out, tokenizer).is_watched
    assert not Writer(out, tokenizer, as_json=True).is_watched


@pytest.mark.parametrize(
    ('data', 'lines', 'whole'),
    [
        (b'', [''], ''),
        (b'one', ['one'], 'one'),
        (b'one\n', ['one'], 'one'),
        (b'one\r\ntwo\r\n', ['one', 'two'], 'one\r\ntwo'),
        (b'one\n\ntwo\n', ['one', '', 'two'], 'one\n\ntwo'),
        ('a\u2028b\x0c'.encode(), ['a\u2028b\x0c'], 'a\u2028b\x0c'),
    ],
)
def test_a_file_is_one_prompt_a_line_or_one_prompt(tmp_path, data, lines, whole):
    path = tmp_path / 'prompts.txt'
    path.write_bytes(data)
    assert read_prompts(None, path, True) == lines
    assert read_prompts(None, path, False) == [whole]
    assert read_prompts('given\n', path, True) == ['given\n']


def test_bytes_that_are_no_text_are_named_with_their_place(tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_bytes(b'fine\nnot \xff fine\n')
    with pytest.raises(InputError, match=r'prompts.txt is not UTF-8 \(byte 0xff in line 2, at offset 9\)'):
        read_prompts(None, path, True)
    with pytest.raises(InputError, match=r'none\.txt cannot be read'):
        read_prompts(None, tmp_path / 'none.txt', True)


@pytest.fixture
def made(tmp_path):
    """A function: what is to stand at a path that is no text file -> the path."""

    def make(kind):
        path = tmp_path / 'prompts'
        if kind == 'pipe':
            os.mkfifo(path)
        elif kind == 'socket':
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        elif kind == 'folder':
            path.mkdir()
        elif kind == 'link to itself':
            path.symlink_to(path)
        elif kind == 'large':
            with open(path, 'wb') as file:
                file.truncate(2**27)
        else:
            return kind
        return path

    return make


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('pipe', 'is a named pipe'),
        ('socket', 'cannot be read'),
        ('folder', 'is a folder'),
        ('link to itself', 'cannot be read'),
        ('large', 'is larger than'),
        ('/dev/zero', 'is a device'),
        ('/dev/null', 'is a device'),
        ('x' * 300, 'cannot be read'),
        ('a\0b', 'cannot be read'),
    ],
)
def test_what_is_no_text_file_is_refused_by_name_and_at_once(made, kind, message):
    with pytest.raises(InputError, match=f'(?s)--prompt_file=.*{message}') as caught:
        read_prompts(None, made(kind), True)
    assert '\n' not in str(caught.value)


def standard_input(monkeypatch, path):
    monkeypatch.setattr('sys.stdin', open(path, encoding='utf-8'))  # noqa: SIM115


def test_standard_input_has_bounds(monkeypatch, tmp_path):
    standard_input(monkeypatch, '/dev/zero')
    with pytest.raises(InputError, match='standard input has more than the 67,108,864 bytes'):
        read_prompts(None, None, True)
    with pytest.raises(InputError, match='a line of standard input has more than'):
        prompt_loop(lambda prompts, number: None)
    monkeypatch.setattr('sys.stdin', None)
    for use in (lambda: read_prompts(None, None, True), lambda: prompt_loop(print)):
        with pytest.raises(InputError, match='closed'):
            use()


def test_a_loop_on_a_pipe_takes_its_lines(monkeypatch, tmp_path):
    (tmp_path / 'lines').write_bytes('\ufeffone\r\n\ntwo'.encode())
    standard_input(monkeypatch, tmp_path / 'lines')
    asked = []
    prompt_loop(lambda prompts, number: asked.append((*prompts, number)))
    assert asked == [('one', 0), ('', 1), ('two', 2)]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, monkeypatch):
    path = tmp_path / 'prompts.txt'
    path.write_bytes('\ufeffone\ntwo'.encode())
    assert read_prompts(None, path, True) == ['one', 'two']
    standard_input(monkeypatch, path)
    assert read_prompts(None, None, False) == ['one\ntwo']
    path.write_bytes('one'.encode('utf-16'))
    with pytest.raises(InputError, match='is UTF-16; make UTF-8 of it'):
        read_prompts(None, path, True)


@pytest.mark.parametrize(('length', 'sliding', 'fits'), [(10**5, False, True), (2 * 10**7, False, False)])
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_cut_into_tokens(tokenizer, length, sliding, fits):
    refused = pytest.raises(InputError, match=r'a prompt has 20,000,000 characters, at least .* tokens')
    with contextlib.nullcontext() if fits else refused:
        check_prompt('x' * length, tokenizer, 1024 * 8, sliding)
    with pytest.raises(InputError, match='its last 4,194,304 characters'):
        check_prompt('x' * 2**23, tokenizer, 1024, allow_sliding=True)
    check_prompt('x' * 2**22, tokenizer, 1024, allow_sliding=True)


def test_what_may_surprise_in_a_text_is_said(tokenizer):
    char = train_char(['abc '])
    assert remarks(tokenizer, '--prompt', ['a', 'b']) == []
    (special,) = remarks(tokenizer, '--prompt', ['a', 'b<|endoftext|>'])
    assert special.startswith('note: --prompt holds <|endoftext|>, which is read as plain text; --parse_special')
    assert remarks(tokenizer, '--prompt', ['b<|endoftext|>'], parse_special=True) == []
    (unknown,) = remarks(char, '--stop=x', ['abx', 'y\n'])
    assert unknown.endswith(r"that the tokenizer does not know, read as its unknown token: '\n', 'x', 'y'")
    (many,) = remarks(char, '--prompt', ['abcdefghijklmnopqrstuvwxyz'])
    assert many.endswith("'m', ...")


def test_words_that_are_never_to_be_written(tokenizer):
    char = train_char(['abc '])
    assert word_ids(char, ['ab', 'x']) == ((1, 2), (0, 1, 2))
    ids = word_ids(tokenizer, ['<|endoftext|>'])
    assert (tokenizer.end_of_text,) in ids
    assert len(ids) == 3
    with pytest.raises(InputError, match="bad_words='' is no word"):
        word_ids(tokenizer, ['a', ''])


def test_json_is_strict_whatever_the_numbers(tokenizer):
    out = io.StringIO()
    generation = Generation([1, 2], [float('-inf'), -0.5], 'length', score=float('nan'))
    Writer(out, tokenizer, as_json=True).write([''], 1, [(0, generation)])
    row = json.loads(out.getvalue(), parse_constant=pytest.fail)
    assert (row['logprobs'], row['score']) == ([None, -0.5], None)


def test_text_of_added_tokens_in_pieces_is_their_text(tokenizer):
    document = json.loads(tokenizer.to_json())
    blank = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
    contents = ('<|user turn|>', '<é>', '<日本>')
    marks = [{'id': 310 + n, 'content': content} | blank for n, content in enumerate(contents)]
    document['added_tokens'] += marks
    added = Tokenizer.from_json(json.dumps(document))
    ids = added.encode('é<é><日本> <|user turn|>x', special=True)
    stream = TextStream(added)
    assert ''.join(stream.feed([id_]) for id_ in [*ids[:2], 309, *ids[2:], 5000]) == 'é<é><日本> <|user turn|>x'
    assert StopStrings(added, ['user turn'])(ids) == ids.index(310) + 1
    assert text_of(added, ids, ['<|user']) == 'é<é><日本> '
    assert show_token(added, 310) == "'<|user turn|>'"
    assert show_token(added, 311) == "'<é>'"
