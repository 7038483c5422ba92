"""Runs that go on from the whole state of another run, with a config, a folder and logs of their own."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.checkpoints import Checkpoints, find_run, load, resolve
from gpt_jax.checkpoints.loading import leaf_name, read_items, stored_shapes
from gpt_jax.config import FORMAT, parse
from gpt_jax.data import Batches
from gpt_jax.errors import InputError
from gpt_jax.training import resolve as resolve_config
from gpt_jax.training import train
from gpt_jax.training.logs import Output
from gpt_jax.training.recipe import find_beginning
from gpt_jax.training.speed import OF_THE_CLOCK
from gpt_jax.training.trainer import Trainer


@pytest.fixture
def source(two_steps):
    """The workdir of a finished run, with dropout, that has its steps 3 and 6. Copied before it is changed."""
    return two_steps


@pytest.fixture
def forked(tiny_config, source):
    """A function: changed keys, what to go on from (step 3) -> the experiment that does."""

    def make(changes=(), path=source / 'checkpoints' / '3'):
        return tiny_config({'checkpoint.restore_from': str(path)} | dict(changes))

    return make


def rows(workdir):
    lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in OF_THE_CLOCK} for line in lines]


def arrays(step_folder, *items):
    """Of a checkpoint, by name, from its own description of them alone."""
    tree = {item: stored_shapes(step_folder, item) for item in items or ('params', 'optimizer')}
    return by_name(read_items(step_folder, **tree))


def by_name(tree):
    return {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def refusal(call, *arguments):
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def begun(config, workdir):
    """A run before its first step."""
    weights = find_beginning(parse(config))
    return Trainer(resolve_config(config, weights), workdir, weights, None, Checkpoints(workdir), None, Output())


def rewritten(step_folder, target, change):
    """A copy of a checkpoint, alone in `target`, whose record is another one; its step folder."""
    found = find_run(step_folder)
    change(found.meta)
    trees = {item: stored_shapes(step_folder, item) for item in ('params', 'optimizer')}
    trees = read_items(step_folder, **trees)
    with Checkpoints(target) as checkpoints:
        checkpoints.save(found.found.step, trees['params'], trees['optimizer'], found.meta)
    return target / str(found.found.step)


# The same bits


def test_it_goes_on_from_another_run_to_the_bits_of_that_run_and_then_without_it(forked, source, tmp_path, capsys):
    other = shutil.copytree(source, tmp_path / 'other')
    workdir = tmp_path / 'run'
    workdir.mkdir()
    # What an attempt leaves that was killed before it had saved: none of it stays in the way.
    (workdir / 'metrics.jsonl').write_text('{"step": 1, "loss": 9.0, "time": 0.0}\n', encoding='utf-8')
    config = forked(path=other / 'checkpoints' / '3')
    train(config, workdir)
    expected = [row for row in rows(source) if row['step'] > 3]
    assert expected
    assert rows(workdir) == expected
    ours, theirs = (arrays(folder / 'checkpoints' / '6') for folder in (workdir, source))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    blocks = (source / 'samples.txt').read_text(encoding='utf-8')
    assert (workdir / 'samples.txt').read_text(encoding='utf-8') == blocks[blocks.index('step 6\n') :]
    said = capsys.readouterr()
    assert f'restoring step 3 of {other / "checkpoints" / "3"}, with its optimizer\n' in said.out
    assert 'kept as metrics-before-1.jsonl' in said.err

    record = load(workdir).meta['restore_from']
    manifest = (other / 'checkpoints' / '3' / 'manifest.sha256.json').read_bytes()
    assert record == {
        'path': str(other / 'checkpoints' / '3'),
        'step': 3,
        'sha256': hashlib.sha256(hashlib.sha256(manifest).digest()).hexdigest(),
        'rows_ahead': 0,
        'rows_left_out': 0,
    }
    assert load(source).meta['restore_from'] is None

    # From now on it is a run of its own, which needs no other.
    shutil.rmtree(other)
    assert train(config, workdir).step == 6
    assert 'finished already, at step 6' in capsys.readouterr().out
    message = refusal(train, forked(), workdir)
    assert f'checkpoint.restore_from: {other / "checkpoints" / "3"} -> {source / "checkpoints" / "3"}' in message


@pytest.mark.slow
def test_a_fork_of_a_fork_that_was_stopped_and_made_longer_has_the_bits_of_one_run(
    forked, tiny_config, source, tmp_path, assert_same_bits
):
    schedule = {'schedule.decay_steps': 6}
    train(forked(schedule | {'train.steps': 4}), tmp_path / 'first')
    train(forked(schedule | {'train.steps': 5}), tmp_path / 'first')  # resumed, from its own step 4
    assert [row['step'] for row in rows(tmp_path / 'first') if 'loss' in row] == [4, 5]
    last = train(forked(schedule | {'train.steps': 6}, path=tmp_path / 'first'), tmp_path / 'second')
    assert_same_bits(last.params, load(source).params)
    assert [row['loss'] for row in rows(tmp_path / 'second') if 'loss' in row] == [
        row['loss'] for row in rows(source) if row['step'] == 6 and 'loss' in row
    ]
    assert (find_run(tmp_path / 'second').meta['restore_from']['step'], last.step) == (5, 6)


# With a config of its own


@pytest.mark.slow
def test_state_arrives_on_another_mesh_in_another_precision_and_counts_on_and_goes_back_to_the_first(
    forked, source, tmp_path
):
    changes = {
        'mesh.data': 1,
        'mesh.fsdp': 4,
        'mesh.tensor': 2,
        'model.scan_layers': True,
        'precision.moments': 'bf16',
        'precision.params': 'bf16',
        'precision.compute': 'fp16',
        'optimizer.ema_decay': 0.9,
        'optimizer.multipliers': 'wpe:lr=0.5',
        'optimizer.clip_norm': 0.0,
        'train.spike_loss_deviations': 3.0,
        'train.spike_window_steps': 5,
    }
    trainer = begun(forked(changes), tmp_path)
    state = trainer.first_state()
    assert (trainer.start, trainer.total, state.step.item(), state.skipped.item()) == (3, 6, 3, 0)
    there = arrays(source / 'checkpoints' / '3')
    narrow = lambda array: np.asarray(jnp.asarray(array, jnp.bfloat16))  # noqa: E731  numpy has no bfloat16
    for name, array in by_name({'params': state.params, 'optimizer': {'opt_state': state.opt_state}}).items():
        wanted = there[name] if there[name].dtype == np.int32 else narrow(there[name])
        np.testing.assert_array_equal(array, wanted, err_msg=name)
    up = state.params['blocks']['mlp']['up']['kernel']
    assert up.addressable_shards[0].data.size == up.size // 8
    # What that run had not begins here.
    assert (state.loss_scale.scale.item(), state.spikes.losses.tolist()) == (65536.0, [0.0] * 5)
    np.testing.assert_array_equal(state.ema['wte'], narrow(there['params/wte']).astype(np.float32))

    # And from there to a run as the first one was.
    with Checkpoints(tmp_path / 'narrow' / 'checkpoints') as checkpoints:
        checkpoints.save(3, state.params, state.optimizer, trainer.describe(), ema=state.ema)
    there = arrays(tmp_path / 'narrow' / 'checkpoints' / '3', 'params', 'optimizer', 'ema')
    assert there['params/wte'].dtype == there['optimizer/opt_state/1/nu/wte'].dtype == jnp.bfloat16
    state = begun(forked({'optimizer.ema_decay': 0.5}, path=tmp_path / 'narrow'), tmp_path / 'wide').first_state()
    found = by_name({'params': state.params, 'optimizer': {'opt_state': state.opt_state}, 'ema': state.ema})
    assert {str(array.dtype) for array in found.values()} == {'float32', 'int32'}
    for name, array in found.items():
        np.testing.assert_array_equal(array, there[name].astype(array.dtype), err_msg=name)
    assert (state.loss_scale, state.spikes) == (None, None)
    # An average that nobody asks for is left there.
    assert begun(forked(path=tmp_path / 'narrow'), tmp_path / 'without').first_state().ema is None


# Half the batch, another peak, another schedule, and a longer one.
CHANGED = {
    'train.batch_size': 8,
    'train.steps': 4,
    'optimizer.learning_rate': 3e-3,
    'schedule.shape': 'linear',
    'schedule.decay_steps': 12,
    'eval.batch_size': 16,
}


def test_the_rate_is_that_of_its_own_schedule_and_what_differs_is_said_and_recorded(forked, tmp_path, capsys):
    trainer = begun(forked(CHANGED), tmp_path)
    # Linear from step 2 (the warmup) to a tenth at step 12; the fourth step, counted from 0, is 3.
    assert float(trainer.schedule(3)) == pytest.approx(3e-3 * (1 - 0.9 * 1 / 10), rel=1e-6)
    assert (trainer.start, trainer.total) == (3, 4)
    meta = trainer.describe()
    assert meta['restore_from']['rows_ahead'] == 3 * 16 - 3 * 8
    assert meta['earlier_schedules'] == [
        {'until': 3, 'warmup': 2, 'decay': 6, 'final_fraction': 0.1, 'shape': 'cosine', 'cooldown_fraction': 0.2}
    ]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('restoring step 3')]
    for what in (
        'optimizer.learning_rate: 0.01 -> 0.003',
        'train.batch_size: 16 -> 8',
        'schedule.shape: cosine -> linear',
        "the end of the schedule's decay: step 6 -> 12",
    ):
        assert what in said
    assert 'model.' not in said
    assert 'data' not in said


def test_rows_follow_each_other_whatever_the_batches_were_and_what_was_left_out_stays_so(forked, source, tmp_path):
    def left_out(meta):
        meta['went_back'] = [{'from': 3, 'to': 0, 'rows_left_out': 48}]

    other = rewritten(source / 'checkpoints' / '3', tmp_path / 'other', left_out)
    for batch_size in (16, 8, 32):
        trainer = begun(forked({'train.batch_size': batch_size, 'eval.batch_size': 16}, path=other), tmp_path)
        batches = trainer._batches().batches
        # Three batches of 16, which came after 48 rows that were left out.
        assert [batches.first_row(step) for step in (3, 4)] == [96, 96 + batch_size]
        one_by_one = Batches(trainer.data.train, 1, 32, seed=0)
        expected = np.concatenate([one_by_one.rows(row)['tokens'] for row in range(96, 96 + batch_size)])
        np.testing.assert_array_equal(batches.rows(3)['tokens'], expected)


def test_other_text_is_cut_by_the_tokenizer_of_that_run(forked, source, tmp_path, capsys, corpus):
    text = tmp_path / 'other.txt'
    text.write_text('\n'.join(reversed(corpus.read_text(encoding='utf-8').split('\n'))), encoding='utf-8')
    trainer = begun(forked({'data.path': str(text), 'data.tokenizer': None, 'model.d_model': None}), tmp_path)
    config = trainer.describe()['config']
    assert (config['model']['d_model'], config['data']['tokenizer']) == (32, 'char')
    meta = find_run(source).meta
    assert trainer.data.tokenizer.fingerprint == meta['tokenizer_fingerprint']
    before, now = meta['data_fingerprint'], trainer.data.fingerprint
    assert f'with its optimizer; other than there: data: {before[:12]} -> {now[:12]}\n' in capsys.readouterr().out


@pytest.mark.slow
def test_tokens_are_those_of_both_runs_and_one_that_goes_wrong_before_it_has_saved_goes_back_to_the_other_once(
    forked, source, tmp_path, capsys
):
    wild = {'optimizer.learning_rate': 1e30, 'optimizer.clip_norm': 0.0, 'train.max_skipped_in_a_row': 1}
    message = refusal(train, forked(CHANGED | wild | {'train.steps': 6}), tmp_path)
    assert 'the run had gone back already, from step 5 to step 3; no checkpoint had been saved yet' in message
    said = f'going back to step 3 of {source / "checkpoints" / "3"}, as there is no checkpoint yet'
    assert said in capsys.readouterr().out
    # Three steps of 16 there, and here of 8.
    assert [(row['step'], row['tokens']) for row in rows(tmp_path)] == [(4, 32 * (48 + 8)), (5, 32 * (48 + 16))]
    assert rows(tmp_path)[0]['learning_rate'] == pytest.approx(1e30 * (1 - 0.9 * 1 / 10), rel=1e-6)


# Params alone


def test_params_alone_are_what_init_from_takes(tiny_config, source):
    given = parse(tiny_config({'checkpoint.restore_from': str(source), 'checkpoint.restore_items': 'params'}))
    assert given == parse(tiny_config({'train.init_from': str(source)}))
    assert (given.train.init_from, given.checkpoint.restore_from) == (str(source), None)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'checkpoint.restore_from': 'a', 'train.init_from': 'b'},
            'train.init_from=b and checkpoint.restore_from=a: a run begins with the weights of one, or goes on from',
        ),
        ({'checkpoint.restore_items': 'params'}, 'checkpoint.restore_items=params: of which run?'),
        ({'train.init_weights': 'ema'}, 'train.init_weights=ema: of which checkpoint? Give train.init_from, or'),
        (
            {'checkpoint.restore_from': 'a', 'train.init_weights': 'ema'},
            'train.init_weights=ema: with checkpoint.restore_from the parameters and their average are both taken',
        ),
        ({'checkpoint.restore_from': ''}, "checkpoint.restore_from='' must be a text that is not empty"),
        ({'checkpoint.restore_items': 'optimizer'}, "checkpoint.restore_items='optimizer' must be one of all, params"),
    ],
)
def test_keys_that_contradict_each_other_are_named_before_anything_is_looked_for(
    tiny_config, tmp_path, changes, message
):
    config = tiny_config(changes)
    assert message in refusal(parse, config)
    assert message in refusal(train, config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


# What cannot be gone on from


def damage(step_folder):
    """A bit of a parameter or moment."""
    path = max(
        (path for path in (step_folder / 'optimizer').rglob('*') if path.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_the_newest_step_is_taken_and_a_damaged_one_is_left_and_said(source, tmp_path, capsys):
    assert find_run(source).found.step == find_run(source / 'checkpoints').found.step == 6
    # The best one is what a model is loaded from; a run goes on from where it is.
    assert resolve(source).step in (3, 6)
    other = shutil.copytree(source, tmp_path / 'other')
    path = damage(other / 'checkpoints' / '6')
    assert find_run(other, verify=False).found.step == 6
    assert find_run(other).found.step == 3
    assert f'warning: {path} is damaged (its sha256 differs); step 3 is used instead' in capsys.readouterr().err
    assert sorted(path.name for path in (other / 'checkpoints').iterdir()) == ['3', '6']
    message = refusal(find_run, other / 'checkpoints' / '6')
    assert message.startswith(f'{path} is damaged (its sha256 differs): name another step of that run, or copy')
    damage(other / 'checkpoints' / '3')
    message = refusal(find_run, other)
    assert message.startswith(f'{other} holds no good checkpoint: {path} is damaged')


def newer(folder):
    def change(meta):
        meta['config']['format'] = FORMAT + 1

    rewritten(folder / 'checkpoints' / '6', folder / 'new', change)
    shutil.rmtree(folder / 'checkpoints')
    (folder / 'new').rename(folder / 'checkpoints')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (shutil.rmtree, 'does not exist: give the workdir of another run, or a checkpoints/STEP folder'),
        (lambda folder: shutil.rmtree(folder / 'checkpoints'), 'holds no finished checkpoint: give the workdir of'),
        (
            lambda folder: [shutil.rmtree(folder / 'checkpoints' / step / 'optimizer') for step in '36'],
            'holds no good checkpoint: ',
        ),
        (newer, f'was written by a newer gpt_jax (format {FORMAT + 1} of its keys'),
    ],
    ids=['missing', 'empty', 'damaged', 'newer'],
)
def test_a_run_that_cannot_be_used_is_one_line_and_leaves_no_workdir(forked, source, tmp_path, spoil, message):
    other = shutil.copytree(source, tmp_path / 'other')
    spoil(other)
    found = refusal(train, forked({'train.steps': 9}, path=other), tmp_path / 'run')
    assert found.startswith(f'checkpoint.restore_from={other}')
    assert message in found
    assert not (tmp_path / 'run').exists()


def test_what_has_no_optimizer_is_for_init_from(forked, tiny_gpt2, tmp_path):
    from gpt_jax.checkpoints import import_huggingface

    import_huggingface(tiny_gpt2, tmp_path / 'imported')
    for path, what in ((tiny_gpt2, 'is a Hugging Face directory'), (tmp_path / 'imported', 'has parameters alone')):
        message = refusal(train, forked(path=path), tmp_path / 'run')
        assert message.startswith(f'checkpoint.restore_from={path}: {path} {what}, with no state of an optimizer')
        assert message.endswith('start from it with train.init_from')
    assert not (tmp_path / 'run').exists()


def test_a_run_that_has_come_further_is_refused_with_both_steps(forked, source, tmp_path):
    message = refusal(train, forked(path=source), tmp_path / 'run')
    assert message == (
        f'checkpoint.restore_from={source}: the run there has come to step 6, and this one ends at step 6: nothing is '
        'left to do; give a train.steps above that, or name an earlier checkpoints/STEP'
    )
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('changes', 'conflicts'),
    [
        ({'model.n_layer': 3, 'model.d_model': 64}, ('model.n_layer=3 and there 2', 'model.d_model=64 and there 32')),
        # The position table of weights alone may be cut; that of moments may not.
        ({'model.block_size': 16}, ('model.block_size=16 and there 32',)),
        ({'data.tokenizer': 'bpe'}, ('data.tokenizer=bpe and there char',)),
    ],
)
def test_another_shape_or_tokenizer_is_named_key_by_key(forked, source, changes, conflicts):
    message = refusal(resolve_config, forked(changes))
    assert message.startswith(f'checkpoint.restore_from={source / "checkpoints" / "3"} is of another kind than this')
    for conflict in conflicts:
        assert f'here {conflict}' in message
    assert message.endswith('; leave these keys unset, or start from another checkpoint')


def test_a_folder_may_stand_for_the_tokenizer_that_a_run_has(tiny_config, tiny_gpt2, tmp_path):
    from gpt_jax.training import recipe

    run = resolve_config(tiny_config({'train.init_from': str(tiny_gpt2), 'data.tokenizer': None}))
    weights = recipe.find_initial_weights(str(tiny_gpt2))
    record = {'config': dataclasses.asdict(run)}
    weights = dataclasses.replace(weights, meta=record)
    keys = {'checkpoint.restore_from': str(tmp_path), 'model.layer_norm_epsilon': None}
    assert resolve_config(tiny_config(keys | {'data.tokenizer': str(tiny_gpt2)}), weights).data.tokenizer == str(
        tiny_gpt2
    )
    other = tmp_path / 'tokenizer'
    other.mkdir()
    from gpt_jax.data.tokenizer import train_bpe

    train_bpe(['another text, of which another tokenizer is made'], 300).save(other / 'tokenizer.json')
    message = refusal(resolve_config, tiny_config(keys | {'data.tokenizer': str(other)}), weights)
    assert f'here data.tokenizer={other} and there bpe' in message


# Several processes

RUN = """
import json
from gpt_jax.training import train
result = train(json.loads(arguments[0]), arguments[1])
print(json.dumps({'step': result.step}))
"""


@pytest.mark.slow
def test_two_processes_go_on_from_the_same_step_of_a_damaged_run(two_processes, forked, source, tmp_path):
    other = shutil.copytree(source, tmp_path / 'other')
    damage(other / 'checkpoints' / '6')
    config = forked({'mesh.data': 1, 'mesh.fsdp': 2}, path=other)
    assert two_processes(RUN, config.to_json(), tmp_path / 'run') == [{'step': 6}] * 2
    ours, theirs = ([row['loss'] for row in rows(folder) if 'loss' in row] for folder in (tmp_path / 'run', source))
    assert ours == pytest.approx(theirs[3:], rel=1e-4)
    assert pathlib.Path(load(tmp_path / 'run').meta['restore_from']['path']) == other
