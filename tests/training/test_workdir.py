import errno
import json
import os

import pytest

from gpt_jax import files
from gpt_jax.config import as_record
from gpt_jax.errors import InputError
from gpt_jax.training import resolve
from gpt_jax.training.logs import SampleLog
from gpt_jax.training.workdir import FILES, FOLDERS, check, locked, write_config


@pytest.fixture
def run(tiny_config):
    """A function: changed keys -> the resolved run."""
    return lambda changes=(): resolve(tiny_config(changes))


def test_the_config_is_recorded_whole_and_its_own_run_let_in(run, tmp_path):
    write_config(tmp_path, run())
    assert json.loads((tmp_path / 'config.json').read_text(encoding='utf-8')) == as_record(run())
    check(tmp_path, run())
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_folder_that_is_new_or_empty_is_let_in(run, tmp_path):
    check(tmp_path, run())
    check(tmp_path / 'new', run())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'changes',
    [
        {'mesh.data': 1, 'mesh.fsdp': 8},
        {'train.steps': 99},
        {'train.steps': None, 'train.epochs': 2.0},
        {'eval.every_steps': 1, 'train.log_every_steps': 7, 'checkpoint.every_steps': 2, 'preview.every_steps': 0},
        {'checkpoint.keep_latest': 4, 'preview.prompt': 'other', 'data.cache_dir': '/elsewhere'},
        {'train.accumulation_steps': 2, 'model.remat': 'full', 'model.scan_layers': True, 'eval.batch_size': 8},
    ],
)
def test_what_computes_the_same_function_may_differ(run, tmp_path, changes):
    write_config(tmp_path, run())
    check(tmp_path, run(changes))


@pytest.mark.parametrize(
    ('key', 'value', 'shown'),
    [
        ('train.seed', 1, '0 -> 1'),
        ('train.batch_size', 32, '16 -> 32'),
        ('optimizer.learning_rate', 1e-3, '0.01 -> 0.001'),
        ('schedule.warmup_steps', 1, '2 -> 1'),
        ('model.d_model', 64, '32 -> 64'),
        ('model.dropout', 0.0, '0.1 -> 0.0'),
        ('data.tokenizer', 'bpe', 'char -> bpe'),
        ('precision.compute', 'bf16', 'f32 -> bf16'),
    ],
)
def test_any_other_key_that_differs_is_named_with_both_values(run, tmp_path, key, value, shown):
    write_config(tmp_path, run())
    with pytest.raises(InputError) as error:
        check(tmp_path, run({key: value}))
    assert f'{key}: {shown}' in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'{"model": \xff', 'is not UTF-8'),
        (b'{"model": ', 'is not JSON'),
        (b'', 'is not JSON'),
        (b'[1]', 'holds no experiment'),
        (b'[' * 100_000, 'is nested too deeply'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'is a Git LFS pointer'),
    ],
)
def test_a_config_that_cannot_be_read_is_named(run, tmp_path, content, message):
    (tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(InputError, match=rf'config\.json {message}.*choose another --workdir') as error:
        check(tmp_path, run())
    assert '\n' not in str(error.value)


@pytest.fixture
def places(tmp_path):
    """A folder with things that are no place for a run."""
    (tmp_path / 'file').touch()
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'dangling').symlink_to('nowhere')
    os.mkfifo(tmp_path / 'pipe')
    return tmp_path


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('file', 'is a file; name a folder'),
        ('file/run', 'Not a directory'),
        ('pipe', 'is a file; name a folder'),
        ('loop', 'loop'),
        ('loop/run', 'loop'),
        ('dangling', 'File exists'),
        ('x' * 300, 'File name too long'),
        ('nul\0', 'null byte'),
        ('\udcff', 'no UTF-8'),
    ],
)
def test_a_place_where_no_run_can_be_is_refused_in_one_line(places, name, message):
    before = sorted(places.iterdir())
    with pytest.raises(InputError, match=f'--workdir=.*{message}') as error, locked(f'{places}/{name}'):
        pass
    assert '\n' not in str(error.value)
    assert sorted(places.iterdir()) == before


