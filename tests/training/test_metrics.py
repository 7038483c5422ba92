import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from gpt_jax.training.logs import MetricsLog, read_rows
from gpt_jax.training.speed import OF_THE_CLOCK


def read_tensorboard(workdir):
    """(tag, step, value) of every scalar, read record by record from all event files there are."""
    found = []
    for path in (workdir / 'tensorboard').glob('**/*tfevents*'):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from('<Q', data, place)  # then 4 bytes of checksum, the record, 4 of checksum
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            place += 12 + length + 4
    return sorted(found)


def write_steps(workdir, last_step, steps):
    log = MetricsLog(workdir, last_step)
    for step in steps:
        log.write({'step': step, 'loss': step / 10, 'mfu': None})
        if step % 2 == 0:
            log.write({'step': step, 'val_loss': step / 5})
    log.close()
    return log


def test_rows_are_json_lines_with_the_time_added(tmp_path):
    write_steps(tmp_path, 0, [1, 2])
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert all(row.pop('time') > 1e9 for row in rows)
    assert rows == [
        {'step': 1, 'loss': 0.1, 'mfu': None},
        {'step': 2, 'loss': 0.2, 'mfu': None},
        {'step': 2, 'val_loss': 0.4},
    ]


def test_each_row_is_on_disk_before_the_next(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({'step': 1, 'loss': 1.0})
    log.sync()
    assert [row['step'] for row in read_rows(tmp_path / 'metrics.jsonl')] == [1]
    log.close()


def test_rows_after_the_restored_step_are_cut_back(tmp_path):
    write_steps(tmp_path, 0, range(1, 7))
    log = write_steps(tmp_path, 4, [5, 6])
    rows = list(read_rows(tmp_path / 'metrics.jsonl'))
    assert [row['step'] for row in rows if 'loss' in row] == [1, 2, 3, 4, 5, 6]
    assert [row['step'] for row in rows if 'val_loss' in row] == [2, 4, 6]
    assert log.evaluated == {2, 4, 6}


def test_a_line_that_a_crash_tore_is_dropped(tmp_path):
    write_steps(tmp_path, 0, [1, 2, 3])
    path = tmp_path / 'metrics.jsonl'
    with path.open('a') as file:
        file.write('{"step": 4, "lo')
    assert [row['step'] for row in read_rows(path) if 'loss' in row] == [1, 2, 3]
    write_steps(tmp_path, 9, [4])
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2, 2, 3, 4, 4]


def test_rows_of_a_file_that_is_not_there_are_none(tmp_path):
    assert list(read_rows(tmp_path / 'metrics.jsonl')) == []


def test_tensorboard_holds_every_step_once_also_after_a_resume(tmp_path):
    write_steps(tmp_path, 0, range(1, 7))
    expected = [('train/loss', step, pytest.approx(step / 10)) for step in range(1, 7)]
    expected += [('validation/val_loss', step, pytest.approx(step / 5)) for step in (2, 4, 6)]
    assert read_tensorboard(tmp_path) == expected
    # Named by the second it was made in: within this one, its successor would replace it by accident.
    (events,) = (tmp_path / 'tensorboard').iterdir()
    events.rename(events.with_name('events.out.tfevents.1600000000.earlier'))
    write_steps(tmp_path, 3, range(4, 7))
    assert read_tensorboard(tmp_path) == expected


def test_a_run_writes_to_tensorboard_what_it_writes_to_its_rows(finished_run):
    tags = {tag for tag, _, _ in read_tensorboard(finished_run.workdir)}
    training = {'loss', 'grad_norm', 'learning_rate', 'tokens', 'skipped_steps'}
    training |= set(OF_THE_CLOCK) - {'time', 'mfu', 'mfu_6n'}  # the peak of a CPU is not known
    validation = {'val_loss', 'val_perplexity', 'val_bits_per_byte'}
    assert tags == {f'train/{name}' for name in training} | {f'validation/{name}' for name in validation}
