"""Steps that would do harm: skipped, counted, gone back for once, and then the end with a reason."""

import json
import math
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.errors import InputError
from gpt_jax.training import train, trainer
from gpt_jax.training.step import GRADIENT_SPIKE, LOSS_SPIKE, NOT_FINITE, _bad_groups, find_not_finite

WINDOW = (('loss_deviations', 3.0), ('grad_norm_deviations', 4.0), ('window', 4))


def with_nan(state):
    """Of one gain in the second layer, which the first layer's gradient meets after the last one's."""
    scale = state.params['blocks']['ln_2']['scale'].at[1, 0].set(jnp.nan)
    blocks = state.params['blocks'] | {'ln_2': state.params['blocks']['ln_2'] | {'scale': scale}}
    return state.replace(params=state.params | {'blocks': blocks})


def parts(state):
    """Copies of all that a skipped step must not change."""
    return jax.device_get((state.params, state.opt_state, state.ema, state.spikes))


@pytest.mark.parametrize(
    ('mesh', 'accumulation_steps', 'precision'),
    [
        ((1, 1, 1, 1), 1, 'f32'),
        pytest.param((2, 2, 2, 1), 2, 'f32', marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 1), 2, 'bf16', marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_but_its_counters(
    lab, assert_same_bits, mesh, accumulation_steps, precision
):
    one = lab(mesh=mesh, accumulation_steps=accumulation_steps, precision=precision, settings=WINDOW)
    state, _ = one.step(one.state(), one.batch())
    good = one.put({name: np.asarray(array) for name, array in one.batch(1).items()})
    bad = with_nan(state)
    before = parts(bad)
    for count in (1, 2):
        bad, metrics = one.step(bad, good)
        assert not math.isfinite(metrics['loss'].item())
        assert metrics['skip_reason'].item() == NOT_FINITE
        assert metrics['skipped_in_a_row'].item() == bad.skipped_in_a_row.item() == count
        assert metrics['skipped_steps'].item() == bad.skipped.item() == count
    assert_same_bits(parts(bad), before)
    assert bad.step.item() == 3
    # A step that is not skipped ends the row, and goes on where the schedule and Adam's count stood.
    healed = bad.replace(params=jax.tree.map(lambda leaf: jnp.nan_to_num(leaf, nan=1.0), bad.params))
    healed, metrics = one.step(healed, good)
    assert (metrics['skip_reason'].item(), healed.skipped_in_a_row.item(), healed.skipped.item()) == (0, 0, 2)
    assert healed.opt_state[1].count.item() == 2


def test_the_parameters_that_were_first_to_be_not_finite_are_named(lab):
    one = lab()
    assert find_not_finite(one.model, one.mesh, one.state(), one.batch()) is None
    found = find_not_finite(one.model, one.mesh, with_nan(one.state()), one.batch())
    assert found == 'the values of blocks/ln_2/scale in layer 1'


def test_the_first_gradient_is_that_nearest_to_the_output():
    clean = np.zeros(3, bool)
    flags = {
        'wte': True,
        'ln_f': {'scale': False, 'bias': False},
        'blocks': {
            'ln_1': {'scale': np.array([True, True, False])},
            'mlp': {'up': {'kernel': np.array([True, False, False])}, 'down': {'kernel': clean}},
            'attention': {'qkv': {'kernel': np.array([True, True, False])}, 'out': {'kernel': clean}},
        },
    }
    # Of layer 1 attention's gradient is made before that of the norm in front of it.
    assert _bad_groups(flags) == [
        'blocks/attention/qkv/kernel in layer 1',
        'blocks/ln_1/scale in layer 1',
        'blocks/mlp/up/kernel in layer 0',
        'blocks/attention/qkv/kernel in layer 0',
        'blocks/ln_1/scale in layer 0',
        'wte',
    ]


def fill(one, state, losses, norms):
    """A window that is full of these numbers."""
    window = state.spikes.replace(
        losses=jnp.asarray(losses, jnp.float32), grad_norms=jnp.asarray(norms, jnp.float32), count=jnp.int32(4)
    )
    return state.replace(spikes=jax.device_put(window, jax.tree.map(lambda leaf: leaf.sharding, state.spikes)))


@pytest.mark.parametrize('mesh', [(1, 1, 1, 1), pytest.param((2, 2, 2, 1), marks=pytest.mark.slow)])
def test_a_spike_is_what_lies_beyond_its_deviations_from_the_window(lab, assert_same_bits, mesh):
    one = lab(mesh=mesh, settings=WINDOW)
    _, metrics = one.step(one.state(), one.batch())
    loss, norm = metrics['loss'].item(), metrics['grad_norm'].item()

    def reason(losses, norms):
        state = fill(one, one.state(), losses, norms)
        before = parts(state)
        state, metrics = one.step(state, one.batch())
        if metrics['skip_reason'].item():
            assert_same_bits(parts(state), before)
            assert (state.skipped.item(), state.skipped_in_a_row.item()) == (1, 1)
        else:
            # It takes the place of the oldest.
            assert state.spikes.losses.tolist() == pytest.approx([loss, *losses[1:]])
            assert state.spikes.grad_norms.tolist() == pytest.approx([norm, *norms[1:]])
            assert state.spikes.count.item() == 5
        return metrics['skip_reason'].item()

    def around(value, deviations, std):
        """Numbers whose mean lies `deviations` x std below `value`, with that standard deviation."""
        mean = value - deviations * std
        return [mean - std, mean + std, mean - std, mean + std]

    calm_loss, calm_norm = around(loss, 0.0, 0.1), around(norm, 0.0, 0.1)
    assert reason(calm_loss, calm_norm) == 0
    assert reason(around(loss, 2.9, 0.1), calm_norm) == 0
    assert reason(around(loss, 3.1, 0.1), calm_norm) == LOSS_SPIKE
    assert reason(calm_loss, around(norm, 3.9, 0.1)) == 0
    assert reason(calm_loss, around(norm, 4.1, 0.1)) == GRADIENT_SPIKE
    # Below the mean nothing is one, however far; nor are equal numbers.
    assert reason(around(loss, -50.0, 0.1), around(norm, -50.0, 0.1)) == 0
    assert reason([loss] * 4, [norm] * 4) == 0


def test_nothing_is_a_spike_before_the_window_is_full(lab):
    one = lab(settings=WINDOW)
    state = fill(one, one.state(), [0.0] * 4, [0.0] * 4)
    state = state.replace(spikes=state.spikes.replace(count=jnp.int32(3)))
    state, metrics = one.step(state, one.batch())
    assert metrics['skip_reason'].item() == 0
    _, metrics = one.step(fill(one, one.state(), [0.0] * 4, [0.0] * 4), one.batch())
    assert metrics['skip_reason'].item() == LOSS_SPIKE


# Whole runs, in which chosen steps go wrong.


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def training_rows(workdir):
    return [row for row in rows_of(workdir) if 'loss' in row]


class Marked(dict):
    """A batch of which the step makes NaN."""


jax.tree_util.register_pytree_node(
    Marked,
    lambda batch: (list(batch.values()), tuple(batch)),
    lambda names, arrays: dict(zip(names, arrays, strict=True)),
)


@pytest.fixture
def poison(monkeypatch):
    """A function: which batches, by the number of their first row, the step makes NaN of; gives the list of verdicts.

    The parameters that such a step is given are NaN, as after a bad update. Afterwards they are what they were, or with
    `stays` still NaN.
    """
    make_train_step, make, seen = trainer.make_train_step, trainer._DeviceBatches.make, []
    keep = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * jnp.nan, tree), donate_argnums=0)

    def poison(is_bad, stays=False):
        def marked(self, step):
            batch = make(self, step)
            return Marked(batch) if is_bad(self.batches.first_row(step)) else batch

        def poisoned(*arguments):
            train_step = make_train_step(*arguments)

            def run(state, batch):
                bad = isinstance(batch, Marked)
                seen.append(bad)
                if not bad:
                    return train_step(state, batch)
                good = None if stays else jax.block_until_ready(keep(state.params))
                state = state.replace(params=jax.block_until_ready(spoil(state.params)))
                state, metrics = jax.block_until_ready(train_step(state, dict(batch)))
                return (state if stays else state.replace(params=good)), metrics

            run.lower = lambda state, batch: train_step.lower(state, dict(batch))
            return run

        monkeypatch.setattr(trainer, 'make_train_step', poisoned)
        monkeypatch.setattr(trainer._DeviceBatches, 'make', marked)
        return seen

    return poison


