"""One bucket for the folder, and the way to it."""

import pytest


@pytest.fixture(scope='session')
def server():
    """A running Bucket; tensorstore asks the environment once alone, so it is the same one for all tests."""
    pytest.importorskip('gcsfs')
    pytest.importorskip('gcp_storage_emulator')
    from bucket import Bucket

    running = Bucket()
    yield running
    running.close()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """The Bucket, empty, as gs://bucket; the user's caches are in a folder of the test."""
    server.clear()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user-cache'))
    yield server
    server.clear()
