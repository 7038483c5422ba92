from fractions import Fraction

import pytest

from gpt_jax.data.mixture import parse_mixture
from gpt_jax.errors import InputError


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