def test_a_bad_batch_is_skipped_counted_and_named_and_the_run_goes_on(tiny_config, tmp_path, poison, capsys):
    poison(lambda first_row: first_row == 48)
    result = train(tiny_config(), tmp_path)
    assert (result.step, result.signal) == (6, None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    rows = training_rows(tmp_path)
    assert [row['skipped_steps'] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert (rows[3]['loss'], rows[3]['grad_norm']) == (None, None)
    assert 'skipped_in_a_row' not in rows[3]
    # The schedule waited for it.
    assert rows[4]['learning_rate'] == rows[3]['learning_rate'] > rows[5]['learning_rate']
    output = capsys.readouterr().out
    assert re.search(
        r'^step 4 skipped: loss nan, gradient norm nan: not finite; 1 in a row, 1 in all; rows 48 to 63 of the data, '
        r'the first at token \d+',
        output,
        re.MULTILINE,
    )
    assert output.count('skipped:') == 1


def test_after_too_many_in_a_row_it_goes_back_once_and_on_with_other_data(
    tiny_config, tmp_path, poison, capsys, assert_same_bits
):
    # Steps 5 and 6 are bad. Back at step 3, the data go on after step 6, with row 96.
    config = tiny_config({'train.max_skipped_in_a_row': 2, 'train.steps': 8})
    seen = poison(lambda first_row: first_row in (64, 80))
    result = train(config, tmp_path / 'run')
    assert result.step == 8
    assert seen == [False] * 4 + [True] * 2 + [False] * 5
    output = capsys.readouterr().out
    assert re.search(
        r'at step 6 is not finite, and 2 step\(s\) in a row were skipped: going back to step 3, the', output
    )
    rows = training_rows(tmp_path / 'run')
    assert [row['step'] for row in rows] == list(range(1, 9))
    assert {row['skipped_steps'] for row in rows} == {0}
    meta = load(tmp_path / 'run', step=8).meta
    assert meta['went_back'] == [{'from': 6, 'to': 3, 'rows_left_out': 48}]

    # The same run, stopped on the way after it went back, ends with the same bits: the checkpoint knows of it.
    previews = []

    def stop(*_, **__):
        previews.append(None)
        if len(previews) == 2:
            signal.raise_signal(signal.SIGTERM)
        return ''

    poison(lambda first_row: first_row in (64, 80))
    config = tiny_config({'train.max_skipped_in_a_row': 2, 'train.steps': 8, 'preview.every_steps': 4})
    first = train(config, tmp_path / 'stopped', sample=stop)
    assert (first.step, first.signal) == (5, signal.SIGTERM)  # after the second preview of step 4
    assert load(tmp_path / 'stopped', step=5).meta['went_back']
    again = train(config, tmp_path / 'stopped')
    assert_same_bits(again.params, result.params)
    assert [row['loss'] for row in training_rows(tmp_path / 'stopped')] == [row['loss'] for row in rows]


def test_the_second_time_the_run_ends_with_the_first_bad_parameters_and_the_last_good_checkpoint(
    tiny_config, tmp_path, poison
):
    config = tiny_config({'train.max_skipped_in_a_row': 2, 'train.steps': 20, 'schedule.decay_steps': 20})
    poison(lambda first_row: first_row >= 64, stays=True)
    with pytest.raises(InputError) as error:
        train(config, tmp_path)
    message = str(error.value)
    assert '\n' not in message
    # Back from step 6 to step 3, whose data are now those from row 96 on, bad as well.
    assert 'loss nan or gradient norm nan at step 5 is not finite, and 2 step(s) in a row were skipped' in message
    assert 'the first to be not finite: the values of wte' in message
    assert 'the run had gone back already, from step 6 to step 3' in message
    assert 'the last good checkpoint, step 3, is kept; lower optimizer.learning_rate' in message
    assert load(tmp_path).step == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load(tmp_path).params))
    rows = training_rows(tmp_path)
    assert [row['step'] for row in rows] == [1, 2, 3, 4, 5]
    assert [row['loss'] is None for row in rows] == [False] * 3 + [True] * 2
    assert (tmp_path / 'loss.png').exists()


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite_sends_a_run_back_as_well(tiny_config, tmp_path, poison):
    poison(lambda first_row: first_row >= 64, stays=True)  # steps 5 and 6: no more than are allowed
    with pytest.raises(
        InputError, match=r'validation loss nan at step 6 is not finite; .*from step 6 to step 3'
    ) as error:
        train(tiny_config(), tmp_path)
    assert 'the last good checkpoint, step 3, is kept' in str(error.value)
    assert load(tmp_path).step == 3


