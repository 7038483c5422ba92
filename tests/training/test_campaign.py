"""A run survives whatever ends it, at any moment; and the campaign that shows this finds a run that does not."""

import sys

import pytest

from gpt_jax.config import parse
from gpt_jax.training.campaign import campaign

pytestmark = pytest.mark.slow

CONFIG = """
from gpt_jax.config import base


def get_config():
    config = base()
    config.model.update(block_size=32, n_layer=2, n_head=2, d_model=32, dropout=0.1)
    config.data.update(path={corpus!r}, tokenizer='char', cache_dir={cache!r})
    config.optimizer.learning_rate = 1e-2
    config.schedule.warmup_steps = 4
    config.train.update(steps=120, batch_size=8, log_every_steps=1)
    config.eval.update(every_steps=10, batch_size=16)
    config.checkpoint.update(every_steps=10, keep_latest=2)
    config.preview.update(every_steps=60, max_new_tokens=8)
    return config
"""


@pytest.fixture(scope='module')
def experiment(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp('campaign')
    path = folder / 'experiment.py'
    path.write_text(CONFIG.format(corpus=str(corpus), cache=str(folder / 'cache')), encoding='utf-8')
    return path


@pytest.fixture
def run(tiny_config):
    return parse(tiny_config({'eval.every_steps': 10}))


def test_fifty_kills_at_random_moments_leave_the_bits_of_a_run_left_alone(experiment, run, tmp_path, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')  # one device
    command = [sys.executable, '-m', 'gpt_jax.main', f'--config={experiment}']
    report = campaign(command, run, tmp_path / 'runs', kills=50, say=print)
    assert report.differences == []
    assert len(report.kills) == 50
    assert report.arrays >= 30
    assert report.rows >= 120
    hit = {(kill.signal.name, kill.phase) for kill in report.kills}
    for name in ('SIGKILL', 'SIGTERM', 'SIGINT'):
        assert {phase for other, phase in hit if other == name} >= {'start', 'save'}, report.table()
    print(report.table())


# A program with a fault: what it draws goes on from 0 where it was killed.
FORGETFUL = """
import json, pathlib, sys, time
import numpy as np
from gpt_jax.checkpoints import Checkpoints

workdir = pathlib.Path(sys.argv[-1].removeprefix('--workdir='))
with Checkpoints(workdir / 'checkpoints') as checkpoints:
    first, drawn = (checkpoints.latest_step() or 0), 0.0
    for step in range(first + 1, 5):
        drawn += step
        print(f'step {step}/4  loss', flush=True)
        checkpoints.save(step, {'w': np.float32([drawn])}, None, {})
        checkpoints.wait()
        time.sleep(0.1)
"""


def test_a_run_that_forgets_something_is_found_out(run, tmp_path):
    report = campaign([sys.executable, '-c', FORGETFUL], run, tmp_path / 'runs', kills=6, seed=1)
    assert not report.proven
    assert any('1 of 1 arrays of step 4 differ, params/w among them' in line for line in report.differences)
