"""A run whose workdir is a bucket is the run that it would be on a disk."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt_jax.checkpoints import export_huggingface, import_huggingface, load, load_model
from gpt_jax.errors import InputError
from gpt_jax.files import as_path
from gpt_jax.training import train
from gpt_jax.training.logs import NOTHING, MetricsLog, SampleLog
from gpt_jax.training.speed import OF_THE_CLOCK

RUN = 'gs://bucket/run'


def rows(data):
    found = [json.loads(line) for line in data.splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_THE_CLOCK} for row in found]


def assert_same_run(bucket, folder):
    """But for clocks, and the last preview that one samples: metrics, checkpoints, config and tokenizer."""
    assert rows(bucket.read('run/metrics.jsonl')) == rows((folder / 'metrics.jsonl').read_bytes())
    assert bucket.read('run/tokenizer.json') == (folder / 'tokenizer.json').read_bytes()
    ours, theirs = load(RUN), load(folder)
    assert ours.step == theirs.step
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    kept = sorted(path.name for path in (folder / 'checkpoints').iterdir())
    assert sorted({name.split('/')[2] for name in bucket.names('run/checkpoints/')}) == kept


def test_a_run_in_a_bucket_is_that_on_a_disk(bucket, tiny_config, finished_run, capsys):
    result = train(tiny_config(), RUN)
    assert (result.step, str(result.workdir)) == (6, RUN)
    assert_same_run(bucket, finished_run.workdir)
    top = {name.split('/')[1] for name in bucket.names('run/')}
    assert top == {
        'checkpoints',
        'config.json',
        'loss.png',
        'metrics.jsonl',
        'samples.txt',
        'tensorboard',
        'tokenizer.json',
    }
    assert bucket.read('run/loss.png').startswith(b'\x89PNG')
    assert bucket.read('run/samples.txt').startswith(b'step 3\n  ')
    events = bucket.names('run/tensorboard/')
    assert len(events) == 1
    assert b'validation/val_loss' in bucket.read(events[0])
    before = {name: bucket.read(name) for name in bucket.names()}
    capsys.readouterr()
    train(tiny_config(), RUN)
    assert 'finished already, at step 6' in capsys.readouterr().out
    assert {name: bucket.read(name) for name in bucket.names()} == before
    with pytest.raises(InputError, match=rf'--workdir={RUN} holds a run of another config \(optimizer'):
        train(tiny_config({'optimizer.learning_rate': 3e-3}), RUN)


def test_logs_are_uploaded_before_a_checkpoint_and_cut_back_to_it(bucket):
    path = as_path(RUN)
    log = MetricsLog(path, NOTHING)
    for step in (1, 2, 3):
        log.write({'step': step, 'loss': 1.0})
    assert bucket.read('run/metrics.jsonl') == b''
    log.sync()
    assert [row['step'] for row in rows(bucket.read('run/metrics.jsonl'))] == [1, 2, 3]
    log.write({'step': 4, 'loss': 1.0})
    log.write({'step': 4, 'val_loss': 1.0})  # an evaluation is worth an upload
    assert [row['step'] for row in rows(bucket.read('run/metrics.jsonl'))] == [1, 2, 3, 4, 4]
    log.write({'step': 5, 'loss': 1.0})
    log.close()
    assert [row['step'] for row in rows(bucket.read('run/metrics.jsonl'))] == [1, 2, 3, 4, 4, 5]
    again = MetricsLog(path, 3)  # the run goes on from step 3
    assert [row['step'] for row in rows(bucket.read('run/metrics.jsonl'))] == [1, 2, 3]
    again.write({'step': 4, 'loss': 2.0})
    again.close()
    assert [row['step'] for row in rows(bucket.read('run/metrics.jsonl'))] == [1, 2, 3, 4]
    assert len(bucket.names('run/tensorboard')) == 1  # written anew, without what came after step 3
    MetricsLog(path, NOTHING).close()  # a run without a checkpoint: what there is may be all that is left
    assert [row['step'] for row in rows(bucket.read('run/metrics-before-1.jsonl'))] == [1, 2, 3, 4]
    assert bucket.read('run/metrics.jsonl') == b''


def test_samples_are_cut_back_too(bucket):
    samples = SampleLog(as_path(RUN), NOTHING)
    for step in (1, 2):
        samples.write(step, {'sampled': f'text {step}'})
    before = bucket.read('run/samples.txt')
    assert before == b'step 1\n  sampled:\n    | text 1\nstep 2\n  sampled:\n    | text 2\n'
    again = SampleLog(as_path(RUN), 1)
    assert again.steps == {1}
    again.write(2, {'sampled': 'text 2'})
    assert bucket.read('run/samples.txt') == before


def test_a_log_that_cannot_be_uploaded_is_so_later(bucket, capsys):
    """What only shows a run never ends it."""
    log = MetricsLog(as_path(RUN), NOTHING)
    log.write({'step': 1, 'loss': 1.0})
    bucket.fails = lambda method, url: 403 if method == 'POST' else None
    log.sync()
    log.sync()
    told = capsys.readouterr().err
    assert told.count('gs://bucket/run/metrics.jsonl cannot be written (Forbidden') == 1
    bucket.fails = lambda method, url: None
    log.write({'step': 2, 'loss': 1.0})
    log.sync()
    assert [row['step'] for row in rows(bucket.read('run/metrics.jsonl'))] == [1, 2]
    log.close()


def test_models_go_to_a_bucket_and_come_from_it(bucket, tiny_gpt2, tmp_path):
    """A Hugging Face directory there -> a checkpoint there -> a directory there -> here; each the same weights."""
    for path in tiny_gpt2.iterdir():
        bucket.write(f'hub/{path.name}', path.read_bytes())
    expected = load_model(tiny_gpt2)
    import_huggingface('gs://bucket/hub', 'gs://bucket/checkpoint')
    export_huggingface('gs://bucket/checkpoint', 'gs://bucket/exported')
    for place in ('gs://bucket/hub', 'gs://bucket/checkpoint', 'gs://bucket/exported'):
        found = load_model(place)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
        assert found.tokenizer.fingerprint == expected.tokenizer.fingerprint
    with pytest.raises(InputError, match='gs://bucket/exported exists already'):
        export_huggingface('gs://bucket/checkpoint', 'gs://bucket/exported')
    names = bucket.names()
    posted = []
    bucket.fails = lambda method, url: (
        (posted.append(url) or (403 if posted[2:] else None)) if method == 'POST' else None
    )
    with pytest.raises(InputError, match=r'gs://bucket/other/.*Forbidden'):
        export_huggingface('gs://bucket/checkpoint', 'gs://bucket/other')
    assert bucket.names() == names  # what failed on its way is gone


# The parent's bucket, a run, and the moment at which it kills itself.
CHILD = """if True:
    import json, os, signal, sys
    import gpt_jax.checkpoints.verifying as verifying
    from gpt_jax.checkpoints import committing
    from gpt_jax.training import train

    config, moment, save = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    saves = []

    def killing(function, moment):
        def call(*arguments):
            if moment == sys.argv[2] and len(saves) >= save:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        return call

    def counted(*arguments, begin=committing.begin):
        saves.append(arguments)
        begin(*arguments)

    committing.begin = counted
    verifying.write = killing(verifying.write, 'before the manifest')
    committing.commit = killing(committing.commit, 'after the manifest')
    train(config, 'gs://bucket/run')
