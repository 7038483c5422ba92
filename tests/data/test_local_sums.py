"""The sha256 of local files: read, remembered where they are large, and read again when they have changed."""

import hashlib
import json
import os

import pytest

from gpt_jax.data import local
from gpt_jax.errors import InputError

LONG_AGO = 1_600_000_000


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read, in order; files of 100 bytes are large."""
    names, sha256 = [], local.sha256

    def spy(path):
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(local, 'sha256', spy)
    monkeypatch.setattr(local, 'LARGE', 100)
    return names


def write(path, text, when=LONG_AGO):
    path.write_bytes(text)
    if when:
        os.utime(path, (when, when))
    return {'path': str(path), 'bytes': len(text), 'sha256': hashlib.sha256(text).hexdigest()}


def test_large_files_are_read_once_and_small_ones_each_time(tmp_path, read):
    paths = [tmp_path / 'large', tmp_path / 'small']
    expected = [write(paths[0], b'a' * 100), write(paths[1], b'b' * 99)]
    for _ in range(2):
        assert local.describe_files(paths, tmp_path / 'cache') == expected
    assert read == ['large', 'small', 'small']


@pytest.mark.parametrize(('text', 'when'), [(b'b' * 100, LONG_AGO + 1), (b'b' * 101, LONG_AGO)])
def test_a_file_of_another_size_or_time_is_read_again(tmp_path, read, text, when):
    path = tmp_path / 'file'
    write(path, b'a' * 100)
    local.describe_files([path], tmp_path / 'cache')
    expected = write(path, text, when)
    assert local.describe_files([path], tmp_path / 'cache') == [expected]
    assert read == ['file', 'file']


def test_a_file_that_has_just_changed_is_not_trusted_to_stay_so(tmp_path, read):
    path = tmp_path / 'file'
    write(path, b'a' * 100, when=None)
    for _ in range(2):
        local.describe_files([path], tmp_path / 'cache')
    assert read == ['file', 'file']


@pytest.mark.parametrize('content', [b'', b'{"half', b'\xff', b'[]'])
def test_a_damaged_memory_is_made_anew(tmp_path, read, content):
    path = tmp_path / 'file'
    expected = write(path, b'a' * 100)
    (tmp_path / local.SUMS).write_bytes(content)
    assert local.describe_files([path], tmp_path) == [expected]
    assert list(json.loads((tmp_path / local.SUMS).read_text())) == [str(path)]


def test_where_nothing_can_be_remembered_files_are_read_each_time(tmp_path, read):
    path = tmp_path / 'file'
    expected = write(path, b'a' * 100)
    for _ in range(2):
        assert local.describe_files([path], path) == [expected]  # a file is no folder
    assert read == ['file', 'file']


def test_a_file_that_cannot_be_read_is_refused_by_key(tmp_path):
    with pytest.raises(InputError, match=r'data\.path=.*gone: cannot be read \(No such file or directory\)'):
        local.describe_files([tmp_path / 'gone'], tmp_path)
