"""Two processes that share one folder save, keep, restore and refuse together."""

import pytest

CHILD = """
import json
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from gpt_jax.checkpoints import Checkpoints, recover
from gpt_jax.errors import InputError

(folder,) = arguments
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
    report['recovered'] = recover(folder, lambda line: None)['step']
    report['left'] = checkpoints.steps()
print(json.dumps(report))
"""


@pytest.mark.slow
def test_two_processes_save_restore_and_refuse_together(two_processes, tmp_path):
    reports = two_processes(CHILD, tmp_path / 'checkpoints')
    errors = [report.pop('error') for report in reports]
    both = {'wrote': [True] * 3, 'again': False, 'steps': [1, 3], 'same': True, 'recovered': 1, 'left': [1]}
    assert reports == [both] * 2
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['1', 'damaged-3']
    assert sum('_CHECKPOINT_METADATA has' in error for error in errors) == 1
    assert sum('names the file: see its message' in error for error in errors) == 1
