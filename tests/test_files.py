import os
import socket

import pytest

from gpt_jax.errors import InputError
from gpt_jax.files import check_local, check_regular, new_folder, read_bytes, read_json, read_text


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


def a_pipe(path):
    os.mkfifo(path)
    return path


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return path


def a_loop(path):
    path.symlink_to(path)
    return path


def holding(data):
    def make(path):
        path.write_bytes(data)
        return path

    return make


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'


@pytest.mark.parametrize('read', [read_bytes, read_text, read_json, check_regular])
@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda path: path, r'No such file'),
        (lambda path: path.mkdir() or path, 'is a folder'),
        (a_pipe, 'is a named pipe'),
        (a_socket, r'No such device'),
        (a_loop, r'[Tt]oo many'),
        (lambda _: '/dev/zero', 'is a device'),
        (lambda _: '/dev/full', 'is a device'),
        (lambda path: path.with_name('x' * 300), 'too long'),
        (lambda path: f'{path}\0', 'null'),
        (lambda path: f'{holding(b"")(path)}/inside', 'Not a directory'),
        (holding(POINTER), 'Git LFS pointer.*git lfs pull'),
    ],
)
def test_what_is_no_regular_file_is_refused_unread(tmp_path, read, make, message):
    with pytest.raises(InputError, match=message) as error:
        read(make(tmp_path / 'f'), '--flag=f')
    assert str(error.value).startswith('--flag=f ')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'12345', 'larger than the 4 bytes'),
        ('a'.encode('utf-16'), 'is UTF-16'),
        (b'\xff', r'not UTF-8 \(byte 0xff in line 1, at offset 0\)'),
        (b'', 'not JSON'),
        (b'NaN', 'NaN is no number of JSON'),
        (b'1e', 'not JSON'),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        read_json(holding(data)(tmp_path / 'f'), most=4)


@pytest.mark.parametrize('opening', ['[', '{"a":'])
def test_json_that_nests_for_ever_is_one_line(tmp_path, opening):
    with pytest.raises(InputError, match='nested too deeply'):
        read_json(holding(opening.encode() * 200_000)(tmp_path / 'f'))


def test_files_are_read_without_their_byte_order_mark(tmp_path):
    path = holding('\ufeff{"é": [1, 2.5]}'.encode())(tmp_path / 'f')
    assert read_text(path) == '{"é": [1, 2.5]}'
    assert read_json(path) == {'é': [1, 2.5]}
    assert read_bytes('/proc/self/status').startswith(b'Name:')  # says of itself that it has 0 bytes


@pytest.mark.parametrize('path', ['gs://bucket/run', 's3://b', 'hf://a/b', 'file:///tmp/x', 'gs:/bucket'])
def test_an_address_is_no_folder(path):
    with pytest.raises(InputError, match=r'--workdir=.*no place on this machine'):
        check_local(path, f'--workdir={path}')


@pytest.mark.parametrize('path', ['a', './gs:/x', '/a:/b', 'a b', 'C3'])
def test_a_folder_may_have_any_name(path):
    check_local(path)
