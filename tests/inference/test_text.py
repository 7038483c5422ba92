"""Text of growing continuations, and where it is printed."""

import io
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from gpt_jax.data.tokenizer import train_bpe
from gpt_jax.errors import InputError
from gpt_jax.inference import Generation, TextStream, Writer, harmless, read_prompts, text_of

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
