"""A signal ends a verb from its first moment on, also where Python loses the exception that it raises."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from gpt_jax import signals
from gpt_jax.training.stopping import StopRequest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a signal interrupts, in a verb that would go on for ever.
LOSE = {
    'a callback of the garbage collector': """
import gc
def callback(*_):
    gc.callbacks.remove(callback)
    signal.raise_signal(number)
gc.callbacks.append(callback)
gc.collect()
""",
    'a finalizer': """
class Finalized:
    def __del__(self):
        signal.raise_signal(number)
Finalized()
""",
    'an import of compiled code': """
try:
    signal.raise_signal(number)
except BaseException:
    raise ImportError('numpy.core.multiarray failed to import') from None
""",
    'the making of a class by exec': "exec('signal.raise_signal(number)')",
    'nothing in particular': 'signal.raise_signal(number)',
}
VERB = """
import signal, sys, time
from gpt_jax import cli
number = {number}
def main():
    try:
        exec({body!r}, globals())
        while True:
            time.sleep(0.1)
    finally:
        print('cleared away')
cli.run(main, 'A verb.', ())
"""
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def run(tmp_path):
    """A function: source -> the finished `python -m` of it, which differs from `python -c` in how it ends."""

    def run(source, prepare=None):
        (tmp_path / 'a_verb.py').write_text(source, encoding='utf-8')
        environment = os.environ | {'PYTHONPATH': os.pathsep.join((str(ROOT), str(tmp_path)))}
        command = [sys.executable, '-m', 'a_verb']
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60, preexec_fn=prepare
        )

    return run


@pytest.mark.parametrize('where', LOSE)
@pytest.mark.parametrize('number', NUMBERS)
def test_one_signal_ends_a_verb_whatever_it_interrupts(run, number, where):
    process = run(VERB.format(body=LOSE[where], number=int(number)))
    assert (process.returncode, process.stdout) == (128 + number, 'cleared away\n'), process.stderr
    assert 'nothing was in progress that needed saving' in process.stderr
    assert process.stderr.count('\n') == 1


IMPORT = """
import importlib.abc, importlib.machinery, sys
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == 'compiled' else None
    def exec_module(self, module):
        signal.raise_signal(number)
        print('imported whole', flush=True)
sys.meta_path.insert(0, Finder())
import compiled
"""


@pytest.mark.parametrize('number', NUMBERS)
def test_a_signal_during_an_import_waits_for_its_end(run, number):
    process = run(VERB.format(body=IMPORT, number=int(number)))
    assert (process.returncode, process.stdout) == (128 + number, 'imported whole\ncleared away\n'), process.stderr
    assert process.stderr.count('\n') == 1


def test_a_hang_up_is_ignored_where_it_was_ignored_from_the_start(run):
    code = VERB.format(body='signal.raise_signal(number); raise SystemExit(7)', number=int(signal.SIGHUP))
    process = run(code, prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (process.returncode, process.stdout) == (7, 'cleared away\n')


@pytest.mark.parametrize('number', NUMBERS)
def test_a_signal_that_a_library_caught_is_raised_where_training_takes_over(number):
    before = {number: signal.getsignal(number) for number in NUMBERS}
    with pytest.raises((KeyboardInterrupt, SystemExit)), signals.unwinding():  # noqa: PT012
        try:
            signal.raise_signal(number)
        except BaseException:
            taken = signal.getsignal(number)
        try:
            with StopRequest():
                pytest.fail('the run started')
        finally:
            assert signal.getsignal(number) is taken
    assert {number: signal.getsignal(number) for number in NUMBERS} == before


@pytest.mark.parametrize('number', NUMBERS)
def test_before_anything_is_begun_the_process_ends_where_it_is(run, number):
    code = 'import signal, sys\nfrom gpt_jax import signals\nsignals.end_at_once()\nsignal.raise_signal({})'
    process = run(code.format(int(number)))
    assert process.returncode == 128 + number
    assert process.stderr.count('\n') == 2
    assert 'Traceback' not in process.stderr
