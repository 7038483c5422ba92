import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.data.mixture import Interleaving, parse_mixture
from gpt_jax.errors import InputError

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


def test_mixture_is_read_with_exact_weights_that_add_up_to_one():
    assert parse_mixture('python_docs:0.7,path/to/x.txt:0.3') == {
        'python_docs': Fraction(7, 10),
        'path/to/x.txt': Fraction(3, 10),
    }
    assert parse_mixture('a:1, b:3') == {'a': Fraction(1, 4), 'b': Fraction(3, 4)}
    assert parse_mixture('hub:some/repo@main:default:2,b:1e1') == {
        'hub:some/repo@main:default': Fraction(1, 6),
        'b': Fraction(5, 6),
    }
    assert list(parse_mixture('z:1,a:1')) == ['z', 'a']


@pytest.mark.parametrize(
    ('mixture', 'message'),
    [
        ('', "'' is no source with a weight"),
        ('a', "'a' is no source with a weight"),
        ('a:1,', "'' is no source with a weight"),
        (':1', "':1' is no source with a weight"),
        ('a:', "the weight '' of a is no number"),
        ('a:x', "the weight 'x' of a is no number"),
        ('a:nan', "the weight 'nan' of a is no number"),
        ('a:inf', "the weight 'inf' of a is no number"),
        ('a:1/0', "the weight '1/0' of a is no number"),
        ('a:-0.5,b:1', 'the weight -0.5 of a is not above 0'),
        ('a:1,b:0', 'the weight 0 of b is not above 0'),
        ('a:0,b:0', 'the weight 0 of a is not above 0'),
        ('a:1,b:1,a:1', 'a stands there twice'),
    ],
)
def test_mixture_that_cannot_be_is_one_line_with_the_key_its_value_and_the_form(mixture, message):
    with pytest.raises(InputError) as caught:
        parse_mixture(mixture)
    assert str(caught.value).startswith(f'data.mixture={mixture}: ')
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)
