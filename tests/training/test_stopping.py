import os
import signal
import subprocess
import sys
import threading

import pytest

from gpt_jax.training.stopping import StopRequest


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_said_and_ends_nothing(number, capfd):
    with StopRequest() as stop:
        assert stop.agreed() is None
        signal.raise_signal(number)
        assert stop.signal == stop.agreed() == number
    assert f'{number.name}: saving after this step' in capfd.readouterr().err


def test_the_handlers_from_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_nothing_is_changed():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with StopRequest() as stop:
            seen.extend((signal.getsignal(signal.SIGINT), stop.agreed()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, None]


@pytest.mark.parametrize(
    ('first', 'second', 'status'), [('SIGINT', 'SIGINT', 130), ('SIGINT', 'SIGTERM', 143), ('SIGTERM', 'SIGHUP', 129)]
)
def test_a_second_signal_ends_the_process_at_once(first, second, status):
    code = (
        'import signal\n'
        'from gpt_jax.training.stopping import StopRequest\n'
        'with StopRequest():\n'
        f'    signal.raise_signal(signal.{first})\n'
        '    print("still here", flush=True)\n'
        f'    signal.raise_signal(signal.{second})\n'
        '    print("too late")\n'
    )
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, '-c', code]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (status, 'still here\n')
    assert f'{second} again: stopping at once' in process.stderr
