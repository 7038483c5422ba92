"""Two processes that share no folder, but a bucket."""

import json

import jax
import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.training import train

TRAIN = """if True:
    import json, os
    from gpt_jax.training import train
    os.environ['XDG_CACHE_HOME'] = arguments[1] + str(index)  # each host has a disk of its own
    result = train(json.loads(arguments[0]), 'gs://bucket/run')
    print(json.dumps({'step': result.step, 'loss': result.loss}))
"""


@pytest.mark.slow
def test_two_hosts_train_in_a_bucket_and_one_goes_on(bucket, tiny_config, two_processes, finished_run, tmp_path):
    keys = {'data.cache_dir': 'gs://bucket/data', 'mesh.fsdp': 2, 'mesh.data': 1, 'train.steps': 3}
    keys |= {'schedule.decay_steps': 6}
    config = tiny_config(keys)
    first, second = two_processes(TRAIN, config.to_json(), tmp_path / 'cache')
    assert first == second
    assert first['step'] == 3
    names = bucket.names('run/')
    processes = {name.split('/')[4] for name in names if name.startswith('run/checkpoints/3/params/ocdbt')}
    assert processes == {'ocdbt.process_0', 'ocdbt.process_1'}  # each wrote what it holds
    assert all((tmp_path / f'cache{index}' / 'gpt_jax' / 'data-of-buckets').is_dir() for index in range(2))
    assert 'run/.holder.json' not in names
    assert load('gs://bucket/run').step == 3
    result = train(tiny_config({'data.cache_dir': 'gs://bucket/data', 'schedule.decay_steps': 6}), 'gs://bucket/run')
    assert result.step == 6
    lines = bucket.read('run/metrics.jsonl').splitlines()
    losses = {row['step']: row['loss'] for row in map(json.loads, lines) if 'loss' in row}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    for expected, found in zip(jax.tree.leaves(finished_run.params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
