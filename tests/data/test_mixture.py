import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.data.mixture import Interleaving

weight_lists = st.lists(st.fractions(Fraction(1, 1000), 10, max_denominator=1000), min_size=1, max_size=9)


def halvings(weights):
    return math.ceil(math.log2(len(weights)))


@settings(max_examples=60, deadline=None)
@given(weight_lists)
def test_shares_are_right_after_any_number_of_rows(weights):
    interleaving, counts = Interleaving(weights), [0] * len(weights)
    for row in range(600):
        source, index = interleaving[row]
        assert index == counts[source]  # none of a source's rows is left out or given twice
        counts[source] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - weight / sum(weights) * (row + 1)) < max(halvings(weights), 1e-9)


@settings(max_examples=60, deadline=None)
@given(weight_lists, st.integers(0, 10**12))
def test_no_source_starves_however_late_in_the_run(weights, start):
    interleaving = Interleaving(weights)
    for source, weight in enumerate(weights):
        gap = math.ceil(2 * max(halvings(weights), 1) * sum(weights) / weight)
        assert any(interleaving[row][0] == source for row in range(start, start + min(gap, 3000))) or gap > 3000


def test_weights_hold_to_a_thousandth_over_a_run():
    weights = [Fraction(weight) for weight in ('0.33', '0.27', '0.2', '0.15', '0.04', '0.01')]
    interleaving = Interleaving(weights)
    # By how many of a source's rows came before: exact at any length, without walking through the run.
    for rows in (5_000, 10**6, 10**9):
        latest = {}
        for row in range(rows - 500, rows):
            source, index = interleaving[row]
            latest[source] = index + 1
        for source, weight in enumerate(weights):
            assert abs(latest[source] / rows - weight) < 1e-3


def test_two_equal_sources_take_turns():
    order = [Interleaving([Fraction(1), Fraction(1)])[row][0] for row in range(8)]
    assert all(one != other for one, other in itertools.pairwise(order))


def test_a_single_source_gets_every_row():
    assert [Interleaving([Fraction(3)])[row] for row in range(4)] == [(0, 0), (0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize('weights', [[], [Fraction(0)], [Fraction(1), Fraction(-1)]])
def test_interleaving_without_weights_above_zero_is_a_bug(weights):
    with pytest.raises(ValueError, match='all above 0'):
        Interleaving(weights)
