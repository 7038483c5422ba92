"""Whole runs of the tiny experiment, in this process, on eight devices."""

import hashlib
import json
import math
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.errors import InputError
from gpt_jax.inference import sample_text
from gpt_jax.parallel import MeshConfig, make_mesh
from gpt_jax.training import evaluate as evaluation
from gpt_jax.training import train, trainer
from gpt_jax.training.speed import OF_THE_CLOCK


def read_rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def numbers(workdir):
    """The rows without what a clock measured."""
    return [{name: value for name, value in row.items() if name not in OF_THE_CLOCK} for row in read_rows(workdir)]


def snapshot(folder):
    """Of every file its time of change and a hash."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def test_a_run_leaves_everything_in_its_workdir(finished_run):
    names = {path.name for path in finished_run.workdir.iterdir()}
    assert names == {
        'checkpoints',
        'config.json',
        'loss.png',
        'metrics.jsonl',
        'samples.txt',
        'tensorboard',
        'tokenizer.json',
    }
    assert (finished_run.step, finished_run.signal) == (6, None)


def test_rows_have_the_keys_of_the_contract(finished_run):
    training = [row for row in read_rows(finished_run.workdir) if 'loss' in row]
    validation = [row for row in read_rows(finished_run.workdir) if 'val_loss' in row]
    assert [row['step'] for row in training] == [1, 2, 3, 4, 5, 6]
    assert [row['tokens'] for row in training] == [16 * 32 * step for step in range(1, 7)]
    names = {'step', 'tokens', 'loss', 'learning_rate', 'grad_norm', 'tokens_per_second', 'mfu', 'data_wait_ms'}
    names |= {'skipped_steps'}
    assert all(names <= set(row) for row in training)
    assert all(row['data_wait_ms'] >= 0 for row in training)
    assert {row['mfu'] for row in training} == {None}  # the peak of a CPU is not known
    assert [row['step'] for row in validation] == [3, 6]
    assert all({'step', 'val_loss', 'val_bits_per_byte'} <= set(row) for row in validation)
    assert finished_run.loss == training[-1]['loss']
    assert finished_run.val_loss == validation[-1]['val_loss']


def test_the_learning_rate_of_each_step_is_the_schedules(finished_run):
    # Two steps of warmup, then a cosine from 1e-2 at step 2 to 1e-3 at step 6, counted from 0.
    expected = [5e-3] + [1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2) for step in range(2, 6)]
    rates = [row['learning_rate'] for row in read_rows(finished_run.workdir) if 'loss' in row]
    assert rates == pytest.approx([expected[0], 1e-2, *expected[1:]], rel=1e-6)


@pytest.mark.slow
def test_the_validation_loss_is_that_of_every_token_of_the_split(finished_run, corpus):
    text = corpus.read_text(encoding='utf-8')
    held_out = text[int(len(text) * 0.9) :]
    tokens = [*finished_run.tokenizer.encode(held_out), finished_run.tokenizer.end_of_text]
    nats = 0.0
    for start in range(0, len(tokens) - 1, 32):
        window = np.array(tokens[start : start + 33])
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        logits = finished_run.model.apply({'params': finished_run.params}, padded)
        logits = np.asarray(logits, np.float64)[0, : len(window) - 1]
        logsumexp = np.log(np.exp(logits).sum(-1))
        nats += (logsumexp - logits[np.arange(len(window) - 1), window[1:]]).sum()
    row = read_rows(finished_run.workdir)[-1]
    assert row['val_loss'] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert row['val_perplexity'] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-5)
    size = len(held_out[1:].encode())
    assert row['val_bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_an_evaluation_is_broken_off_where_it_is_asked_to(finished_run):
    batch = {'loss': jnp.ones(()), 'tokens': jnp.ones(())}
    asked = iter([False, False, True])
    data = types.SimpleNamespace(prepared={'a': types.SimpleNamespace(validation=np.arange(100))})
    steps, one_device = [], make_mesh(MeshConfig(), jax.devices()[:1])
    result = evaluation.evaluate(
        lambda params, _: steps.append(params) or batch, one_device, 'params', data, 1, 8, None, lambda: next(asked)
    )
    assert result is None
    assert steps == ['params'] * 2


def test_a_step_folder_describes_itself(finished_run):
    loaded = load(finished_run.workdir / 'checkpoints' / '6')
    assert loaded.meta['config'] == json.loads((finished_run.workdir / 'config.json').read_text(encoding='utf-8'))
    assert loaded.meta['tokenizer'] == finished_run.tokenizer.to_json()
    assert loaded.meta['val_loss'] == finished_run.val_loss
    assert loaded.meta['lengths'] == {'total': 6, 'warmup': 2, 'decay': 6}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, finished_run.params)


def test_samples_hold_both_previews_of_each_milestone(finished_run, corpus):
    text = (finished_run.workdir / 'samples.txt').read_text(encoding='utf-8')
    blocks = text.split('step ')[1:]
    assert [block.split('\n')[0] for block in blocks] == ['3', '6']
    held_out = corpus.read_text(encoding='utf-8')
    held_out = held_out[int(len(held_out) * 0.9) :]
    sections = blocks[-1].split('\n  ')
    names = [section.split(':')[0] for section in sections if not section.startswith('  |')][1:]
    assert names[0] == 'text'
    assert names[2] == 'sampled'
    # The validation split's start, each token of it guessed from the true ones before.
    tokens = np.array([finished_run.tokenizer.encode(held_out)[:33]])
    logits = finished_run.model.apply({'params': finished_run.params}, tokens[:, :-1])
    guesses = np.asarray(logits).argmax(-1)
    assert names[1] == f'guessed token by token ({(guesses == tokens[:, 1:]).sum()} of 32 right)'
    shown = [line.removeprefix('    | ') for line in blocks[-1].split('\n') if line.startswith('    | ')]
    expected = held_out[1:33].splitlines() + finished_run.tokenizer.decode(guesses[0]).splitlines()
    assert shown[: len(expected)] == expected
    assert shown[len(expected)].startswith('the ')


def test_a_second_run_says_so_and_changes_nothing(finished_run, tiny_config, capsys):
    before = snapshot(finished_run.workdir)
    result = train(tiny_config(), finished_run.workdir, sample=sample_text)
    assert 'finished already, at step 6' in capsys.readouterr().out
    assert snapshot(finished_run.workdir) == before
    assert (result.step, result.params) == (6, None)
    assert result.val_loss == finished_run.val_loss


@pytest.mark.slow
def test_a_longer_run_goes_on_and_keeps_its_schedule(tiny_config, tmp_path):
    train(tiny_config({'train.steps': 3}), tmp_path)
    longer = train(tiny_config({'train.steps': 6}), tmp_path)
    assert longer.step == 6
    # What was at its end at step 3 stays at its floor, a tenth of 1e-2.
    rates = [row['learning_rate'] for row in read_rows(tmp_path) if 'loss' in row]
    assert rates[3:] == pytest.approx([1e-3] * 3, rel=1e-6)
    assert len(rates) == 6


def test_a_changed_key_is_refused_by_name_and_the_workdir_left_alone(finished_run, tiny_config):
    before = snapshot(finished_run.workdir)
    changes = {'train.batch_size': 32, 'optimizer.beta1': 0.5, 'train.steps': 12}
    with pytest.raises(InputError) as error:
        train(tiny_config(changes), finished_run.workdir)
    assert 'train.batch_size: 16 -> 32' in str(error.value)
    assert 'optimizer.beta1: 0.9 -> 0.5' in str(error.value)
    assert 'train.steps' not in str(error.value)
    assert '\n' not in str(error.value)
    assert snapshot(finished_run.workdir) == before


def test_another_corpus_is_refused_and_the_workdir_left_alone(tiny_config, tmp_path):
    text = tmp_path / 'text.txt'
    text.write_text('one two three ' * 100, encoding='utf-8')
    config = tiny_config({'data.path': str(text), 'train.steps': 3})
    train(config, tmp_path / 'run')
    text.write_text('one two three ' * 100 + 'net', encoding='utf-8')  # the same characters: the same tokenizer
    before = snapshot(tmp_path / 'run')
    config.train.steps = 4
    with pytest.raises(InputError, match='the corpus is not the one that'):
        train(config, tmp_path / 'run')
    text.write_text('one two three ' * 100 + 'XYZ' * 99, encoding='utf-8')
    with pytest.raises(InputError, match=r'the corpus, or its tokenizer, is not .*data\.path'):
        train(config, tmp_path / 'run')
    assert snapshot(tmp_path / 'run') == before


@pytest.mark.slow
@pytest.mark.parametrize('damage', [lambda text: text[:200], lambda _: '{"version": "1.0"}', lambda _: ''])
def test_a_damaged_tokenizer_of_the_workdir_is_restored(damage, finished_run, tiny_config, tmp_path, capfd):
    shutil.copytree(finished_run.workdir, tmp_path / 'run')
    path = tmp_path / 'run' / 'tokenizer.json'
    text = path.read_text(encoding='utf-8')
    path.write_text(damage(text), encoding='utf-8')
    train(tiny_config({'train.steps': 7, 'schedule.decay_steps': 7}), tmp_path / 'run')
    assert path.read_text(encoding='utf-8') == text
    assert f'{path} was damaged, or of another model: restored' in capfd.readouterr().out


@pytest.mark.slow
def test_logs_without_a_checkpoint_are_kept_under_another_name(finished_run, tiny_config, tmp_path, capfd):
    shutil.copytree(finished_run.workdir, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')
    old = {name: (tmp_path / 'run' / name).read_bytes() for name in ('metrics.jsonl', 'samples.txt')}
    train(tiny_config({'train.steps': 6}), tmp_path / 'run')
    assert (tmp_path / 'run' / 'metrics-before-1.jsonl').read_bytes() == old['metrics.jsonl']
    assert (tmp_path / 'run' / 'samples-before-1.txt').read_bytes() == old['samples.txt']
    assert 'kept as metrics-before-1.jsonl' in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_may_be_resumed_on_another_mesh(finished_run, tiny_config, tmp_path):
    def stop(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        return ''

    first = train(tiny_config(), tmp_path, sample=stop)
    assert (first.step, first.signal) == (4, signal.SIGTERM)
    result = train(tiny_config({'mesh.data': 1, 'mesh.fsdp': 8}), tmp_path)
    assert result.step == 6
    kernel = result.params['blocks']['mlp']['up']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    # Another mesh draws the same batches and masks.
    assert result.val_loss == pytest.approx(finished_run.val_loss, rel=1e-3)
    workdirs = (tmp_path, finished_run.workdir)
    losses, expected = ([row['loss'] for row in numbers(workdir) if 'loss' in row] for workdir in workdirs)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_signal_during_an_evaluation_breaks_it_off_and_it_is_made_up_for(
    finished_run, tiny_config, tmp_path, monkeypatch, assert_same_bits
):
    def interrupted(*arguments, **keywords):
        signal.raise_signal(signal.SIGINT)
        return evaluation.evaluate(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, 'evaluate', interrupted)
        first = train(tiny_config(), tmp_path, sample=sample_text)
    assert (first.step, first.signal, first.val_loss) == (3, signal.SIGINT, None)
    assert not (tmp_path / 'samples.txt').exists()
    last = train(tiny_config(), tmp_path, sample=sample_text)
    assert last.signal is None
    assert numbers(tmp_path) == numbers(finished_run.workdir)
    assert (tmp_path / 'samples.txt').read_text() == (finished_run.workdir / 'samples.txt').read_text()
    assert_same_bits(last.params, finished_run.params)


@pytest.mark.slow
def test_a_run_stopped_during_its_last_evaluation_is_not_finished(tiny_config, tmp_path, monkeypatch):
    def interrupted(*arguments, **keywords):
        signal.raise_signal(signal.SIGINT)
        return evaluation.evaluate(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, 'evaluate', interrupted)
        first = train(tiny_config({'eval.every_steps': 0}), tmp_path)
    assert (first.step, first.val_loss) == (6, None)
    val_loss = train(tiny_config({'eval.every_steps': 0}), tmp_path).val_loss
    assert val_loss is not None
    assert load(tmp_path).meta['val_loss'] == val_loss  # by which it may be the best, too
    assert [row['step'] for row in read_rows(tmp_path) if 'val_loss' in row] == [6]


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tiny_config, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5])

    def scripted(*_, **__):
        loss = next(losses)
        return {'val_loss': loss, 'val_perplexity': math.exp(loss), 'val_bits_per_byte': loss}

    monkeypatch.setattr(trainer, 'evaluate', scripted)
    # A new best is saved where no checkpoint is due, and survives those that come after it.
    train(tiny_config({'train.steps': 4, 'eval.every_steps': 1, 'checkpoint.every_steps': 0}), tmp_path)
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['2', '4']
    assert load(tmp_path).step == 2


@pytest.mark.slow
def test_the_same_config_gives_the_same_run_and_another_seed_another(finished_run, tiny_config, tmp_path):
    again = train(tiny_config(), tmp_path / 'again', sample=sample_text)
    assert numbers(again.workdir) == numbers(finished_run.workdir)
    other = train(tiny_config({'train.seed': 1, 'train.steps': 3}), tmp_path / 'other')
    assert numbers(other.workdir)[0]['loss'] != numbers(finished_run.workdir)[0]['loss']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train.batch_size': 12}, 'train.batch_size=12 in 1 micro-batches of 12 is not divisible by the 8 devices'),
        ({'train.accumulation_steps': 4}, 'train.batch_size=16 in 4 micro-batches of 4 is not divisible by the 8'),
        ({'eval.batch_size': 4}, 'eval.batch_size=4 is not divisible by the 8 devices'),
        (
            {'mesh.context': 8, 'model.block_size': 24},
            'model.block_size=24 is not divisible by 2 x mesh.context=8: each device has two pieces of a sequence; '
            'choose a multiple of 16, or another mesh.context',
        ),
        ({'mesh.fsdp': 3}, 'mesh.fsdp=3'),
        ({'mesh.tensor': 8}, 'model.n_head=2 is not divisible by mesh.tensor=8; choose a multiple of 8'),
        ({'model.vocab_size': 5}, 'model.vocab_size=5 is smaller than the'),
        ({'model.block_size': 100_000}, 'block_size=100000'),
    ],
)
def test_a_run_that_cannot_be_says_so_in_one_line_and_leaves_no_checkpoint(tiny_config, tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        train(tiny_config(changes), tmp_path / 'run')
    assert message in str(error.value)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_steps_that_are_to_stay_are_saved_whatever_else_is_due(tiny_config, tmp_path):
    keys = {'every_steps': 4, 'keep_every_steps': 2, 'keep_latest': 1, 'keep_best': 0}
    config = {f'checkpoint.{name}': value for name, value in keys.items()} | {'eval.every_steps': 0}
    train(tiny_config(config | {'train.steps': 5}), tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [2, 4, 5]


def test_multipliers_that_leave_nothing_to_learn_are_refused(tiny_config, tmp_path):
    with pytest.raises(InputError, match=r'optimizer.multipliers=\.\*:lr=0: the learning rate of every parameter is 0'):
        train(tiny_config({'optimizer.multipliers': '.*:lr=0'}), tmp_path)
