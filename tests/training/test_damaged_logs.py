"""Damage to metrics.jsonl and samples.txt costs what is damaged and no more, and is said once."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from tensorboardX.event_file_writer import EventsWriter
from test_metrics import read_tensorboard

from gpt_jax.errors import InputError
from gpt_jax.training.logs import MetricsLog, SampleLog, plot_loss, read_rows

STEPS = range(1, 13)
QUICKLY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def metrics_text():
    rows = [{'step': step, 'loss': 4 - step / 10, 'mfu': None, 'time': 1e9 + step} for step in STEPS]
    return [(json.dumps(row) + '\n').encode() for row in rows]


def samples_text():
    texts = ['step 3', 'naïve café', '  text:\n{"a": 1}', 'tens of\n\nlines', '']
    blocks = []
    for step in STEPS:
        text = ''.join(f'    | {line}\n' for line in texts[step % 5].splitlines())
        blocks.append(f'step {step}\n  text:\n{text}  sampled:\n    | of {step}\n'.encode())
    return blocks


@st.composite
def damage(draw, parts):
    """The parts joined, with bytes changed, added or taken away at one place or two; and which parts are untouched."""
    data, touched, last_bytes = bytearray(b''.join(parts)), [], set()
    ends = [sum(map(len, parts[: number + 1])) for number in range(len(parts))]
    for place in sorted(draw(st.sets(st.integers(0, len(data) - 1), min_size=1, max_size=2)), reverse=True):
        touched.append(next(number for number, end in enumerate(ends) if place < end))
        if place + 1 in ends:
            last_bytes.add(touched[-1])
        what = draw(st.sampled_from(['change', 'add', 'remove']))
        new = draw(st.binary(min_size=1, max_size=3)) if what != 'remove' else b''
        data[place : place + (what != 'add')] = new
    # Of a part that is damaged twice, its end of line among it, nothing tells where the next one begins.
    unclear = {number + 1 for number in last_bytes if touched.count(number) > 1}
    return bytes(data), [number for number in range(len(parts)) if number not in unclear.union(touched)]


@QUICKLY
@given(damage(metrics_text()))
def test_every_untouched_row_survives(tmp_path, damaged):
    data, untouched = damaged
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(data)
    rows = list(read_rows(path))
    for number in untouched:
        assert json.loads(metrics_text()[number]) in rows
    assert len(rows) <= len(STEPS) + 2


@QUICKLY
@given(damage(samples_text()))
def test_every_untouched_preview_survives(tmp_path, damaged):
    data, untouched = damaged
    path = tmp_path / 'samples.txt'
    path.write_bytes(data)
    log = SampleLog(tmp_path, max(STEPS))
    kept = path.read_bytes()
    kept.decode()  # still UTF-8
    for number in untouched:
        assert samples_text()[number] in kept
        assert number + 1 in log.steps
    SampleLog(tmp_path, max(STEPS))
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    'line',
    [
        b'{"step": 5, "loss": 1.0\n',
        b'{"step": 5, "loss": 1.\xff0}\n',
        b'{"loss": 1.0}\n',
        b'{"step": "5", "loss": 1.0}\n',
        b'{"step": 5, "loss": "x"}\n',
        b'{"step": 5, "loss": NaN}\n',
        b'{"step": 5, "loss": 1e999}\n',
        b'{"step": 5, "loss": ' + b'9' * 5000 + b'}\n',
        b'{"step": ' + b'9' * 30 + b', "loss": 1}\n',
        b'{"step": -5, "loss": 1}\n',
        b'[' * 100_000 + b'\n',
        b'5\n',
        b'null\n',
        b'\x00' * 4096 + b'\n',
    ],
    ids=lambda line: repr(line[:24]),
)
def test_a_damaged_row_costs_itself_and_is_said_once(tmp_path, capsys, line):
    parts = metrics_text()
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b''.join([*parts[:3], line, *parts[3:]]))
    log = MetricsLog(tmp_path, 12)
    log.close()
    assert path.read_bytes() == b''.join(parts)
    assert capsys.readouterr().err == f'{path}: 1 damaged line(s) left out, 12 row(s) kept\n'
    assert [step for _, step, _ in read_tensorboard(tmp_path)] == list(STEPS)
    MetricsLog(tmp_path, 12).close()
    plot_loss(tmp_path)
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
    'line', [b'st p 60\n', b' tep 60\n  text:\n', b'\xff\xfe\n', b'    | caf\xc3\n', b'step 1e3\n']
)
def test_a_damaged_block_costs_itself_and_is_said_once(tmp_path, capsys, line):
    parts = samples_text()
    path = tmp_path / 'samples.txt'
    path.write_bytes(b''.join([*parts[:3], line, *parts[3:]]))
    log = SampleLog(tmp_path, 12)
    assert path.read_bytes() == b''.join(parts)
    assert log.steps == set(STEPS)
    assert capsys.readouterr().err == f'{path}: 1 damaged block(s) left out, 12 kept\n'


@pytest.mark.parametrize('damage', [b'', b'nonsense' * 100])
def test_a_damaged_event_file_is_written_anew_from_the_rows(tmp_path, damage):
    (tmp_path / 'metrics.jsonl').write_bytes(b''.join(metrics_text()))
    MetricsLog(tmp_path, 12).close()
    (events,) = (tmp_path / 'tensorboard').iterdir()
    events.rename(events.with_name('events.out.tfevents.1600000000.earlier')).write_bytes(damage)
    MetricsLog(tmp_path, 12).close()
    assert [step for _, step, _ in read_tensorboard(tmp_path)] == list(STEPS)


def test_where_all_rows_are_gone_the_event_files_are_kept(tmp_path):
    (tmp_path / 'metrics.jsonl').write_bytes(b''.join(metrics_text()))
    MetricsLog(tmp_path, 12).close()
    (events,) = (tmp_path / 'tensorboard').iterdir()
    events.rename(events.with_name('events.out.tfevents.1600000000.earlier'))
    (tmp_path / 'metrics.jsonl').unlink()
    MetricsLog(tmp_path, 12).close()
    assert [step for _, step, _ in read_tensorboard(tmp_path)] == list(STEPS)


@pytest.mark.parametrize('log', [MetricsLog, SampleLog])
def test_what_is_no_file_is_refused_by_name(tmp_path, log):
    for name in ('metrics.jsonl', 'samples.txt'):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r'(metrics.jsonl|samples.txt) is a folder'):
        log(tmp_path, 12)


def test_rows_wait_for_room_on_the_disk(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0)
    log.write({'step': 1, 'loss': 1.0})
    disk = log._file

    class Full:
        room = 30

        def write(self, data):
            if not self.room:
                raise OSError(28, 'No space left on device')
            written = disk.write(data[: self.room])
            self.room -= written
            return written

        def fileno(self):
            return disk.fileno()

        def close(self):
            disk.close()

    log._file = full = Full()
    for step in (2, 3):
        log.write({'step': step, 'loss': 1.0})
        log.sync()
    assert capsys.readouterr().err.count('cannot be written (No space left on device)') == 1
    assert [row['step'] for row in read_rows(log.path)] == [1]
    full.room = 10_000
    log.write({'step': 4, 'loss': 1.0})
    log.close()
    assert [row['step'] for row in read_rows(log.path)] == [1, 2, 3, 4]


def test_tensorboard_that_fails_is_said_once_and_the_rows_go_on(tmp_path, capsys, monkeypatch):
    log = MetricsLog(tmp_path, 0)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(EventsWriter, 'write_event', full)
    for step in STEPS:
        log.write({'step': step, 'loss': 1.0})
    log.sync()
    log.close()
    assert [row['step'] for row in read_rows(log.path)] == list(STEPS)
    assert capsys.readouterr().err.count('\n') == 1
