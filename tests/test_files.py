import os

import pytest

from gpt_jax.errors import InputError
from gpt_jax.files import new_folder


def test_the_folder_appears_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / 'a' / 'b') as folder:
        (folder / 'file').write_text('x')
        assert not (tmp_path / 'a' / 'b').exists()
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['b']
    assert (tmp_path / 'a' / 'b' / 'file').read_text() == 'x'


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_nothing(tmp_path, error):
    def fail():
        with new_folder(tmp_path / 'b') as folder:
            (folder / 'file').write_text('x')
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / 'b').mkdir()
    with new_folder(tmp_path / 'b') as folder:
        (folder / 'file').touch()
    assert (tmp_path / 'b' / 'file').exists()


def full(path):
    path.mkdir()
    (path / 'file').touch()


@pytest.mark.parametrize('make', [lambda p: p.write_text(''), lambda p: os.symlink('nowhere', p), full])
def test_what_stands_there_is_left_alone(tmp_path, make):
    make(tmp_path / 'b')
    with pytest.raises(InputError, match='b exists already; name a new folder'), new_folder(tmp_path / 'b'):
        pytest.fail('the block must not run')
    assert [path.name for path in tmp_path.iterdir()] == ['b']


def test_a_place_where_no_folder_can_be_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with (
        pytest.raises(InputError, match=r'file/b cannot be made \(Not a directory\)'),
        new_folder(tmp_path / 'file' / 'b'),
    ):
        pytest.fail('the block must not run')
