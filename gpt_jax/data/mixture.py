"""Mixtures of corpora: which source a row of the run comes from."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One part of what is trained on.

    Attributes:
      name: what messages and metrics call it.
      tokens: [count], token ids; end of text follows every document.
      weight: its share of the rows, relative to the other sources' weights; exact, so that shares are.
    """

    name: str
    tokens: Any = dataclasses.field(repr=False)
    weight: Fraction = Fraction(1)


class Interleaving:
    """Which source each row of a run comes from, and which of that source's rows it is.

    A pure function of the row's number, in time that grows with the logarithm of the number of sources. These are
    halved until one is left, and each half takes its exact share of the rows so far, rounded. So among the first n
    rows, whatever n, a source of weight w has w n of them, give or take fewer than the number of halvings: shares do
    not drift, and no source waits for long. (grain's own mixtures round the weights to hundredths of the smallest.)
    """

    def __init__(self, weights: Sequence[Fraction]):
        """Takes weights above 0, which need not add up to 1.

        Raises ValueError where there is none, or one is not above 0.
        """
        if not weights or min(weights) <= 0:
            raise ValueError(f'weights {weights}: at least one, and all above 0')
        scale = math.lcm(*(Fraction(weight).denominator for weight in weights))
        self._before = [0, *itertools.accumulate(int(weight * scale) for weight in weights)]

    def __getitem__(self, row: int) -> tuple[int, int]:
        """(source, how many of the rows before this one were that source's)."""
        first, last = 0, len(self._before) - 1
        while last - first > 1:
            middle = (first + last) // 2
            share = self._before[middle] - self._before[first]
            whole = self._before[last] - self._before[first]
            earlier = row * share // whole
            if (row + 1) * share // whole > earlier:
                last, row = middle, earlier
            else:
                first, row = middle, row - earlier
        return first, row
