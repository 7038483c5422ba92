"""Processes of a run find each other or say why not, must mean the same, and end together."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import types

import pytest

from gpt_jax.errors import InputError
from gpt_jax.parallel import processes

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
    for index, own in enumerate(values):
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
    assert process.stderr == 'error: lost (TF_CPP_MIN_LOG_LEVEL=0 shows what jaxlib says)\n'


@pytest.fixture
def pair(corpus, tmp_path):
    """A function: the changes of each of two processes -> the two, started as a user would."""
    started = []

    def start(*changes):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        common = [
            *(
                '--config=configs/smoke.py',
                f'--config.data.path={corpus}',
                f'--config.data.cache_dir={tmp_path / "data"}',
            ),
            *('--config.data.tokenizer=char', f'--workdir={tmp_path / "run"}', '--config.train.batch_size=16'),
            *('--distributed', f'--coordinator=127.0.0.1:{port}', '--num_processes=2'),
        ]
        environment = os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)}
        for index, change in enumerate(changes):
            command = [sys.executable, '-m', 'gpt_jax.main', *common, f'--process_id={index}', *change]
            pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def last_line(process):
    """Of standard error; the process has ended by then, in time."""
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert 'Traceback' not in errors
    assert '***' not in errors
    lines = [line for line in errors.splitlines() if not line.startswith('waiting up to')]
    assert len(lines) == 1, errors
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_that_waits_for_others(pair, number):
    (process,) = pair([])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(8)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert 'Traceback' not in errors
    assert errors.count('\n') <= 2


@pytest.mark.slow
def test_two_processes_of_different_configs_are_both_told_the_keys(pair):
    for process in pair(['--config.train.seed=5'], ['--config.train.steps=7']):
        line = last_line(process)
        assert 'train.seed=0 in process 1 and 5 in process 0' in line
        assert 'train.steps=7 in process 1 and 20 in process 0' in line


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
def test_where_a_process_is_lost_the_other_ends_with_one_line(pair, lost):
    both = pair(*[['--config.train.steps=1000000']] * 2)
    for line in both[0].stdout:
        if line.startswith('step 10/'):
            break
    both[lost].send_signal(signal.SIGKILL)
    assert 'another process of this run was lost; start all of them again' in last_line(both[1 - lost])
