"""Two processes that share one folder save, keep, restore and refuse together."""

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
    from gpt_jax.checkpoints import Checkpoints
    from gpt_jax.errors import InputError

    sharding = NamedSharding(Mesh(np.array(jax.devices()), 'x'), PartitionSpec('x'))
    whole = np.arange(8.0, dtype=np.float32)
    w = jax.make_array_from_callback((8,), sharding, lambda index: whole[index])
    shapes = {'w': jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}
    report = {}
    with Checkpoints(folder) as checkpoints:
        for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
            report.setdefault('wrote', []).append(checkpoints.save(step, {'w': w}, {'mu': {'w': w}}, {}, loss))
        report['again'] = checkpoints.save(3, {'w': w}, None, {})
        checkpoints.wait()
        report['steps'] = checkpoints.steps()
        params, optimizer, _ = checkpoints.restore(3, shapes, {'mu': shapes})
        report['same'] = all(
            np.array_equal(shard.data, whole[shard.index])
            for leaf in (params['w'], optimizer['mu']['w']) for shard in leaf.addressable_shards
        )
        if index == 0:
            with open(f'{folder}/3/_CHECKPOINT_METADATA', 'a') as file:
                file.write(' ')
        jax.experimental.multihost_utils.sync_global_devices('damaged')
        try:
            checkpoints.restore(3, shapes, {'mu': shapes})
        except InputError as error:
            report['error'] = str(error)
    print(json.dumps(report))
"""


@pytest.mark.slow
def test_two_processes_save_restore_and_refuse_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    children = [
        subprocess.Popen(
            [sys.executable, '-c', CHILD, str(index), str(port), str(tmp_path / 'checkpoints')],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], outputs
    reports = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    errors = [report.pop('error') for report in reports]
    assert reports == [{'wrote': [True] * 3, 'again': False, 'steps': [1, 3], 'same': True}] * 2
    assert sum('_CHECKPOINT_METADATA has' in error for error in errors) == 1
    assert sum('names the file: see its message' in error for error in errors) == 1
