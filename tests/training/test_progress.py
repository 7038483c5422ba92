import contextlib
import os
import pty
import sys
import termios
import warnings

import matplotlib.image
import numpy as np
import pytest

from gpt_jax.training.logs import MetricsLog, Progress, plot_loss

ROW = {'step': 5, 'loss': 1.23456, 'learning_rate': 2e-4, 'tokens_per_second': 12345.6}


def write_rows(workdir, rows):
    log = MetricsLog(workdir, 0)
    for row in rows:
        log.write(row)
    log.close()


def test_without_a_terminal_there_are_plain_lines(capsys):
    progress = Progress(start=0, total=10, show=True)
    progress.step(5, 1.23456, 2e-4)
    progress.row(ROW)
    progress.line('words')
    progress.close()
    output, errors = capsys.readouterr()
    first, second = output.splitlines()
    assert first.startswith('step 5/10  loss 1.2346  lr 2.00e-04  12,346 tokens/s  ')
    assert first.endswith(' left')
    assert second == 'words'
    assert errors == ''


@pytest.mark.parametrize(('elapsed', 'left'), [(10, '0:10'), (300, '5:00'), (8000, '2:13:20')])
def test_the_time_left_is_that_of_the_steps_of_this_run(monkeypatch, capsys, elapsed, left):
    from gpt_jax.training import logs

    clock = iter([0.0, float(elapsed)])
    monkeypatch.setattr(logs.time, 'perf_counter', lambda: next(clock))
    # Resumed at 15 of 25: the five steps up to 20 took `elapsed`, and so will the five that are left.
    Progress(start=15, total=25, show=True).row(ROW | {'step': 20})
    assert capsys.readouterr().out.endswith(f'  {left} left\n')


def test_all_processes_but_the_first_are_silent(capsys):
    progress = Progress(start=0, total=10, show=False)
    progress.step(5, 1.0, 1e-3)
    progress.row(ROW)
    progress.line('words')
    assert capsys.readouterr() == ('', '')


def test_in_a_terminal_there_is_a_bar_and_no_plain_rows(monkeypatch, capsys):
    main_end, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with os.fdopen(terminal, 'w', encoding='utf-8') as stream:
        monkeypatch.setattr(sys, 'stderr', stream)
        progress = Progress(start=2, total=10, show=True)
        progress.step(5, 1.23456, 2e-4)
        progress.row(ROW)
        progress.line('words')
        progress.close()
    shown = b''
    with contextlib.suppress(OSError):  # the end of what was written, once the terminal is closed
        while data := os.read(main_end, 65536):
            shown += data
    os.close(main_end)
    shown = shown.decode()
    assert '2/10' in shown
    assert '5/10' in shown
    assert capsys.readouterr().out == 'words\n'


def test_the_picture_of_a_run_is_an_image_with_both_curves(tmp_path):
    rows = [{'step': step, 'loss': 4.0 - step / 10} for step in range(1, 21)]
    write_rows(tmp_path, [*rows, {'step': 10, 'val_loss': 3.2}, {'step': 20, 'val_loss': 2.5}])
    plot_loss(tmp_path)
    image = matplotlib.image.imread(tmp_path / 'loss.png')
    assert image.shape[:2] == (600, 960)
    for colour in ((1.0, 0.498, 0.055), (0.121, 0.466, 0.705)):  # matplotlib's orange and blue, half covering
        near = np.abs(image[..., :3] - colour).max(-1) < 0.35
        assert near.sum() > 100


@pytest.mark.parametrize('rows', [[], [{'step': 1, 'loss': 3.0}], [{'step': 1, 'val_loss': 3.0}]])
def test_a_run_with_few_rows_has_a_picture_as_well(tmp_path, rows):
    write_rows(tmp_path, rows)
    plot_loss(tmp_path)
    assert matplotlib.image.imread(tmp_path / 'loss.png').shape[:2] == (600, 960)


@pytest.mark.parametrize('name', ['costs $5', '$x^', r'$\frac{$', '日本語', 'a\nb', '\udcff'], ids=ascii)
def test_the_plot_is_drawn_whatever_the_run_is_called(tmp_path, name):
    workdir = tmp_path / name
    workdir.mkdir()
    (workdir / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0, "time": 0.0}\n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plot_loss(workdir)
    assert (workdir / 'loss.png').stat().st_size > 1000