@pytest.mark.slow
def test_nothing_is_saved_while_steps_are_skipped(tiny_config, tmp_path, poison):
    poison(lambda first_row: first_row == 48)  # that of step 4, after which a save is due
    config = tiny_config({'checkpoint.every_steps': 2, 'checkpoint.keep_latest': 9, 'eval.every_steps': 0})
    train(config, tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [2, 5, 6]


def test_the_best_is_one_that_is_saved_and_not_one_that_was_put_off(tiny_config, tmp_path, poison, monkeypatch):
    poison(lambda first_row: first_row == 48)  # that of step 4, which is evaluated as the best of all, and not saved
    losses = iter([5.0, 4.0, 4.5, 4.8])
    monkeypatch.setattr(
        trainer,
        'evaluate',
        lambda *_, **__: {'val_loss': next(losses), 'val_perplexity': 1.0, 'val_bits_per_byte': 1.0},
    )
    config = {'train.steps': 8, 'schedule.decay_steps': 8, 'eval.every_steps': 2, 'checkpoint.every_steps': 0}
    train(tiny_config(config), tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [6, 8]


def test_a_run_that_ends_for_spikes_names_what_makes_a_spike(tiny_config, tmp_path):
    keys = {'train.spike_loss_deviations': 0.01, 'train.spike_window_steps': 2, 'train.max_skipped_in_a_row': 1}
    with pytest.raises(InputError, match=r'is a spike.* gone back already.*; raise train\.spike_loss_deviations'):
        train(tiny_config(keys | {'train.steps': 40, 'schedule.decay_steps': 40}), tmp_path)


def test_a_run_that_diverges_at_once_begins_anew_and_then_says_what_to_change(tiny_config, tmp_path, capsys):
    config = tiny_config(
        {
            'optimizer.learning_rate': 1e30,
            'checkpoint.every_steps': 0,
            'eval.every_steps': 0,
            'train.max_skipped_in_a_row': 1,
        }
    )
    with pytest.raises(
        InputError, match=r'at step [23] is not finite.* no checkpoint .* lower optimizer.learning_rate'
    ):
        train(config, tmp_path)
    assert 'going back to the start, as there is no checkpoint yet' in capsys.readouterr().out


@pytest.mark.slow
def test_spikes_of_a_run_are_skipped_and_resumed_to_the_bit(tiny_config, tmp_path, assert_same_bits, capsys):
    # A window of two steps whose deviation anything exceeds.
    keys = {'train.spike_loss_deviations': 0.01, 'train.spike_window_steps': 2, 'optimizer.learning_rate': 0.02}
    config = tiny_config(keys | {'train.steps': 9, 'schedule.decay_steps': 9})
    whole = train(config, tmp_path / 'whole')
    counts = [row['skipped_steps'] for row in training_rows(tmp_path / 'whole')]
    assert counts[:2] == [0, 0]
    assert 0 < counts[-1] < 7
    assert 'the loss is more than 0.01 deviations above its mean' in capsys.readouterr().out
    train(tiny_config(keys | {'train.steps': 4, 'schedule.decay_steps': 9}), tmp_path / 'parts')
    parts = train(config, tmp_path / 'parts')
    assert [row['skipped_steps'] for row in training_rows(tmp_path / 'parts')] == counts
    assert_same_bits(parts.params, whole.params)
    # The guard may be taken off, widened and put on while the run goes on.
    for keys in ({}, {'train.spike_loss_deviations': 5.0, 'train.spike_window_steps': 3}):
        longer = {'optimizer.learning_rate': 0.02, 'train.steps': 10 + len(keys), 'schedule.decay_steps': 9}
        assert train(tiny_config(longer | keys), tmp_path / 'parts').step == 10 + len(keys)
