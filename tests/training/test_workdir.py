import json

import pytest

from gpt_jax.config import as_record
from gpt_jax.errors import InputError
from gpt_jax.training import resolve
from gpt_jax.training.logs import SampleLog
from gpt_jax.training.workdir import check, locked, write_config


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


def test_a_config_that_is_no_json_is_named(run, tmp_path):
    (tmp_path / 'config.json').write_bytes(b'{"model": \xff')
    with pytest.raises(InputError, match=r'config\.json is not JSON'):
        check(tmp_path, run())


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match='is a file; name a folder'), locked(tmp_path / 'file'):
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
