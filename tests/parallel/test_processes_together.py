"""Processes of a run find each other or say why not, must mean the same, and end together."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.errors import InputError
from gpt_jax.parallel import processes
from gpt_jax.training.speed import OF_THE_CLOCK

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((None, 0, None), '--num_processes=0 must be at least 1'),
        ((None, -1, 0), '--num_processes=-1 must be at least 1'),
        ((None, None, -1), '--process_id=-1 must be at least 0:'),
        ((None, 2, 2), '--process_id=2 must be at least 0 and less than --num_processes=2'),
        ((None, 1, 7), '--process_id=7 must be at least 0 and less than --num_processes=1'),
        (('', 2, 0), '--coordinator= must be HOST:PORT'),
        (('nonsense', 2, 0), '--coordinator=nonsense must be HOST:PORT'),
        ((':1234', 2, 0), '--coordinator=:1234 must be HOST:PORT'),
        (('localhost:', 2, 0), 'must be HOST:PORT'),
        (('localhost:0', 2, 0), 'must be HOST:PORT'),
        (('localhost:65536', 2, 0), 'must be HOST:PORT'),
        (('localhost:-1', 2, 0), 'must be HOST:PORT'),
        (('localhost:\uff11', 2, 0), 'must be HOST:PORT'),
        (('localhost:port', 2, 0), 'must be HOST:PORT'),
        (('a b:1', 2, 0), 'a b is no name of a host; name the host of process 0'),
        (('x' * 300 + ':1', 2, 0), 'is no name of a host'),
        (('..:1', 2, 0), '.. is no name of a host'),
        (('[::1:1', 2, 2), '--process_id=2 must be at least 0 and less'),
        (('[::x]:1', 2, 0), '[::x] is no name of a host'),
    ],
)
def test_flags_of_no_run_are_refused_by_name_before_anything_is_connected_to(arguments, message):
    with pytest.raises(InputError) as error:
        processes.connect(*arguments)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_a_port_that_is_taken_is_refused():
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as taken:
        taken.bind(('', 0))
        taken.listen()
        with pytest.raises(InputError, match=r'process 0 cannot listen there .Address already in use.; name another'):
            processes.connect(f'localhost:{taken.getsockname()[1]}', 2, 0)


class Store:
    """The store of keys and values of all processes; the others have said already what they mean."""

    def __init__(self, *others):
        self.others, self.asked = [processes.json.dumps(other) for other in others], set()

    def key_value_set(self, key, value):
        self.own = int(key.rpartition('/')[2]), value

    def blocking_key_value_get(self, key, _):
        index = int(key.rpartition('/')[2])
        if index not in self.asked:
            self.asked.add(index)
            raise RuntimeError('DEADLINE_EXCEEDED: GetKeyValue() timed out')
        return self.own[1] if index == self.own[0] else self.others[index]


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ([{'seed': 0}, {'seed': 5}], 'seed=5 in process 1 and 0 in process 0; start all'),
        ([{'seed': 0, 'x': None}, {'seed': 0, 'x': 1}], 'x=1 in process 1 and None in process 0; start all'),
        ([{'seed': 0}, {'seed': 0}, {'seed': 1}], 'seed=1 in process 2 and 0 in process 0; start all'),
        ([{'seed': 0}, {'seed': 0, 'key': 1}], 'key=1 in process 1 and None in process 0; start all'),
        (
            [{str(n): 0 for n in range(9)}, {str(n): 1 for n in range(9)}],
            '4=1 in process 1 and 0 in process 0 (and 4 more)',
        ),
        ([{'seed': 0}, {'seed': 0}, {'seed': 0}], None),
    ],
)
def test_what_differs_between_processes_is_named_in_all_of_them(monkeypatch, values, message):
    monkeypatch.setattr(processes.distributed, 'global_state', types.SimpleNamespace(client=Store(*values)))
    monkeypatch.setattr(processes.jax, 'process_count', lambda: len(values))
    at_a_loss, set_value = [], Store.key_value_set  # what a process says that loses another one from then on

    def set_and_lose_the_first(self, key, value):
        if '/read/' in key:
            assert message in at_a_loss[-1]
        set_value(self, key, value)

    monkeypatch.setattr(processes, '_end_in_one_line', at_a_loss.append)
    monkeypatch.setattr(Store, 'key_value_set', set_and_lose_the_first)
    for index, own in enumerate(values):
        at_a_loss.append('another one was lost')
        monkeypatch.setattr(processes.jax, 'process_index', lambda index=index: index)
        if message is None:
            processes.check_alike(own)
        else:
            with pytest.raises(InputError, match=re.escape(message)):
                processes.check_alike(own)


@pytest.mark.parametrize(
    ('error', 'ends'),
    [
        (ValueError('UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:35719'), True),
        (RuntimeError('INTERNAL: NCCL operation ncclAllReduce failed: remote process exited'), True),
        (RuntimeError('UNAVAILABLE: Socket closed'), True),
        (InputError('gloo: what the user gave'), False),
        (RuntimeError('RESOURCE_EXHAUSTED: Out of memory'), False),
        (KeyError('name'), False),
    ],
)
def test_a_collective_that_fails_for_want_of_another_process_ends_this_one(monkeypatch, error, ends):
    class EndedError(Exception):
        pass

    def end(message):
        raise EndedError(message)

    monkeypatch.setattr(processes, '_end', end)
    monkeypatch.setattr(processes.jax, 'process_count', lambda: 2)
    with pytest.raises(EndedError if ends else type(error)), processes.ended_together():
        raise error


def test_an_abort_of_the_runtime_is_one_line_and_status_1():
    code = 'import os\nfrom gpt_jax.parallel import processes\nprocesses._end_in_one_line("lost")\nos.abort()'
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    process = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == 'error: lost\n'


@pytest.fixture(scope='module')
def command(corpus, tmp_path_factory):
    """A function: a workdir -> the command of a run of 160 steps, as a user would type it; all share their data."""
    cache = tmp_path_factory.mktemp('data')

    def make(workdir, *flags):
        keys = {
            'data.path': corpus,
            'data.cache_dir': cache,
            'data.tokenizer': 'char',
            'model.dropout': 0.1,
            'train.steps': 160,
            'train.batch_size': 16,
            'train.log_every_steps': 5,
            'checkpoint.every_steps': 10,
            'eval.every_steps': 30,
            'preview.every_steps': 0,
            'model.n_layer': 1,
        }
        keys = [f'--config.{key}={value}' for key, value in keys.items()]
        return [
            sys.executable,
            '-m',
            'gpt_jax.main',
            '--config=configs/smoke.py',
            f'--workdir={workdir}',
            *keys,
            *flags,
        ]

    return make


@pytest.fixture(scope='module')
def launch(one_device):
    """A function: commands -> their processes, started at once; whatever is left of them is killed in the end."""
    started = []

    def start(*commands):
        environment = os.environ | one_device | {'PYTHONPATH': str(ROOT)}
        environment['PATH'] = os.pathsep.join((os.path.dirname(sys.executable), environment['PATH']))
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        new = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for command in commands]
        started.extend(new)
        return new

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope='module')
def pair(command, launch):
    """A function: a workdir, and flags of each of two processes -> the two, which are given the three flags."""

    def start(workdir, *flags):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        of_run = (f'--coordinator=127.0.0.1:{port}', '--num_processes=2')
        return launch(*(command(workdir, *of_run, f'--process_id={index}', *own) for index, own in enumerate(flags)))

    return start


def ended(process, status=1):
    """Standard output and the lines of standard error of a process that ends in time."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert 'Traceback' not in errors
    assert '***' not in errors
    return output, [line for line in errors.splitlines() if line and not line.startswith('waiting up to')]


