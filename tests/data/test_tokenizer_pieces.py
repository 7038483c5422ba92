import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import tokenizer
from gpt_jax.data.corpus import Passage

TEXT = st.text(alphabet=st.sampled_from("ab' .,1é\n\n\r\t\u3000\u0085\x1c"), max_size=60)


@given(TEXT, st.integers(1, 6))
def test_pieces_of_a_document_have_the_ids_of_the_whole(small_bpe, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, 'PIECE_CHARACTERS', size)
        parts = list(tokenizer.pieces(text))
    assert ''.join(parts) == text
    assert [id_ for part in parts for id_ in small_bpe.encode(part)] == small_bpe.encode(text)


@given(TEXT)
def test_a_text_cut_at_its_safe_end_has_the_ids_of_the_whole(small_bpe, text):
    end = tokenizer.safe_end(text)
    assert small_bpe.encode(text[:end]) + small_bpe.encode(text[end:]) == small_bpe.encode(text)


def test_the_safe_end_is_the_last_place_before_a_space():
    assert [tokenizer.safe_end(text) for text in ('ab cd', 'ab cd ', 'ab  cd', 'abcd', ' a', '')] == [2, 5, 2, 4, 2, 0]


def test_a_word_without_end_is_cut_at_a_bound(monkeypatch):
    monkeypatch.setattr(tokenizer, 'PIECE_CHARACTERS', 10)
    monkeypatch.setattr(tokenizer, 'LONGEST_PIECE', 25)
    assert list(map(len, tokenizer.pieces('x' * 60 + ' ' + 'y' * 9))) == [25, 25, 10, 10]


def test_bpe_learns_from_words_of_bounded_length():
    text = f'short {"x" * 2500}\nend'
    assert tokenizer.shorten_words(text) == f'short {"x" * 1000}\nend'


def test_long_documents_are_cut_and_chunks_are_bounded(small_bpe, monkeypatch, sample_text):
    monkeypatch.setattr(tokenizer, 'PIECE_CHARACTERS', 100)
    monkeypatch.setattr(tokenizer, 'BATCH_CHARACTERS', 500)
    documents = [sample_text, '', 'short', sample_text]
    chunks = [ids for _, ids in tokenizer.token_chunks(small_bpe, (Passage('train', text) for text in documents))]
    assert len(chunks) > 10
    assert max(map(len, chunks)) < 1000
    expected = [id_ for text in documents for id_ in [*small_bpe.encode(text), small_bpe.end_of_text]]
    assert np.concatenate(chunks).tolist() == expected


def test_passages_go_to_their_split_and_end_of_text_follows_documents_alone(small_bpe):
    passages = [
        Passage('train', 'one', ends_document=False),
        Passage('validation', 'held out'),
        Passage('train', ' two'),
        Passage('train', 'three', ends_document=False),
    ]
    texts = {'train': '', 'validation': ''}
    for split, ids in tokenizer.token_chunks(small_bpe, passages):
        texts[split] += small_bpe.decode(ids)
    assert texts == {'train': 'one two<|endoftext|>three', 'validation': 'held out<|endoftext|>'}


def test_up_to_gives_the_first_texts_until_they_reach_the_limit():
    assert list(tokenizer.up_to(5, ['abc', 'de', 'f'])) == ['abc', 'de']
    assert list(tokenizer.up_to(4, iter(['abc', 'de', 'f']))) == ['abc', 'de']