@pytest.mark.parametrize(
    'workdir',
    ['az://bucket/run', 'hdfs://bucket/run', 'hf://x', 'file:///tmp/x', '', '/proc/run', '/dev/null', '/sys/run'],
)
def test_what_is_no_folder_of_this_machine_is_refused_in_one_line(tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'--workdir=.?{workdir}') as error, locked(workdir):
        pass
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo, lambda path: open(path, 'w').close()])
@pytest.mark.parametrize('name', [*FILES, *FOLDERS, '.lock', '.holder.json'])
def test_something_else_in_the_place_of_a_file_of_the_run_is_refused_before_any_work(tmp_path, make, name):
    make(tmp_path / name)
    is_right = (tmp_path / name).is_file() if name not in FOLDERS else (tmp_path / name).is_dir()
    if is_right or (make is os.mkfifo and name.startswith('.')):  # these are replaced, unread
        with locked(tmp_path):
            return
    with pytest.raises(InputError, match=f'--workdir={tmp_path}') as error, locked(tmp_path):
        pass
    assert '\n' not in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != '.lock'] == [name] * (name != '.lock')


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to_is_refused_in_one_line(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, '_create', refuse)
    with (
        pytest.raises(InputError, match=rf'cannot be written to \({os.strerror(number)}\)'),
        locked(tmp_path / 'run'),
    ):
        pass


def test_samples_are_headed_by_their_step_and_indented(tmp_path):
    log = SampleLog(tmp_path, 0)
    log.write(3, {'text': 'one\ntwo', 'sampled': ''})
    log.write(6, {'sampled': 'three'})
    expected = 'step 3\n  text:\n    | one\n    | two\n  sampled:\nstep 6\n  sampled:\n    | three\n'
    assert (tmp_path / 'samples.txt').read_text(encoding='utf-8') == expected


def test_samples_are_cut_back_to_the_restored_step(tmp_path):
    log = SampleLog(tmp_path, 0)
    for step in (3, 6, 9):
        log.write(step, {'sampled': f'at {step}'})
    before = (tmp_path / 'samples.txt').read_text(encoding='utf-8')
    SampleLog(tmp_path, 9)
    assert (tmp_path / 'samples.txt').read_text(encoding='utf-8') == before
    SampleLog(tmp_path, 6).write(9, {'sampled': 'at 9'})
    assert (tmp_path / 'samples.txt').read_text(encoding='utf-8') == before


@pytest.mark.parametrize('torn', ['step', 'step 1', 'step 12', 'step 12\n  sam'])
def test_a_block_that_a_crash_tore_is_dropped(tmp_path, torn):
    SampleLog(tmp_path, 0).write(3, {'sampled': 'at 3'})
    before = (tmp_path / 'samples.txt').read_text(encoding='utf-8')
    with (tmp_path / 'samples.txt').open('a', encoding='utf-8') as file:
        file.write(torn)
    SampleLog(tmp_path, 3)
    assert (tmp_path / 'samples.txt').read_text(encoding='utf-8') == before


# A line separator, a form feed and a carriage return are ends of line to some readers.
@pytest.mark.parametrize('text', ['step 9', 'a\nstep 9\nb', 'a\x0cstep 9', 'a\u2028step 9', 'a\rstep 9', '\nstep x'])
def test_text_that_looks_like_a_heading_stays_text(tmp_path, text):
    log = SampleLog(tmp_path, 0)
    log.write(3, {'sampled': text})
    log.write(6, {'sampled': 'after'})
    before = (tmp_path / 'samples.txt').read_text(encoding='utf-8')
    SampleLog(tmp_path, 6)
    assert (tmp_path / 'samples.txt').read_text(encoding='utf-8') == before
    SampleLog(tmp_path, 3)
    after = (tmp_path / 'samples.txt').read_text(encoding='utf-8')
    assert after == before[: before.rindex('step 6')]
