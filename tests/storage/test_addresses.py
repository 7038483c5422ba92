"""What is an address, what a store is asked, and the one line where it does not answer."""

import contextlib
import hashlib
import socket
import sys

import pytest

from gpt_jax import files
from gpt_jax.errors import InputError

pytest.importorskip('gcsfs')
from gpt_jax import storage


@pytest.mark.parametrize('given', ['gs://bucket/a/b', 'gs:/bucket/a/b', 'gs://bucket/a/b/'])
def test_an_address_is_no_local_path(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = files.as_path(given)
    assert (str(path), path.scheme, path.bucket, path.key) == ('gs://bucket/a/b', 'gs', 'bucket', 'a/b')
    assert (str(path / 'c'), str(path.parent), path.name) == ('gs://bucket/a/b/c', 'gs://bucket/a', 'b')
    assert type(path.resolve().expanduser() / 'c') is type(path.with_name('c')) is storage.Address
    path.mkdir(parents=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('given', 'what'),
    [
        ('gs://', "'' is no name of a bucket"),
        ('gs://Bucket!/x', "'Bucket!' is no name of a bucket"),
        ('gs://bucket/a//b', 'no empty part'),
        ('gs://bucket/../b', 'no empty part'),
        ('gs://bucket/run[1]', 'no empty part'),
        ('gs://bucket/a\nb', 'no empty part'),
        ('hf://user/model', 'hf: is no place on this machine'),
        ('https://bucket/x', 'https: is no place on this machine'),
        ('file:///tmp/x', 'file: is no place on this machine'),
    ],
)
def test_what_is_no_address_is_refused_in_one_line(given, what):
    with pytest.raises(InputError, match='--workdir=') as error:
        files.as_path(given, f'--workdir={given}')
    assert what in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(('scheme', 'package', 'extra'), [('gs', 'gcsfs', 'gcs'), ('s3', 's3fs', 's3')])
def test_a_missing_extra_is_named(scheme, package, extra, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"--workdir=x: {scheme}:// needs {package} .*pip install -e '\.\[{extra}\]'"):
        files.as_path(f'{scheme}://bucket/run', '--workdir=x')
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_bucket_are_as_those_of_a_disk(bucket):
    folder = files.as_path('gs://bucket/folder')
    assert not folder.exists()
    with files.replacing(folder / 'a.json') as file:
        file.write(b'{"a": 1}')
    with files.replacing(folder / 'b/empty') as file:
        pass
    with contextlib.suppress(RuntimeError), files.replacing(folder / 'a.json') as file:
        file.write(b'{"a":')
        raise RuntimeError  # the old one stays
    assert files.read_json(folder / 'a.json') == {'a': 1}
    assert files.read_bytes('gs://bucket/folder/b/empty') == b''
    assert files.sha256(folder / 'a.json') == hashlib.sha256(b'{"a": 1}').hexdigest()
    assert files.listing(folder) == {'a.json': 8, 'b/empty': 0}
    assert [path.name for path in folder.iterdir()] == ['a.json', 'b']
    assert (folder.is_dir(), folder.is_file(), (folder / 'a.json').is_file()) == (True, False, True)
    with pytest.raises(InputError, match=r'a\.json is larger than the 3 bytes'):
        files.read_bytes(folder / 'a.json', most=3)
    with pytest.raises(InputError, match='gs://bucket/folder is a folder'):
        files.read_bytes(folder)
    with pytest.raises(InputError, match=r'gs://bucket/none cannot be read \(No such file'):
        files.read_bytes('gs://bucket/none')
    storage.move(folder, folder.with_name('moved'))
    assert bucket.names() == ['moved/a.json', 'moved/b/empty']
    (folder.with_name('moved')).rmtree()
    assert bucket.names() == []


@pytest.mark.parametrize('end', [b'\r', b'\n', b'\r\n', b'\0', b'--==0==--'])
def test_an_object_is_its_bytes_to_the_last(bucket, tmp_path, end):
    (tmp_path / 'file').write_bytes(b'data' + end)
    storage.upload(tmp_path / 'file', files.as_path('gs://bucket/uploaded'))
    files.as_path('gs://bucket/written').write_bytes(b'data' + end)
    assert [bucket.read(name) for name in ('uploaded', 'written')] == [b'data' + end] * 2


def test_a_large_object_is_read_in_stretches(bucket, monkeypatch):
    monkeypatch.setattr(storage, 'STRETCH', 1000)
    data = bytes(range(256)) * 17
    path = files.as_path('gs://bucket/large')
    path.write_bytes(data)
    assert [len(stretch) for stretch in storage.stretches(path)] == [1000] * 4 + [352]
    assert files.sha256(path) == hashlib.sha256(data).hexdigest()


def test_only_one_of_two_writes_what_both_have_read(bucket):
    path = files.as_path('gs://bucket/lock')
    assert storage.get_version(path) is None
    assert storage.put_if(path, b'first', None)
    assert not storage.put_if(path, b'second', None)
    _, version = storage.get_version(path)
    assert storage.put_if(path, b'third', version)
    assert not storage.put_if(path, b'fourth', version)
    assert storage.get_version(path)[0] == b'third'


def test_a_write_whose_answer_is_lost_is_ones_own(bucket):
    path, asked = files.as_path('gs://bucket/lock'), []

    def lose_the_first_answer(method, url):
        if method == 'POST' and not asked:
            asked.append(url)
            bucket.write('lock', b'mine')
            return 503
        return None

    bucket.fails = lose_the_first_answer
    assert storage.put_if(path, b'mine', None)
    assert asked


def test_a_store_that_is_busy_is_asked_again(bucket):
    answers = [503]
    bucket.fails = lambda method, url: answers.pop() if answers and method == 'POST' else None
    files.as_path('gs://bucket/a').write_bytes(b'a')
    assert bucket.read('a') == b'a'
    assert not answers


@pytest.mark.parametrize(
    ('status', 'what'),
    [(401, 'log in: gcloud auth'), (403, 'log in: gcloud auth'), (404, 'there is no bucket gs://bucket')],
)
def test_a_bucket_that_is_not_ours_is_one_line(bucket, status, what):
    bucket.fails = lambda method, url: status
    with pytest.raises(InputError, match='--workdir=x: ') as error:
        storage.check_reachable(files.as_path('gs://bucket/run'), '--workdir=x')
    assert what in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_store_that_nobody_answers_for_is_one_line(bucket, monkeypatch):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://127.0.0.1:{probe.getsockname()[1]}')
        with pytest.raises(InputError, match=r'--workdir=x: gs://bucket cannot be reached \(127.*Connection refused'):
            storage.check_reachable(files.as_path('gs://bucket/run'), '--workdir=x')


def test_copies_are_fetched_once_and_the_oldest_make_room(bucket, tmp_path, monkeypatch):
    for name in ('a', 'b', 'c'):
        files.as_path(f'gs://bucket/{name}/file').write_bytes(name.encode() * 100)
    read = []
    bucket.fails = lambda method, url: read.append(url) if 'alt=media' in url else None
    monkeypatch.setattr(storage, 'MOST_CACHED', 250)
    cache = tmp_path / 'copies'

    def copy(name):
        return storage.local_copy(files.as_path(f'gs://bucket/{name}'), ['file'], cache)

    first = copy('a')
    assert (first / 'file').read_bytes() == b'a' * 100
    copy('b')
    assert copy('a') == first
    assert len(read) == 2
    assert sorted(path.name for path in copy('c').parent.iterdir()) == ['c']
    assert first.is_dir()
    assert len(list(cache.iterdir())) == 2  # that of b, used longest ago, is gone
    files.as_path('gs://bucket/a/file').write_bytes(b'new')
    assert (copy('a') / 'file').read_bytes() == b'new'
