"""A run whose newest checkpoint is damaged goes on from the one before, and ends as it would have."""

import json
import shutil

import jax
import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.errors import InputError
from gpt_jax.training import train

CHANGES = {'checkpoint.keep_latest': 2}


def rows(workdir):
    lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    kept = ('step', 'loss', 'val_loss', 'learning_rate')
    return [{name: row[name] for name in kept if name in row} for row in map(json.loads, lines)]


@pytest.mark.parametrize(
    'damage',
    [
        lambda step: (step / 'manifest.sha256.json').unlink(),
        pytest.param(lambda step: shutil.rmtree(step / 'optimizer'), marks=pytest.mark.slow),
    ],
    ids=['manifest', 'optimizer'],
)
def test_a_damaged_newest_step_costs_its_steps_alone(tiny_config, two_steps, tmp_path, damage, capfd):
    workdir = shutil.copytree(two_steps, tmp_path / 'run')
    damage(workdir / 'checkpoints' / '6')
    capfd.readouterr()
    assert train(tiny_config(CHANGES), workdir).step == 6
    said = [line for line in capfd.readouterr().out.splitlines() if 'set aside' in line]
    assert len(said) == 1
    assert said[0].endswith(f'the damaged one is set aside as {workdir / "checkpoints" / "damaged-6"}')
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['3', '6', 'damaged-6']
    for leaf, wanted in zip(*(jax.tree.leaves(load(run, step=6).params) for run in (workdir, two_steps)), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()
    assert rows(workdir) == rows(two_steps)
    assert (workdir / 'samples.txt').read_bytes() == (two_steps / 'samples.txt').read_bytes()


def test_with_no_good_step_left_nothing_is_started_anew(tiny_config, two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / 'run')
    for step in '36':
        (workdir / 'checkpoints' / step / 'manifest.sha256.json').unlink()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file()}
    with pytest.raises(InputError, match=r'checkpoints/6 has no manifest.*no good checkpoint beside it') as error:
        train(tiny_config(CHANGES), workdir)
    assert '\n' not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file()} == before
