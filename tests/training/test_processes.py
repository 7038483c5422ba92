"""Training in two real processes is training in one: every device gets its own rows, whatever process it is of."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from mesh_steps import mesh_steps

from gpt_jax.checkpoints import load
from gpt_jax.training import train
from gpt_jax.training.workdir import STALE_SECONDS

pytestmark = pytest.mark.slow

# By the number of processes and of the devices of each: axes that span processes, and some that do not.
MESHES = {
    (2, 2): [(1, 1, 4, 1), (2, 1, 2, 1), (1, 2, 1, 2)],
    (4, 1): [(1, 4, 1, 1), (2, 1, 2, 1)],
}
STEPS = """
import json
from mesh_steps import mesh_steps
from gpt_jax.data import Batches, ValidationBatches
asked = []
for kind in (Batches, ValidationBatches):
    def counting(self, step, start, stop, kind=kind, rows=kind.rows):
        asked.append([kind.__name__, step, start, stop])
        return rows(self, step, start, stop)
    kind.rows = counting
reports = []
for sizes in json.loads(arguments[0]):
    asked.clear()
    numbers = mesh_steps(sizes)
    reports.append([numbers, list(asked)])
print(json.dumps(reports))
"""
RUN = """
import json
from gpt_jax.errors import InputError
from gpt_jax.inference import sample_text
from gpt_jax.training import train
config, workdir, locked = json.loads(arguments[0]), arguments[1], arguments[2]
report = {}
try:
    train(config, locked)
except InputError as error:
    report['refused'] = str(error)
result = train(config, workdir, sample=sample_text)
report |= {'step': result.step, 'val_loss': result.val_loss}
print(json.dumps(report))
"""
GO_ON = """
import json
import numpy as np
from gpt_jax.checkpoints import load
from gpt_jax.config import MeshConfig
from gpt_jax.parallel import make_mesh, tree_shardings
from gpt_jax.training import train
config, workdir, arrays = json.loads(arguments[0]), arguments[1], np.load(arguments[2])
mesh = make_mesh(MeshConfig(**config['mesh']))
params = load(workdir, sharding=lambda tree: tree_shardings(mesh, tree, tree)).params
same = [
    np.asarray(shard.data).tobytes() == arrays[jax.tree_util.keystr(path)][shard.index].tobytes()
    for path, leaf in jax.tree.leaves_with_path(params)
    for shard in leaf.addressable_shards
]
print(json.dumps({'same': all(same), 'shards': len(same), 'step': train(config, workdir).step}))
"""


@pytest.fixture(scope='module')
def expected():
    return mesh_steps((1, 1, 1, 1), jax.devices()[:1])


@pytest.mark.parametrize('processes', MESHES)
def test_losses_on_every_mesh_are_those_of_one_process_and_each_reads_its_share(several, expected, processes):
    count, devices = processes
    reports = several(count, STEPS, json.dumps(MESHES[processes]), devices=devices)
    for sizes, *of_processes in zip(MESHES[processes], *reports, strict=True):
        for numbers, _ in of_processes:
            assert numbers[::2] == pytest.approx(expected[::2], rel=1e-6), sizes  # losses
            assert numbers[1::2] == pytest.approx(expected[1::2], rel=2e-5), sizes  # norms of gradients
        # Rows of the batch of 8 that each asks for at a step: those of its own devices.
        data_parts, tensor_parts = sizes[0] * sizes[1], sizes[2] * sizes[3]
        for index, (_, asked) in enumerate(of_processes):
            part = index * devices // tensor_parts
            parts = max(devices // tensor_parts, 1)
            spans = {(start, stop) for name, step, start, stop in asked if name == 'Batches' and step == 0}
            each = 8 // data_parts
            assert spans == {(each * n, each * (n + 1)) for n in range(part, part + parts)}, sizes
            assert len(asked) == len({tuple(one) for one in asked})  # each only once


def test_a_run_of_two_processes_is_like_one_and_goes_on_with_one_or_four(several, tiny_config, finished_run, tmp_path):
    changes = {'mesh.data': 1, 'mesh.tensor': 2}
    held = tmp_path / 'held'
    held.mkdir()
    # Alive for as long as two processes take to start, however slow the machine.
    holder = {'host': 'elsewhere', 'pid': 7, 'started': 1, 'time': time.time() + STALE_SECONDS - 5}
    (held / '.holder.json').write_text(json.dumps(holder))
    run = tmp_path / 'run'
    reports = several(2, RUN, json.dumps(tiny_config(changes).to_dict()), run, held)
    refusals = [report.pop('refused') for report in reports]
    assert 'process 7 on host elsewhere' in refusals[0]
    assert 'was refused to process 0: see its message' in refusals[1]
    assert reports[0] == reports[1]
    assert reports[0]['step'] == 6
    assert reports[0]['val_loss'] == pytest.approx(finished_run.val_loss, rel=1e-4)
    assert losses(run) == pytest.approx(losses(finished_run.workdir), rel=1e-4)
    assert (run / 'samples.txt').read_text() == (finished_run.workdir / 'samples.txt').read_text()
    assert not (run / '.lock').exists()

    # One process, of eight devices, reads what two have saved.
    params = load(run / 'checkpoints' / '6').params
    leaves = jax.tree.leaves_with_path(params)
    np.savez(tmp_path / 'arrays.npz', **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    changes['train.steps'] = 8
    for_one, for_four = shutil.copytree(run, tmp_path / 'one'), shutil.copytree(run, tmp_path / 'four')
    assert train(tiny_config({'train.steps': 8}), for_one).step == 8
    four = tiny_config({'train.steps': 8, 'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 2}).to_dict()
    reports = several(4, GO_ON, json.dumps(four), for_four, tmp_path / 'arrays.npz')
    assert reports == [{'same': True, 'shards': len(leaves), 'step': 8}] * 4
    assert losses(for_four) == pytest.approx(losses(for_one), rel=1e-4)
    assert losses(for_four)[:6] == losses(run)


def losses(workdir):
    """Of each step, as logged."""
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    steps, losses = zip(*[(row['step'], row['loss']) for row in rows if 'loss' in row], strict=True)
    assert list(steps) == list(range(1, len(steps) + 1))
    return list(losses)
