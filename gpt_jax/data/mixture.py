"""Mixtures of corpora: what `data.mixture` says."""

import dataclasses
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
