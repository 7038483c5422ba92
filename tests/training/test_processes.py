"""Training in two real processes is training in one: every device gets its own rows, whatever process it is of."""

import json
import time

import jax
import pytest
from mesh_steps import mesh_steps

from gpt_jax.errors import InputError
from gpt_jax.training import train
from gpt_jax.training.workdir import STALE_SECONDS

pytestmark = pytest.mark.slow

# In two processes of one device each every axis spans processes; with two devices each, some do and some do not.
MESHES = {
    1: [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)],
    2: [(1, 1, 4, 1), (2, 1, 2, 1), (1, 2, 1, 2)],
}
STEPS = """
import json
from mesh_steps import mesh_steps
print(json.dumps([mesh_steps(sizes) for sizes in json.loads(arguments[0])]))
"""
RUN = """
import json
from gpt_jax.errors import InputError
from gpt_jax.training import train
config, workdir, locked = json.loads(arguments[0]), arguments[1], arguments[2]
report = {}
try:
    train(config, locked)
except InputError as error:
    report['refused'] = str(error)
result = train(config, workdir)
report |= {'step': result.step, 'val_loss': result.val_loss}
config['train']['steps'] = 8
report['longer'] = train(config, workdir).step
print(json.dumps(report))
"""


@pytest.fixture(scope='module')
def expected():
    return mesh_steps((1, 1, 1, 1), jax.devices()[:1])


@pytest.mark.parametrize('devices', MESHES)
def test_losses_on_every_mesh_are_those_of_one_process(two_processes, expected, devices):
    reports = two_processes(STEPS, json.dumps(MESHES[devices]), devices=devices)
    for report in reports:
        for sizes, numbers in zip(MESHES[devices], report, strict=True):
            assert numbers == pytest.approx(expected, rel=2e-5), sizes


def test_a_run_of_two_processes_is_refused_locks_saves_and_resumes_like_one(
    two_processes, tiny_config, finished_run, tmp_path
):
    changes = {'mesh.data': 1, 'mesh.tensor': 2}
    held = tmp_path / 'held'
    held.mkdir()
    # Alive for as long as two processes take to start, however slow the machine.
    holder = {'host': 'elsewhere', 'pid': 7, 'started': 1, 'time': time.time() + STALE_SECONDS - 5}
    (held / '.holder.json').write_text(json.dumps(holder))
    reports = two_processes(RUN, json.dumps(tiny_config(changes).to_dict()), tmp_path / 'run', held)
    refusals = [report.pop('refused') for report in reports]
    assert 'process 7 on host elsewhere' in refusals[0]
    assert 'was refused to process 0: see its message' in refusals[1]
    assert reports[0] == reports[1]
    assert (reports[0]['step'], reports[0]['longer']) == (6, 8)
    assert reports[0]['val_loss'] == pytest.approx(finished_run.val_loss, rel=1e-4)
    rows, one = (
        [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
        for workdir in (tmp_path / 'run', finished_run.workdir)
    )
    losses, expected = ([(row['step'], row['loss']) for row in lines if 'loss' in row] for lines in (rows, one))
    assert [step for step, _ in losses] == list(range(1, 9))
    assert [loss for _, loss in losses[:6]] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    # Nobody is at it any more.
    with pytest.raises(InputError, match='holds a run of another config'):
        train(tiny_config(changes | {'train.seed': 1}), tmp_path / 'run')
