"""Real trainers in one workdir: one trains, the others are told so; a killed one's place is taken."""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from gpt_jax.checkpoints import load

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
from configs import base


def get_config():
    config = base.get_config()
    config.model.update(block_size=16, n_layer=1, n_head=2, d_model=16)
    config.data.update(path={corpus!r}, tokenizer='char', cache_dir={cache!r})
    config.optimizer.learning_rate = 1e-2
    config.schedule.warmup_steps = 2
    config.train.update(steps={steps}, batch_size=4, log_every_steps=1)
    config.eval.every_steps = 0
    config.checkpoint.every_steps = 20
    config.preview.every_steps = 0
    return config
"""


@pytest.fixture
def trainer(tmp_path, corpus, one_device):
    """A function: starts `python -m gpt_jax.main` in one and the same workdir."""
    config = tmp_path / 'experiment.py'
    config.write_text(CONFIG.format(corpus=str(corpus), cache=str(tmp_path / 'cache'), steps=120), encoding='utf-8')
    environment = os.environ | one_device | {'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, '-m', 'gpt_jax.main', f'--config={config}', f'--workdir={tmp_path / "run"}']
    with contextlib.ExitStack() as stack:

        def start():
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            if hasattr(fcntl, 'F_SETPIPE_SZ'):  # nobody reads on: it waits in the middle of its run, and does not end
                fcntl.fcntl(process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
            stack.callback(process.kill)
            return process

        yield start


def test_of_trainers_that_start_at_any_moment_one_trains_and_the_others_are_refused(trainer, tmp_path):
    first = trainer()
    others = [trainer()]  # at once
    lines = iter(first.stdout.readline, '')
    winner = first
    if not any(line.startswith('step 1/') for line in lines):  # the other one was faster
        winner, others = others[0], [first]
        assert any(line.startswith('step 1/') for line in iter(winner.stdout.readline, ''))
    others.append(trainer())  # while it trains
    for other in others:
        output, errors = other.communicate()
        assert other.returncode == 1, output
        assert errors.startswith(f'error: --workdir={tmp_path / "run"}: another run is '), errors
        assert errors.count('\n') == 1
    winner.send_signal(signal.SIGKILL)
    winner.communicate()
    last = trainer()
    output, errors = last.communicate()
    assert last.returncode == 0, errors
    steps = [json.loads(line)['step'] for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [step for step in steps if step < 120] == list(range(1, 120))
    assert load(tmp_path / 'run').step == 120
    assert not list((tmp_path / 'run').glob('.*'))
