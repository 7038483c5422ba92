"""Where documents begin in windows of tokens: what a document mask needs."""

import numpy as np


def document_places(tokens_BT: np.ndarray, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """The place of every token in its document, and the number of that document in its row.

    An end of text opens the document that follows it, as it does where a text is generated from nothing: the first
    token of a document is then predicted from the separator alone, and no prediction sees another document.

    Args:
      tokens_BT: ids [batch, time].
      end_of_text: the id that separates documents.

    Returns:
      positions int32 [batch, time], 0 at each end of text and at the start of the row, counting on from there;
      documents int32 [batch, time], 0, 1, ... along a row: equal where two tokens belong to one document.
    """
    opens_BT = tokens_BT == end_of_text
    places_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
    starts_BT = np.maximum.accumulate(np.where(opens_BT, places_T, 0), axis=1)
    return places_T - starts_BT, np.cumsum(opens_BT, axis=1, dtype=np.int32)