"""


@pytest.mark.slow
@pytest.mark.parametrize(('moment', 'save'), [('before the manifest', 2), ('after the manifest', 1)])
def test_a_run_killed_in_a_save_goes_on_to_the_same_bits(bucket, tiny_config, finished_run, moment, save):
    config = tiny_config()
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.run(
        [sys.executable, '-c', CHILD, config.to_json(), moment, str(save)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert 'run/.holder.json' in bucket.names()  # nobody took it away
    assert '3' in {name.split('/')[2] for name in bucket.names('run/checkpoints/')}
    result = train(config, RUN)
    assert result.step == 6
    assert_same_run(bucket, finished_run.workdir)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.params), load(finished_run.workdir).params)
    assert not [name for name in bucket.names() if 'unfinished' in name or 'holder' in name]


@pytest.mark.slow
def test_each_verb_takes_an_address(bucket, tiny_config, finished_run, tmp_path):
    for path in sorted(finished_run.workdir.rglob('*')):
        if path.is_file():
            bucket.write(f'run/{path.relative_to(finished_run.workdir).as_posix()}', path.read_bytes())
    text = tmp_path / 'text.txt'
    text.write_text('the quick brown fox jumps over the dog.\n' * 20, encoding='utf-8')

    def verb(name, *flags, status=0):
        child = subprocess.run(
            [sys.executable, '-m', f'gpt_jax.{name}', *flags], capture_output=True, text=True, check=False, timeout=300
        )
        assert child.returncode == status, child.stderr
        assert 'Traceback' not in child.stderr
        return child.stdout if not status else child.stderr

    def both(name, *flags):
        outputs = [verb(name, f'--checkpoint={place}', *flags) for place in (RUN, finished_run.workdir)]
        assert outputs[0] == outputs[1]

    both('generate', '--prompt=the', '--max_new_tokens=5', '--seed=1', '--json')
    both('evaluate', f'--text={text}')
    assert 'Hugging Face directory gs://bucket/hub' in verb('convert', f'--source={RUN}', '--target=gs://bucket/hub')
    assert 'checkpoint gs://bucket/again' in verb('convert', '--source=gs://bucket/hub', '--target=gs://bucket/again')
    export_huggingface(finished_run.workdir, tmp_path / 'hub')
    import_huggingface(tmp_path / 'hub', tmp_path / 'again')
    jax.tree.map(np.testing.assert_array_equal, load('gs://bucket/again').params, load(tmp_path / 'again').params)
    config = tiny_config({'train.init_from': RUN, 'train.steps': 2, 'schedule.warmup_steps': 1})
    result = train(config, 'gs://bucket/second')
    assert result.step == 2
    config = tiny_config({'checkpoint.restore_from': RUN, 'train.steps': 7})
    assert train(config, 'gs://bucket/third').step == 7
    assert load('gs://bucket/third').meta['restore_from']['step'] == 6
    error = verb('generate', '--checkpoint=gs://nobody-has-this/run', '--prompt=a', status=1)
    assert error.splitlines() == [
        'error: checkpoint gs://nobody-has-this/run: there is no bucket gs://nobody-has-this; correct its name, or '
        'make it'
    ]
