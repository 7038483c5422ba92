"""A run that is interrupted, in every way, and resumed ends exactly as one that was left alone.

Real processes, since only these can be killed. A pipe holds 4 kB here, some 60 lines of one step each: a child cannot
get further ahead of its reader than that, so signals arrive in time without anyone waiting for a clock.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.training.workdir import locked

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 300
# Dropout and two micro-batches: every key that is drawn in a step has to come back as well.
CONFIG = """
from configs import base


def get_config():
    config = base.get_config()
    config.model.update(block_size=32, n_layer=2, n_head=2, d_model=32, dropout=0.1)
    config.data.update(path={corpus!r}, tokenizer='char', cache_dir={cache!r})
    config.optimizer.learning_rate = 1e-2
    config.schedule.warmup_steps = 10
    config.train.update(steps={steps}, batch_size=4, accumulation_steps=2, log_every_steps=1)
    config.eval.update(every_steps=40, batch_size=16)
    config.checkpoint.every_steps = 40
    config.preview.update(every_steps=40, max_new_tokens=8)
    return config
"""


class Process:
    """`python -m gpt_jax.main` on one device, watched line by line."""

    environment = None  # its variables, which `config` sets

    def __init__(self, config, workdir):
        command = [sys.executable, '-m', 'gpt_jax.main', f'--config={config}', f'--workdir={workdir}']
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if hasattr(fcntl, 'F_SETPIPE_SZ'):
            fcntl.fcntl(self._process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        self.output, self.errors, self.status = '', '', None

    def wait_for(self, pattern):
        """Reads until a line matches; fails where the process ends before."""
        for line in iter(self._process.stdout.readline, b''):
            self.output += line.decode()
            if re.search(pattern, line.decode()):
                return self
        pytest.fail(f'no line matches {pattern!r}:\n{self.output}\n{self._process.stderr.read().decode()}')

    def run_for(self, seconds):
        """Lets it run, without reading what it prints."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self

    def wait_for_handlers(self):
        """Lets it run until the first of our handlers is there: before, Python itself is starting."""
        status, bit = pathlib.Path(f'/proc/{self._process.pid}/status'), signal.SIGTERM - 1
        while not int(re.search(r'^SigCgt:\s+(\w+)', status.read_text(), re.MULTILINE)[1], 16) >> bit & 1:
            self.run_for(0.01)
        return self

    def end(self, signal_number=None):
        """Sends the signal, if any, and reads to the end."""
        if signal_number is not None:
            self._process.send_signal(signal_number)
        output, errors = self._process.communicate()
        self.output, self.errors, self.status = self.output + output.decode(), errors.decode(), self._process.returncode
        return self

    @property
    def resumed_from(self):
        found = re.search(r'^resuming from step (\d+)$', self.output, re.MULTILINE)
        return int(found[1]) if found else None


