"""Two processes hash one checkpoint, each a share of its files, on writing and on reading."""

import json
import os
import socket
import subprocess
import sys

import pytest

CHILD = """if True:
    import json, sys
    import jax
    index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=index)
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from gpt_jax.checkpoints import Checkpoints, load, verifying
    from gpt_jax.errors import InputError

    hashed, sha256 = [], verifying.sha256

    def counting(path):
        hashed.append(path.relative_to(folder).as_posix().removeprefix('saving_'))
        return sha256(path)

    def lap():
        names = sorted(hashed)
        hashed.clear()
        return names

    def full(path):
        raise OSError(28, 'No space left on device')

    verifying.sha256 = counting
    sharding = NamedSharding(Mesh(np.array(jax.devices()), 'x'), PartitionSpec('x'))
    w = jax.make_array_from_callback((8,), sharding, lambda index: np.arange(8, dtype=np.float32)[index])
    report = {}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {'w': w}, {'mu': {'w': w}}, {}, 1.0)
        checkpoints.wait()
        report['written'] = lap()
        loaded = load(f'{folder}/1', sharding=sharding)
        report['read'] = lap()
        shards = loaded.params["w"].addressable_shards
        report["same"] = all(np.array_equal(shard.data, np.arange(8)[shard.index]) for shard in shards)
        if index == 1:
            verifying.sha256 = full  # what a process cannot hash, process 0 does
        checkpoints.save(2, {'w': w}, None, {}, 0.5)
        checkpoints.wait()
        report['alone'] = lap()
        verifying.sha256 = full if index == 0 else counting
        checkpoints.save(3, {'w': w}, None, {}, 0.25)
        try:
            checkpoints.wait()
        except (OSError, InputError) as error:
            report['error'] = f'{type(error).__name__}: {error}'
        report['steps'] = checkpoints.steps()
    print(json.dumps(report))
"""


@pytest.mark.slow
def test_two_processes_hash_each_a_share_and_what_one_cannot_process_0_does(tmp_path, one_device):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    environment = os.environ | one_device
    folder = tmp_path / 'checkpoints'
    children = [
        subprocess.Popen(
            [sys.executable, '-c', CHILD, str(index), str(port), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], outputs
    first, second = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    assert first['same']
    assert second['same']
    meta = '1/meta/metadata'  # the record, a small file, is hashed once more by whoever reads it
    assert all(len(report['written']) > 3 for report in (first, second))
    assert set(first['written']) & set(second['written']) <= {meta}
    assert {name.split('/')[0] for name in first['written'] + second['written']} == {'1'}
    params = {name for name in first['written'] + second['written'] if not name.startswith('1/optimizer/')}
    assert set(first['read']) | set(second['read']) == params
    assert set(first['read']) & set(second['read']) <= {meta}
    assert second['alone'] == []
    listed = json.loads((folder / '2' / 'manifest.sha256.json').read_text())['files']
    there = {path.relative_to(folder / '2').as_posix() for path in (folder / '2').rglob('*') if path.is_file()}
    assert there == {*listed, 'manifest.sha256.json'}
    assert {f'2/{name}' for name in listed} <= set(first['alone'])
    assert first['steps'] == second['steps'] == [2]
    assert first['error'].startswith(f'WriteError: {folder / "3"} cannot be written (No space left on device)')
    assert second['error'] == f'InputError: a checkpoint in {folder} was not saved: see the message of process 0'
