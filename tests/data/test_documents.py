import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data.documents import document_places

END = 0


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4))
def test_places_are_those_of_documents_cut_apart_by_hand(rows):
    positions, documents = document_places(np.array(rows), END)
    assert (positions.dtype, documents.dtype) == (np.int32, np.int32)
    for row, row_positions, row_documents in zip(rows, positions, documents, strict=True):
        pieces = [[]]
        for token in row:
            if token == END:
                pieces.append([])
            pieces[-1].append(token)
        assert [place for piece in pieces for place in range(len(piece))] == row_positions.tolist()
        assert [number for number, piece in enumerate(pieces) for _ in piece] == row_documents.tolist()


def test_row_without_a_separator_is_one_document_that_starts_with_it():
    positions, documents = document_places(np.array([[4, 5, 6]]), END)
    assert positions.tolist() == [[0, 1, 2]]
    assert documents.tolist() == [[0, 0, 0]]