def rows(workdir):
    """What the run has logged, without what a clock says."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_THE_CLOCK} for line in lines]


def bits(workdir):
    """Of every array of the last checkpoint."""
    params = load(workdir / 'checkpoints' / '160').params
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(params)}


@pytest.fixture(scope='module')
def undisturbed(pair, tmp_path_factory):
    """The workdir of a run of two processes that nothing happened to."""
    workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
    first, second = pair(workdir, [], [])
    output, errors = ended(first, status=0)
    assert 'step 160/160' in output
    assert errors == []
    # What Gloo prints, and nothing of ours.
    output, errors = ended(second, status=0)
    assert [line for line in output.splitlines() if not line.startswith('[Gloo]')] == errors == []
    return workdir


@pytest.mark.slow
def test_a_signal_ends_a_process_that_waits_for_others(pair, tmp_path):
    (process,) = pair(tmp_path / 'run', [])
    assert process.stderr.readline() == 'waiting up to 60 s for process 1\n'
    process.send_signal(signal.SIGTERM)
    _, errors = ended(process, status=128 + signal.SIGTERM)
    assert errors == ['SIGTERM; nothing was in progress that needed saving']
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_two_processes_of_different_configs_are_both_told_the_keys(pair, tmp_path):
    for process in pair(tmp_path / 'run', ['--config.train.seed=5'], ['--config.train.steps=7']):
        _, (line,) = ended(process)
        assert 'train.seed=0 in process 1 and 5 in process 0' in line
        assert 'train.steps=7 in process 1 and 160 in process 0' in line


@pytest.mark.slow
def test_a_value_that_one_process_cannot_use_is_told_to_both(pair, tmp_path):
    for process in pair(tmp_path / 'run', [], ['--config.train.spike_window_steps=1']):
        _, (line,) = ended(process)
        assert 'train.spike_window_steps=1 in process 1 and 128 in process 0' in line


@pytest.mark.slow
def test_two_processes_make_up_for_an_evaluation_that_was_lost(pair, undisturbed, tmp_path):
    """As one that a signal broke off in a run of one process, which goes on with two."""
    shutil.copytree(undisturbed, tmp_path / 'run')
    log = tmp_path / 'run' / 'metrics.jsonl'
    lines = log.read_text(encoding='utf-8').splitlines(keepends=True)
    *_, last = [line for line in lines if 'val_loss' in line]
    log.write_text(''.join(line for line in lines if line != last), encoding='utf-8')
    for process in pair(tmp_path / 'run', [], []):
        ended(process, status=0)
    assert sorted(map(str, rows(tmp_path / 'run'))) == sorted(map(str, rows(undisturbed)))


@pytest.mark.slow
def test_whatever_happens_to_a_process_the_others_end_and_the_run_goes_on_to_the_same_bits(pair, undisturbed, tmp_path):
    lost = 'another process of this run was lost; start all of them again, and the run goes on from its last checkpoint'
    faults = [(15, 1, signal.SIGKILL), (25, 0, signal.SIGKILL), (35, 1, signal.SIGSTOP), (40, 1, signal.SIGTERM)]
    for step, index, number in faults:
        both = pair(tmp_path / 'run', [], [])
        # The run may have been ahead of what was read of it when it was ended before, and be behind that step already.
        assert any((found := re.match(r'step (\d+)/', line)) and int(found[1]) >= step for line in both[0].stdout)
        both[index].send_signal(number)
        began = time.monotonic()
        if number == signal.SIGTERM:  # of one: all save and stop
            (output, errors), (_, others) = (ended(process, status=128 + number) for process in both)
            saved = re.search(r'stopped and saved at step (\d+) ', output)[1]
            assert errors == []
            assert others == ['SIGTERM: saving after this step (once more: stop at once)']
        else:
            _, (line,) = ended(both[1 - index])
            assert lost in line
            assert time.monotonic() - began < 30
            both[index].kill()
            both[index].communicate()
    output, _ = ended(pair(tmp_path / 'run', [], [])[0], status=0)
    assert f'resuming from step {saved}\n' in output
    assert rows(tmp_path / 'run') == rows(undisturbed)
    assert bits(tmp_path / 'run') == bits(undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('mpirun') is None, reason='there is no mpirun; Debian has it in openmpi-bin')
def test_under_open_mpi_the_processes_find_each_other(command, launch, undisturbed, tmp_path):
    of_mpirun = ('-n', '2', '--allow-run-as-root', '--oversubscribe')
    (process,) = launch(['launch/mpi.sh', *of_mpirun, '--', *command(tmp_path / 'run')[3:]])
    _, errors = ended(process, status=0)
    assert errors == []
    assert rows(tmp_path / 'run') == rows(undisturbed)
    assert bits(tmp_path / 'run') == bits(undisturbed)
