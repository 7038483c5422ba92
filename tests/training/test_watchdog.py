import threading

import pytest

from gpt_jax.config import MOST_WAIT
from gpt_jax.training import watchdog
from gpt_jax.training.watchdog import Watchdog


@pytest.fixture
def said(monkeypatch):
    """The lines of a watchdog, and an event that is set when one has come."""
    lines, came = [], threading.Event()

    def warn(text):
        lines.append(text)
        came.set()

    monkeypatch.setattr(watchdog.signals, 'warn', warn)
    return lines, came


def test_where_nothing_goes_on_it_names_what_the_run_is_at_and_its_last_step(said, capfd):
    lines, came = said
    with Watchdog(0.05) as watch:
        watch.finished(41)
        watch.at('the evaluation of step 41')
        assert came.wait(60)
    assert 'the run is at the evaluation of step 41, and its last finished step is 41' in lines[0]
    assert 'train.hang_seconds' in lines[0]
    assert 'test_watchdog.py' in capfd.readouterr().err  # where the thread waits


def test_it_ends_the_process_where_that_is_asked_for(said, monkeypatch):
    ended, status = threading.Event(), []

    def leave(code):
        status.append(code)
        ended.set()

    monkeypatch.setattr(watchdog.os, '_exit', leave)
    with Watchdog(0.05, ends=True):
        assert ended.wait(60)
    assert status == [1]


def test_the_longest_patience_that_a_config_may_have_is_one_that_a_thread_can_wait(monkeypatch):
    problems = []
    monkeypatch.setattr(threading, 'excepthook', problems.append)
    watch = Watchdog(MOST_WAIT)
    with watch:
        pass
    watch._thread.join()
    assert problems == []


def test_a_run_that_goes_on_is_left_alone(said):
    lines, came = said
    watch = Watchdog(3600.0)
    with watch:
        for step in range(100):
            watch.finished(step)
    assert lines == []
    with Watchdog(0.0):  # never
        assert not came.is_set()
