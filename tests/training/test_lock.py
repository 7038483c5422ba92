"""A workdir has one writer at a time; a dead one's place is taken."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from gpt_jax.checkpoints import Checkpoints, load
from gpt_jax.errors import InputError
from gpt_jax.training import train, workdir
from gpt_jax.training.workdir import STALE_SECONDS, locked

# Goes in, says so, and stays until its input ends; where it is refused it says why.
HOLDER = """
import pathlib, sys
from gpt_jax.errors import InputError
from gpt_jax.training.workdir import locked
try:
    with locked(pathlib.Path(sys.argv[1])):
        print('in', flush=True)
        sys.stdin.read()
except InputError as error:
    print(error, flush=True)
"""


@pytest.fixture
def holder():
    """A function: a folder -> a process that has entered it, or was refused; with what it said."""
    with contextlib.ExitStack() as stack:

        def start(folder):
            environment = os.environ | {'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)}
            command = [sys.executable, '-c', HOLDER, str(folder)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


def write_holder(folder, **changes):
    record = {'host': socket.gethostname(), 'pid': os.getpid(), 'started': 1, 'time': time.time()}
    (folder / '.holder.json').write_text(json.dumps(record | changes), encoding='utf-8')


def refusal(folder):
    with pytest.raises(InputError) as error, locked(folder):
        pass
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_second_process_is_refused_by_host_and_pid_until_the_first_ends(holder, tmp_path):
    process = holder(tmp_path / 'run')
    assert process.stdout.readline() == 'in\n'
    message = refusal(tmp_path / 'run')
    assert message.startswith(f'--workdir={tmp_path / "run"}: another run is writing to it, ')
    assert f'process {process.pid} on host {socket.gethostname()}; wait for its end or stop it' in message
    process.communicate()
    assert files(tmp_path / 'run') is None
    with locked(tmp_path / 'run'):
        pass


def test_a_killed_holders_place_is_taken_at_once(holder, tmp_path):
    process = holder(tmp_path)
    assert process.stdout.readline() == 'in\n'
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert '.holder.json' in files(tmp_path)
    with locked(tmp_path):
        assert json.loads((tmp_path / '.holder.json').read_text())['pid'] == os.getpid()
    assert files(tmp_path) == []


def test_of_several_that_start_together_one_gets_in(holder, tmp_path):
    processes = [holder(tmp_path) for _ in range(3)]
    said = [process.stdout.readline() for process in processes]
    assert said.count('in\n') == 1
    winner = processes[said.index('in\n')]
    assert all(f'process {winner.pid} on host' in line or 'is starting' in line for line in said if line != 'in\n')


def test_a_holder_on_another_host_is_dead_after_a_minute_without_a_heartbeat(tmp_path):
    write_holder(tmp_path, host='node7', pid=4711, time=time.time() - STALE_SECONDS / 2)
    message = refusal(tmp_path)
    assert 'process 4711 on host node7' in message
    assert f'at {STALE_SECONDS} s it counts as dead' in message
    for seconds in (-STALE_SECONDS - 1, 1e18):  # the other one's clock is of the future: it would hold for ever
        write_holder(tmp_path, host='node7', pid=4711, time=time.time() + seconds)
        with locked(tmp_path):
            pass
    write_holder(tmp_path, host='node7', pid=4711, time=time.time() - STALE_SECONDS - 1)
    with locked(tmp_path):
        assert json.loads((tmp_path / '.holder.json').read_text())['host'] == socket.gethostname()


def test_a_process_that_has_a_dead_holders_number_is_not_the_holder(tmp_path):
    write_holder(tmp_path, pid=os.getpid(), started=1)  # as after a restart in a container
    with locked(tmp_path):
        pass
    write_holder(tmp_path, pid=2**22 + 1)  # above the highest number that Linux gives
    with locked(tmp_path):
        pass


def test_a_holder_shows_every_few_seconds_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, 'HEARTBEAT_SECONDS', 0.001)

    def beat():
        return json.loads((tmp_path / '.holder.json').read_text())['time']

    with locked(tmp_path):
        first, deadline = beat(), time.monotonic() + 60
        while beat() == first and time.monotonic() < deadline:
            pass
        assert beat() > first
    assert files(tmp_path) == []


def test_a_run_whose_place_was_taken_saves_no_more_and_leaves_all_to_the_other(tiny_config, tmp_path, monkeypatch):
    """As that of a machine that slept: the other host took it for dead."""
    save, kept = Checkpoints.save, {}

    def save_and_sleep(self, step, *arguments, **keywords):
        done = save(self, step, *arguments, **keywords)
        self.wait()
        write_holder(tmp_path, host='node7', pid=4711)
        (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 1.0}\n', encoding='utf-8')
        (tmp_path / 'loss.png').write_bytes(b'of the other one')
        kept.update({path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()})
        return done

    monkeypatch.setattr(Checkpoints, 'save', save_and_sleep)
    message = rf'--workdir={tmp_path}: process 4711 on host node7 has taken it over'
    with pytest.raises(InputError, match=message):
        train(tiny_config({'checkpoint.every_steps': 2, 'train.log_every_steps': 100, 'eval.every_steps': 0}), tmp_path)
    assert {path: path.read_bytes() for path in kept} == kept
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['2']


@pytest.mark.parametrize(
    ('other', 'is_lost'),
    [
        ({}, False),
        ({'pid': os.getpid() + 1}, True),
        ({'host': 'node7'}, True),
        ({'system': 'another container, which has the name of this host and a process of this number'}, True),
    ],
)
def test_the_place_is_lost_to_any_other_process_and_is_then_left_to_it(tmp_path, other, is_lost):
    with locked(tmp_path):
        write_holder(tmp_path, **other)
        with pytest.raises(InputError, match='has taken it over') if is_lost else contextlib.nullcontext():
            workdir.check_still_ours(tmp_path)
    assert ('.holder.json' in files(tmp_path)) == is_lost


@pytest.mark.parametrize('error', [KeyboardInterrupt, InputError])
def test_the_lock_and_a_folder_made_for_nothing_are_gone_afterwards(tmp_path, error):
    with pytest.raises(error), locked(tmp_path / 'runs' / 'one'):
        raise error
    assert files(tmp_path) == []
    with locked(tmp_path / 'runs' / 'one') as folder:
        (folder / 'mine').touch()
    assert files(tmp_path / 'runs' / 'one') == ['mine']


def test_train_keeps_out_of_a_held_workdir_and_readers_need_no_lock(tiny_config, finished_run):
    before = files(finished_run.workdir)
    with locked(finished_run.workdir):
        with pytest.raises(InputError, match=f'process {os.getpid()} on host'):
            train(tiny_config(), finished_run.workdir)
        assert load(finished_run.workdir).step == 6
    assert files(finished_run.workdir) == before
