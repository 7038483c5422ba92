"""One run at a time in a workdir of a bucket."""

import json
import os
import socket
import subprocess
import time

import pytest

from gpt_jax import storage
from gpt_jax.errors import InputError
from gpt_jax.files import as_path
from gpt_jax.training import workdir

RUN = 'gs://bucket/run'


def holder(**changes):
    own = workdir._record()
    return json.dumps(own | changes).encode()


def test_a_run_holds_its_workdir_until_it_ends(bucket):
    with workdir.locked(RUN) as path:
        assert path == as_path(RUN)
        record = json.loads(bucket.read('run/.holder.json'))
        assert (record['host'], record['pid']) == (socket.gethostname(), os.getpid())
        with (
            pytest.raises(InputError, match=f'{RUN}: another run is writing to it, process {os.getpid()} '),
            workdir.locked(RUN),
        ):
            pass
    assert bucket.names() == []
    with workdir.locked(RUN):
        pass


def test_a_run_whose_place_was_taken_is_told_so(bucket):
    with workdir.locked(RUN) as path:
        workdir.check_still_ours(path)
        bucket.write('run/.holder.json', holder(host='node7', pid=4711))
        with pytest.raises(InputError, match=f'--workdir={RUN}: process 4711 on host node7 has taken it over'):
            workdir.check_still_ours(path)
    assert bucket.names() == ['run/.holder.json']  # the other's


@pytest.mark.parametrize('where', ['another host', "another container of this host's name"])
def test_a_holder_elsewhere_is_dead_when_its_heart_has_stopped(bucket, where):
    changes = {'host': 'elsewhere'} if where == 'another host' else {'system': 'another', 'pid': 2**22}
    bucket.write('run/.holder.json', holder(time=time.time() - workdir.STALE_SECONDS + 20, **changes))
    with (
        pytest.raises(InputError, match=r'its last heartbeat is 4\d s old, and at 60 s'),
        workdir.locked(RUN),
    ):
        pass
    bucket.write('run/.holder.json', holder(time=time.time() - workdir.STALE_SECONDS - 1, **changes))
    with workdir.locked(RUN):
        assert json.loads(bucket.read('run/.holder.json'))['pid'] == os.getpid()


def test_a_killed_holder_on_this_machine_is_replaced_at_once(bucket):
    child = subprocess.Popen(['true'])
    child.wait()
    bucket.write('run/.holder.json', holder(pid=child.pid, started=1))
    with workdir.locked(RUN):
        pass


def test_of_two_that_want_a_dead_ones_place_one_gets_it(bucket, monkeypatch):
    """Both have read the same record; the store compares."""
    bucket.write('run/.holder.json', holder(host='elsewhere', time=0.0))
    read = storage.get_version

    def read_and_be_late(path):
        found = read(path)
        monkeypatch.setattr(storage, 'get_version', read)
        assert storage.put_if(path, holder(host='the other one'), found[1])
        return found

    monkeypatch.setattr(storage, 'get_version', read_and_be_late)
    with pytest.raises(InputError, match='another run is starting in it'), workdir.locked(RUN):
        pass
    assert json.loads(bucket.read('run/.holder.json'))['host'] == 'the other one'


def test_the_heart_beats_and_gives_way_to_one_that_took_the_place(bucket, monkeypatch):
    monkeypatch.setattr(workdir, 'HEARTBEAT_SECONDS', 0.01)
    with workdir.locked(RUN):
        first = bucket.read('run/.holder.json')
        deadline = time.monotonic() + 30
        while bucket.read('run/.holder.json') == first:
            assert time.monotonic() < deadline
        other = holder(host='elsewhere')
        with bucket.lock:
            bucket.write('run/.holder.json', other)
    assert bucket.read('run/.holder.json') == other


def test_a_bucket_that_cannot_be_written_to_is_one_line(bucket):
    bucket.fails = lambda method, url: 403 if method == 'POST' else None
    with (
        pytest.raises(InputError, match=rf'{RUN} cannot be written to \(Forbidden') as error,
        workdir.locked(RUN),
    ):
        pass
    assert len(str(error.value).splitlines()) == 1


def test_s3_is_no_place_for_a_workdir(monkeypatch):
    monkeypatch.setattr(storage.importlib, 'import_module', lambda name: None)
    with (
        pytest.raises(InputError, match=r'--workdir=s3://bucket/run: orbax writes checkpoints to folders and to gs://'),
        workdir.locked('s3://bucket/run'),
    ):
        pass