@pytest.fixture(scope='module')
def config(tmp_path_factory, corpus, one_device):
    Process.environment = os.environ | one_device
    folder = tmp_path_factory.mktemp('resume')
    path = folder / 'experiment.py'
    path.write_text(CONFIG.format(corpus=str(corpus), cache=str(folder / 'cache'), steps=STEPS), encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def undisturbed(config):
    process = Process(config, config.parent / 'undisturbed').end()
    assert process.status == 0, process.errors
    return config.parent / 'undisturbed'


@pytest.fixture(scope='module')
def disturbed(config):
    """The same run, killed, terminated, interrupted, and each time started again: its processes."""
    workdir = config.parent / 'disturbed'
    # At step 81 the save of step 80 is under way, before which the one of step 40 was finished.
    processes = {'killed': Process(config, workdir).wait_for(r'^step 81/').end(signal.SIGKILL)}
    # Lines that a crash tore in the middle of a write.
    for name in ('metrics.jsonl', 'samples.txt'):
        with (workdir / name).open('a', encoding='utf-8') as file:
            file.write('{"step": 9999, "lo' if name == 'metrics.jsonl' else 'step 99')
    processes['terminated'] = Process(config, workdir).wait_for(r'^step \d+/').end(signal.SIGTERM)
    processes['interrupted'] = Process(config, workdir).wait_for(r'^step \d+/').end(signal.SIGINT)
    processes['last'] = Process(config, workdir).end()
    return processes


def rows(workdir, *names):
    """Of metrics.jsonl, those that have all `names`, without the numbers that a clock made."""
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    return [[row[name] for name in names] for row in found if set(names) <= set(row)]


def test_a_killed_run_resumes_from_a_checkpoint_and_not_from_the_start(disturbed):
    assert disturbed['killed'].status == -signal.SIGKILL
    assert disturbed['killed'].resumed_from is None
    assert disturbed['terminated'].resumed_from >= 40


@pytest.mark.parametrize(
    ('which', 'status', 'name', 'following'),
    [('terminated', 143, 'SIGTERM', 'interrupted'), ('interrupted', 130, 'SIGINT', 'last')],
)
def test_a_signal_saves_says_so_and_exits_with_its_status(disturbed, which, status, name, following):
    process = disturbed[which]
    assert process.status == status, process.errors
    saved = re.search(r'^stopped and saved at step (\d+) in .*; the same command goes on', process.output, re.MULTILINE)
    assert f'{name}: saving after this step' in process.errors
    assert 'Traceback' not in process.errors
    assert disturbed[following].resumed_from == int(saved[1]) < STEPS


def test_the_last_run_finishes(disturbed):
    assert disturbed['last'].status == 0, disturbed['last'].errors
    assert f'done: {STEPS} steps' in disturbed['last'].output


def test_the_final_parameters_are_the_same_to_the_bit(config, undisturbed, disturbed):
    expected = load(undisturbed, step=STEPS).params
    params = load(config.parent / 'disturbed', step=STEPS).params
    for (path, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True
    ):
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), jax.tree_util.keystr(path)


def test_the_logged_steps_are_the_same_and_none_is_there_twice(config, undisturbed, disturbed):
    names = ('step', 'tokens', 'loss', 'learning_rate', 'grad_norm')
    expected = rows(undisturbed, *names)
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    assert rows(config.parent / 'disturbed', *names) == expected


def test_the_validation_rows_are_the_same(config, undisturbed, disturbed):
    names = ('step', 'val_loss', 'val_bits_per_byte')
    expected = rows(undisturbed, *names)
    assert [row[0] for row in expected] == [*range(40, STEPS, 40), STEPS]
    assert rows(config.parent / 'disturbed', *names) == expected


def test_the_previews_are_the_same(config, undisturbed, disturbed):
    expected = (undisturbed / 'samples.txt').read_text(encoding='utf-8')
    assert expected.count('\nstep ') == STEPS // 40
    assert (config.parent / 'disturbed' / 'samples.txt').read_text(encoding='utf-8') == expected


def test_ctrl_c_while_a_run_starts_exits_130_without_a_traceback(config, undisturbed):
    process = Process(config, config.parent / 'starting').wait_for('^data: ').end(signal.SIGINT)
    assert process.status == 130, process.errors
    assert 'Traceback' not in process.errors


@pytest.mark.skipif(not pathlib.Path('/proc/self/status').exists(), reason='asks Linux which signals a process handles')
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_at_any_moment_of_the_start_ends_the_run(config, undisturbed, tmp_path, name):
    number, moments = getattr(signal, name), random.Random(name)
    for index in range(7):
        process = (
            Process(config, tmp_path / str(index)).wait_for_handlers().run_for(moments.uniform(0, 3.5)).end(number)
        )
        assert process.status == 128 + number, process.errors
        assert 'Traceback' not in process.errors
        assert 'ignored' not in process.errors
    # Where it hits the taking of the lock its files may stay; nobody holds them, and the next run clears them away.
    for workdir in list(tmp_path.iterdir()):
        with locked(workdir):
            pass
        assert not list(workdir.glob('.*'))
