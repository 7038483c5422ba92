"""Mixtures of corpora: what `data.mixture` says, and which source a row of the run comes from."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from gpt_jax.errors import InputError

FORM = 'write NAME:WEIGHT,NAME:WEIGHT with weights above 0, such as python_docs:0.7,notes.txt:0.3'


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


def parse_mixture(mixture: str) -> dict[str, Fraction]:
    """Name -> weight of 'NAME:WEIGHT,NAME:WEIGHT,...', in that order; weights add up to 1, whatever they did before.

    What stands before the last colon is the name, so that a name may hold colons, but no comma.

    Raises InputError where a part has no weight, a weight is no number above 0, or a name stands there twice.
    """
    weights: dict[str, Fraction] = {}
    for part in mixture.split(','):
        name, colon, weight = (word.strip() for word in part.rpartition(':'))
        if not colon or not name:
            raise InputError(f'data.mixture={mixture}: {part.strip()!r} is no source with a weight; {FORM}')
        if name in weights:
            raise InputError(f'data.mixture={mixture}: {name} stands there twice; add its weights up')
        weights[name] = _positive(weight, name, mixture)
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _positive(weight: str, name: str, mixture: str) -> Fraction:
    try:
        value = Fraction(weight)
    except (ValueError, ZeroDivisionError):
        raise InputError(f'data.mixture={mixture}: the weight {weight!r} of {name} is no number; {FORM}') from None
    if value <= 0:
        raise InputError(f'data.mixture={mixture}: the weight {weight} of {name} is not above 0; {FORM}, or drop it')
    return value


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
