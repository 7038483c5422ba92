import contextlib
import errno
import os
import pickle
import resource
import socket

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt_jax import files
from gpt_jax.errors import InputError
from gpt_jax.files import (
    WriteError,
    appending,
    check_local,
    check_regular,
    check_writable,
    new_folder,
    read_bytes,
    read_json,
    read_text,
    replacing,
    system_error,
)


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


@pytest.mark.parametrize('path', ['az://bucket/run', 'hdfs://b', 'hf://a/b', 'file:///tmp/x', 'gcs:/bucket'])
def test_an_address_is_no_folder(path):
    with pytest.raises(InputError, match=r'--workdir=.*no place on this machine'):
        check_local(path, f'--workdir={path}')


@pytest.mark.parametrize('path', ['a', './gs:/x', '/a:/b', 'a b', 'C3'])
def test_a_folder_may_have_any_name(path):
    check_local(path)


# Writing. A limit of a file's size stands for a full disk.


@contextlib.contextmanager
def small_disk():
    """Files hold 10 000 bytes at most for the length of a block: pytest's own output may be a longer one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_file_and_is_told_in_one_line(tmp_path):
    (tmp_path / 'file').write_text('old')
    with (
        small_disk(),
        pytest.raises(WriteError, match=r'file cannot be written \(File too large\); free some space') as error,
        replacing(tmp_path / 'file') as file,
    ):
        file.write(bytes(20_000))
    assert isinstance(error.value, InputError)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / 'file'))
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('file', 'old')]


def foreign_library(folder):
    save_file({'w': np.zeros(20_000, np.float32)}, folder / 'model.safetensors')


@pytest.mark.parametrize('write', [lambda folder: (folder / 'a').write_bytes(bytes(20_000)), foreign_library])
def test_a_full_disk_leaves_no_folder_and_is_told_in_one_line(tmp_path, write):
    with (
        small_disk(),
        pytest.raises(WriteError, match=r'b cannot be written \(File too large\)'),
        new_folder(tmp_path / 'b') as folder,
    ):
        write(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_library_makes_again_while_it_is_removed_is_gone_in_the_end(tmp_path, monkeypatch):
    folder, moments = tmp_path / 'folder', [True, False, True, False, False, True]

    def a_moment_later(_):
        if moments and moments.pop(0):  # as tensorstore does for a file that it is about to write
            (folder / 'd').mkdir(parents=True)

    (folder / 'd').mkdir(parents=True)
    monkeypatch.setattr(files.time, 'sleep', a_moment_later)
    files.remove_folder(folder)
    assert moments == []
    assert not folder.exists()


def test_another_error_in_the_block_comes_out_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / 'file'):
        (tmp_path / 'other').read_bytes()
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / 'folder'):
        (tmp_path / 'other').read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_made_through_a_link_under_a_temporary_name_that_was_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, 'token_hex', lambda _: 'guessed')
    (tmp_path / 'victim').write_text('precious')
    (tmp_path / '.file.guessed.tmp').symlink_to(tmp_path / 'victim')
    with pytest.raises(WriteError, match='File exists'), replacing(tmp_path / 'file') as file:
        file.write(b'x')
    assert (tmp_path / 'victim').read_text() == 'precious'


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / 'victim').write_text('precious')
    for name in ('victim', 'nowhere'):
        (tmp_path / 'file').symlink_to(tmp_path / name)
        with replacing(tmp_path / 'file') as file:
            file.write(b'x')
        assert not (tmp_path / 'file').is_symlink()
        (tmp_path / 'file').unlink()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('victim', 'precious')]


def test_lines_are_added_to_a_file_of_its_own_alone(tmp_path):
    for line in ('é\n', 'two\n'):
        with appending(tmp_path / 'file') as file:
            file.write(line.encode())
    assert (tmp_path / 'file').read_text(encoding='utf-8') == 'é\ntwo\n'
    (tmp_path / 'link').symlink_to(tmp_path / 'file')
    (tmp_path / 'nowhere').symlink_to(tmp_path / 'new')
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    for name in ('link', 'nowhere', 'folder', 'pipe'):
        with pytest.raises(WriteError, match=rf'{name} cannot be written \(.*move it away'):
            appending(tmp_path / name)
    assert not (tmp_path / 'new').exists()
    os.link(tmp_path / 'file', tmp_path / 'backup')
    with appending(tmp_path / 'file') as file:
        file.write(b'three\n')
    assert (tmp_path / 'file').read_text(encoding='utf-8') == 'é\ntwo\nthree\n'
    assert (tmp_path / 'backup').read_text(encoding='utf-8') == 'é\ntwo\n'


@pytest.mark.parametrize('name', ['ü' * 127, 'a' * 255, '[x]*?'])
def test_a_file_and_a_folder_may_have_any_name_that_the_system_allows(tmp_path, name):
    with replacing(tmp_path / name) as file:
        file.write(b'x')
    (tmp_path / name).unlink()
    with new_folder(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize('name', ['az://bucket', 'file/b', 'loop', 'x' * 300, 'nul\0', '~nobody_at_all/b'])
def test_a_place_where_no_folder_can_be_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'loop').symlink_to('loop')
    with pytest.raises(InputError) as error, new_folder(name):
        pytest.fail('the block must not run')
    assert '\n' not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'loop']


@pytest.mark.parametrize(
    ('error', 'number'),
    [
        (OSError(28, 'No space left on device'), 28),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"), 28),
        (RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)'), 28),
        (ValueError('something else'), None),
        (KeyError(28), None),
    ],
)
def test_the_system_is_told_of_in_many_ways(error, number):
    wrapped = RuntimeError('a library')
    wrapped.__cause__ = error
    for each in (error, wrapped):
        found = system_error(each)
        assert (found and found.errno) == number


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    check_writable(tmp_path / 'a' / 'b')
    assert list((tmp_path / 'a' / 'b').iterdir()) == []
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'b', '/proc/nowhere'):
        with pytest.raises(WriteError, match='cannot be written'):
            check_writable(folder)
