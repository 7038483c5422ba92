"""Amazon's S3, where `s3fs` and `moto[server]` are installed: they are many packages, and no part of the test extra."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import files
from gpt_jax.checkpoints import Checkpoints, load
from gpt_jax.data import DataConfig, prepare
from gpt_jax.errors import InputError

pytest.importorskip('s3fs')
moto = pytest.importorskip('moto.server')
boto3 = pytest.importorskip('boto3')
from gpt_jax import storage  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def store():
    """An emulated S3 with one bucket, `bucket`."""
    server = moto.ThreadedMotoServer(ip_address='127.0.0.1', port=0)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('AWS_ENDPOINT_URL', 'http://{}:{}'.format(*server.get_host_and_port()))
        for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
            patch.setenv(name, 'anything')
        patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
        boto3.client('s3').create_bucket(Bucket='bucket')
        yield server
    server.stop()


def test_files_and_conditions(store):
    folder = files.as_path('s3://bucket/folder')
    with files.replacing(folder / 'a.json') as file:
        file.write(b'{"a": 1}')
    assert files.read_json(folder / 'a.json') == {'a': 1}
    assert files.listing(folder) == {'a.json': 8}
    assert (folder.is_dir(), folder.is_file(), (folder / 'a.json').is_file()) == (True, False, True)
    path = folder / 'lock'
    assert [storage.put_if(path, data, None) for data in (b'1', b'2')] == [True, False]
    _, version = storage.get_version(path)
    assert [storage.put_if(path, data, version) for data in (b'3', b'4')] == [True, False]
    assert storage.get_version(path)[0] == b'3'
    with pytest.raises(InputError, match='x: there is no bucket s3://nobody-has-this'):
        storage.check_reachable(files.as_path('s3://nobody-has-this/run'), 'x')


def test_data_are_shared_and_checkpoints_read(store, tmp_path, monkeypatch):
    path = tmp_path / 'text.txt'
    path.write_text(''.join(f'Paragraph {i} of a text.\n\n' for i in range(400)), encoding='utf-8')
    config = DataConfig('text', str(path), documents='block', tokenizer='char', num_workers=1)
    expected = prepare(dataclasses.replace(config, cache_dir=str(tmp_path / 'local')), log=str)
    for machine in ('first', 'second'):
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / machine))
        data = prepare(dataclasses.replace(config, cache_dir='s3://bucket/data'), log=str)
        assert data.fingerprint == expected.fingerprint
    with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
        checkpoints.save(3, {'w': jnp.arange(6.0)}, {'mu': jnp.ones(3)}, {'n': 1}, 1.0)
    storage.upload_folder(tmp_path / 'run', files.as_path('s3://bucket/run'))
    loaded = load('s3://bucket/run')
    np.testing.assert_array_equal(loaded.params['w'], np.arange(6.0))
    assert not (loaded.folder / 'optimizer').exists()  # nobody asked for it
