"""What a run keeps between steps besides float32 parameters and moments: narrow ones, an average, a growing batch."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.checkpoints import Checkpoints, load, resolve
from gpt_jax.config import read_record
from gpt_jax.data import Batches, BatchSizes
from gpt_jax.errors import InputError
from gpt_jax.parallel import MeshConfig, make_mesh
from gpt_jax.training import resolve as resolve_config
from gpt_jax.training import train
from gpt_jax.training.recipe import model_config
from gpt_jax.training.step import check_memory, check_mesh

NARROW = {'precision': 'bf16', 'settings': (('params', 'bf16'),), 'moments': 'bf16'}


def rows_of(workdir, name='loss'):
    lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [row for row in map(json.loads, lines) if name in row]


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(1, 1, 1, 1), (2, 2, 2, 1)])
def test_narrow_parameters_and_moments_learn_what_wide_ones_do(lab, mesh):
    one = lab(mesh=mesh, **NARROW)
    state, rows = one.run(20)
    _, expected = lab().run(20)
    assert dtypes(state.params) == dtypes(state.opt_state[1].mu) == dtypes(state.opt_state[1].nu) == {'bfloat16'}
    assert expected[-1]['loss'] < 0.8 * expected[0]['loss']
    for row, wanted in zip(rows, expected, strict=True):
        assert row['loss'] == pytest.approx(wanted['loss'], rel=0.02)
    for moment in (state.opt_state[1].mu, state.opt_state[1].nu):
        for leaf, parameter in zip(jax.tree.leaves(moment), jax.tree.leaves(state.params), strict=True):
            assert leaf.sharding == parameter.sharding


@pytest.mark.parametrize('mesh', [(1, 1, 1, 1), pytest.param((2, 2, 2, 1), marks=pytest.mark.slow)])
def test_the_average_is_that_of_the_parameters_nearer_to_them_at_first(lab, mesh):
    one = lab(mesh=mesh, settings=(('ema_decay', 0.3),))
    state = one.state()
    average = jax.device_get(state.params)
    for index in range(4):
        state, _ = one.step(state, one.batch(index))
        decay = min(0.3, (1 + index) / (10 + index))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params)
    for leaf, expected, parameter in zip(
        jax.tree.leaves(state.ema), jax.tree.leaves(average), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, atol=1e-6)
        assert leaf.sharding == parameter.sharding
    assert not np.allclose(state.ema['wte'], state.params['wte'])


def test_frozen_parameters_keep_every_bit_and_clip_no_other(lab, assert_same_bits):
    one = lab(multipliers='blocks/.*:lr=0')
    state = one.state()
    frozen, wte = jax.device_get((state.params['blocks'], state.params['wte']))
    state, metrics = one.step(state, one.batch())
    assert_same_bits(state.params['blocks'], frozen)
    assert not np.array_equal(state.params['wte'], wte)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state[1].mu['blocks']))

    def loss(rest):
        params = rest | {'blocks': frozen}
        logits = one.model.apply({'params': params}, one.batch()['tokens'])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), one.batch()['targets'][..., None], -1).mean()

    rest = {name: value for name, value in jax.device_get(one.state().params).items() if name != 'blocks'}
    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(rest))
    expected = np.sqrt(sum((np.asarray(gradient, np.float64) ** 2).sum() for gradient in gradients))
    assert metrics['grad_norm'].item() == pytest.approx(expected, rel=1e-4)


def test_each_row_is_fed_once_while_the_batch_grows():
    sizes = BatchSizes.ramp(2, 12, block_size=4, ramp_tokens=160)
    tokens = np.arange(4 * 500 + 1)
    batches, plain = Batches(tokens, sizes, 4, seed=3), Batches(tokens, 2, 4, seed=3)
    rows = np.concatenate([batches.rows(step)['tokens'] for step in range(30)])
    expected = np.concatenate([plain.rows(step)['tokens'] for step in range(len(rows) // 2)])
    np.testing.assert_array_equal(rows, expected)
    assert len(batches.rows(0)['tokens']) == 2
    assert len(batches.rows(29)['tokens']) == 12
    np.testing.assert_array_equal(batches.rows(29, 3, 5)['tokens'], batches.rows(29)['tokens'][3:5])
    with pytest.raises(IndexError):
        batches.rows(0, 0, 3)
    # Where rows were left out the others follow in the same order.
    later = Batches(tokens, sizes, 4, seed=3, left_out=7)
    np.testing.assert_array_equal(later.rows(0)['tokens'], expected[7:9])
    assert later.first_row(1) == 9
    name, place = later.origin(later.first_row(1))
    assert (name, tokens[place : place + 4].tolist()) == ('', expected[9].tolist())


EVERYTHING = {
    'optimizer.ema_decay': 0.9,
    'optimizer.multipliers': 'wpe:lr=0',
    'precision.params': 'bf16',
    'precision.moments': 'bf16',
    'schedule.shape': 'wsd',
    'schedule.batch_ramp_tokens': 700,
    'schedule.initial_batch_size': 8,
    'train.spike_loss_deviations': 9.0,
    'train.spike_window_steps': 3,
    'schedule.decay_steps': 6,
}


@pytest.fixture(scope='module')
def with_everything(tiny_config, tmp_path_factory):
    """A run with all of it, to its end."""
    return train(tiny_config(EVERYTHING), tmp_path_factory.mktemp('everything') / 'run')


@pytest.mark.slow
def test_rows_count_the_tokens_of_a_growing_batch_and_measure_the_average_too(with_everything):
    rows = rows_of(with_everything.workdir)
    assert [row['tokens'] for row in rows] == (32 * np.cumsum([8, 8, 8, 16, 16, 16])).tolist()
    validation = rows_of(with_everything.workdir, 'val_loss')
    assert all(row['val_loss_ema'] != row['val_loss'] for row in validation)
    # The average of a run that learns lags behind.
    assert validation[-1]['val_loss_ema'] > validation[-1]['val_loss']


@pytest.mark.slow
def test_the_average_is_loaded_by_its_name_and_everything_in_float32(with_everything):
    raw, average = (load(resolve(with_everything.workdir, weights=weights)).params for weights in ('raw', 'ema'))
    assert dtypes(raw) == dtypes(average) == {'float32'}
    jax.tree.map(
        lambda leaf, wanted: np.testing.assert_array_equal(leaf, wanted.astype(jnp.float32)),
        raw,
        with_everything.params,
    )
    assert not np.array_equal(raw['wte'], average['wte'])


@pytest.mark.slow
def test_a_run_begins_with_the_average_and_says_so(with_everything, tiny_config, tmp_path, capsys, assert_same_bits):
    keys = {'train.init_from': str(with_everything.workdir), 'train.init_weights': 'ema', 'train.steps': 1}
    # At a rate that float32 loses beside any weight a step changes nothing: what comes back is what was loaded.
    rate = {'optimizer.learning_rate': 1e-30, 'schedule.warmup_steps': 0}
    given = {'model.block_size': 16, 'data.tokenizer': None}
    begun = train(tiny_config(keys | rate | given), tmp_path / 'run')
    average = load(resolve(with_everything.workdir, weights='ema'))
    assert (
        f'weights: {with_everything.workdir} (step {average.step}, the average of its parameters, the first 16 of its '
        '32 positions)\n'
    ) in capsys.readouterr().out
    assert_same_bits(begun.params, average.params | {'wpe': average.params['wpe'][:16]})


def test_a_checkpoint_without_an_average_says_so(finished_run):
    with pytest.raises(InputError, match=r'checkpoints/6 holds no average of its parameters .*leave --weights=ema out'):
        resolve(finished_run.workdir, weights='ema')


@pytest.mark.slow
def test_all_of_it_is_resumed_to_the_bit(with_everything, tiny_config, tmp_path, assert_same_bits):
    train(tiny_config(EVERYTHING | {'train.steps': 3}), tmp_path)
    again = train(tiny_config(EVERYTHING), tmp_path)
    assert_same_bits(again.params, with_everything.params)
    raw, average = (load(resolve(tmp_path, weights=weights)).params for weights in ('raw', 'ema'))
    assert_same_bits(average, load(resolve(with_everything.workdir, weights='ema')).params)
    assert_same_bits(raw, load(with_everything.workdir).params)
    assert [row['loss'] for row in rows_of(tmp_path)] == [row['loss'] for row in rows_of(with_everything.workdir)]
    # What grows otherwise than it did is refused, by name.
    constant = {'schedule.batch_ramp_tokens': None, 'schedule.initial_batch_size': None}
    with pytest.raises(InputError, match=r'schedule\.batch_ramp_tokens=700 and schedule\.initial_batch_size=8'):
        train(tiny_config(EVERYTHING | constant | {'train.steps': 9}), tmp_path)
    # An average that is asked for later begins where the run is then.
    plain = {name: value for name, value in EVERYTHING.items() if name != 'optimizer.ema_decay'}
    train(tiny_config(plain | {'train.steps': 3}), tmp_path / 'later')
    assert train(tiny_config(EVERYTHING), tmp_path / 'later').step == 6
    assert_same_bits(load(tmp_path / 'later').params, raw)
    assert resolve(tmp_path / 'later', 6, weights='ema')


@pytest.mark.slow
def test_a_checkpoint_from_before_all_of_it_resumes_to_the_same_bits(
    finished_run, tiny_config, tmp_path, assert_same_bits
):
    first = train(tiny_config({'train.steps': 3, 'schedule.decay_steps': 6}), tmp_path / 'run')
    with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
        meta = checkpoints.read_meta(3)
    assert (first.step, meta['went_back']) == (3, [])
    # As an earlier version wrote it: without these names.
    from gpt_jax.checkpoints.loading import read_items, stored_shapes

    folder = tmp_path / 'run' / 'checkpoints' / '3'
    trees = {name: stored_shapes(folder, name) for name in ('params', 'optimizer')}
    trees = read_items(folder, **trees)
    optimizer = {name: tree for name, tree in trees['optimizer'].items() if name not in ('skipped_in_a_row', 'spikes')}
    del meta['went_back']
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')
    with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
        checkpoints.save(3, trees['params'], optimizer, meta, meta['val_loss'])
    again = train(tiny_config({'schedule.decay_steps': 6}), tmp_path / 'run')
    assert again.step == 6
    assert_same_bits(again.params, finished_run.params)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'schedule.batch_ramp_tokens': 1500, 'schedule.initial_batch_size': 4},
            r'a batch of 4 sequences, .* is not divisible by the 8 devices .* choose an initial_batch_size that is',
        ),
        ({'optimizer.multipliers': 'head:lr=2'}, "'head' matches no parameter"),
        ({'optimizer.multipliers': 'wte:2'}, "'2' is no lr=FACTOR"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(tiny_config, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        train(tiny_config(changes), tmp_path / 'run')
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_smaller_batches_are_cut_into_micro_batches_no_larger_than_the_full_ones(tiny_config):
    run = resolve_config(
        tiny_config(
            {
                'train.batch_size': 64,
                'train.accumulation_steps': 4,
                'schedule.batch_ramp_tokens': 10**6,
                'schedule.initial_batch_size': 8,
            }
        )
    )
    check_mesh(run, {'data': 8, 'fsdp': 1, 'tensor': 1, 'context': 1}, model_config(run, 100))
    from gpt_jax.training.step import micro_batches

    assert [micro_batches(run, size, 8) for size in (8, 16, 24, 64)] == [1, 1, 3, 4]


def test_memory_is_counted_by_what_is_stored(tiny_config, monkeypatch):
    def needed(changes):
        run = resolve_config(tiny_config({'model.d_model': 2**20, 'model.n_head': 1} | changes))
        with pytest.raises(InputError) as error:
            check_memory(run, model_config(run, 100), make_mesh(MeshConfig(), jax.devices()[:1]))
        return float(str(error.value).split('needs at least ')[1].split(' GiB')[0].replace(',', ''))

    whole = needed({})
    assert needed({'precision.params': 'bf16', 'precision.moments': 'bf16'}) == pytest.approx(whole * 10 / 16, rel=0.01)
    assert needed({'optimizer.ema_decay': 0.9}) == pytest.approx(whole * 20 / 16, rel=0.01)


def test_a_record_from_before_these_keys_means_what_it_did():
    record = json.loads(
        (pytest.importorskip('pathlib').Path(__file__).parents[1] / 'golden' / 'config-1-gpt3.json').read_text()
    )
    run = read_record(record)
    assert (run.schedule.shape, run.schedule.batch_ramp_tokens, run.optimizer.multipliers) == ('cosine', None, None)
    assert (run.precision.params, run.precision.moments, run.optimizer.ema_decay) == ('f32', 'f32', None)
    assert (run.train.spike_loss_deviations, run.train.spike_grad_norm_deviations) == (None, None)
