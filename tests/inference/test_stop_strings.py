"""Stop strings against a search of the whole text, however it is cut into tokens or pieces."""

import os

import hypothesis
import pytest
from hypothesis import strategies as st

from gpt_jax.data.tokenizer import train_bpe
from gpt_jax.errors import InputError
from gpt_jax.inference.text import StopFilter, StopStrings, text_of

# Few characters, so that stop strings occur, overlap and almost occur; one of several bytes.
TEXT = st.text('abé', max_size=12)
STOPS = st.lists(st.text('abé', min_size=1, max_size=4), min_size=1, max_size=3)
few_examples = hypothesis.settings(max_examples=100, deadline=None)


@pytest.fixture(scope='module')
def tokenizer():
    """Byte-level, with tokens of several characters."""
    return train_bpe(['abab éab ' * 20], 262)


def first_match(text, stops):
    """(where it begins, where it ends) of the stop string that is complete first; None: none is."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@few_examples
@hypothesis.given(TEXT, STOPS)
def test_tokens_are_kept_up_to_the_one_that_completes_a_stop_string(tokenizer, text, stops):
    tokens, match = tokenizer.encode(text), first_match(text, stops)
    kept = StopStrings(tokenizer, stops)(tokens)
    if match is None:
        assert kept is None
        return
    length = len(text[: match[1]].encode())
    sizes = [len(b''.join(map(tokenizer.token_bytes, tokens[:count]))) for count in (kept - 1, kept)]
    assert sizes[0] < length <= sizes[1]


@few_examples
@hypothesis.given(TEXT, STOPS)
def test_the_text_ends_before_the_stop_string(tokenizer, text, stops):
    match = first_match(text, stops)
    assert text_of(tokenizer, tokenizer.encode(text), stops) == (text if match is None else text[: match[0]])


@few_examples
@hypothesis.given(st.lists(TEXT, max_size=8), STOPS)
def test_a_growing_text_is_shown_as_the_whole_one_is_cut(pieces, stops):
    text, filter_ = ''.join(pieces), StopFilter(stops)
    shown = ''
    for piece in pieces:
        shown += filter_.feed(piece)
        # Nothing that is shown is taken back.
        assert text.startswith(shown)
    match = first_match(text, stops)
    assert filter_.stopped == (match is not None)
    assert shown + filter_.flush() == (text if match is None else text[: match[0]])


def test_only_what_may_begin_a_stop_string_is_held_back():
    filter_ = StopFilter(['###', '\n\n'])
    pieces = ['one #', '#', ' two', '\n', 'three\n', '\nfour', 'five']
    assert [filter_.feed(piece) for piece in pieces] == ['one ', '', '## two', '', '\nthree', '', '']
    assert filter_.stopped
    assert filter_.flush() == ''


def test_a_stop_string_is_found_in_the_middle_of_tokens(tokenizer):
    tokens = tokenizer.encode('abab')
    assert len(tokens) < 4
    assert StopStrings(tokenizer, ['ba'])(tokens) == len(tokens)
    assert StopStrings(tokenizer, ['bb'])(tokens) is None


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(InputError, match='at least one character'):
        StopStrings(tokenizer, ['x', ''])


def test_a_stop_string_that_is_no_text_is_refused():
    with pytest.raises(InputError, match=r'stop=.* is no text'):
        StopStrings(None, ['a', os.fsdecode(b'\xff')])
