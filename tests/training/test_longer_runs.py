"""A finished run that is made longer: what its schedule may become, and what is said where it would learn nothing."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gpt_jax.checkpoints import load
from gpt_jax.errors import InputError
from gpt_jax.training import resolve, train
from gpt_jax.training.optimizer import Lengths, check_rates, lengths, make_schedule, resumed_lengths

PEAK = 1e-2


@pytest.fixture(scope='module')
def run(tiny_config):
    """A function: steps, warmup, decay, floor -> the resolved experiment."""

    def make(steps, warmup, decay, floor):
        schedule = {'warmup_steps': warmup, 'decay_steps': decay, 'final_fraction': floor}
        return resolve(tiny_config({'train.steps': steps} | {f'schedule.{name}': schedule[name] for name in schedule}))

    return make


def closed_form(warmup, decay, floor, steps):
    """The rates of steps 0..steps-1, in float64."""
    step = np.arange(steps)
    cosine = (1 + np.cos(np.pi * np.clip((step - warmup) / (decay - warmup), 0, 1))) / 2
    return PEAK * np.where(step < warmup, (step + 1) / max(warmup, 1), floor + (1 - floor) * cosine)


floors = st.sampled_from([0.0, 0.1, 1.0])
decays = st.one_of(st.none(), st.integers(7, 30))


@settings(max_examples=100, deadline=None)
@given(
    step=st.sampled_from([1, 6, 8, 20, 40]),  # few, since jax compiles anew for each length
    before=st.tuples(st.integers(0, 6), decays, floors),
    now=st.tuples(st.integers(0, 6), decays, floors),
)
def test_only_rates_that_lie_ahead_can_be_changed(run, step, before, now):
    total = 60
    run_before, run_now = run(30, *before), run(total, *now)
    lengths_before, lengths_now = lengths(run_before, 1), lengths(run_now, 1)
    warmup, decay = lengths_before.warmup, lengths_before.decay
    # A decay that no key gives stays where it was.
    intended = (now[0], now[1] or decay, now[2])
    taken = closed_form(warmup, decay, before[2], step)
    same = np.allclose(closed_form(*intended, step), taken, rtol=1e-6, atol=0)
    ended = step >= decay and now[0] == warmup
    if before == now:
        intended, same = (warmup, decay, before[2]), True
    try:
        found, is_new = resumed_lengths(run_now, lengths_now, run_before, lengths_before, step)
    except InputError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert not same
        assert not ended
        assert '\n' not in refusal
        for name, old, new in zip(('warmup_steps', 'decay_steps', 'final_fraction'), before, now, strict=True):
            assert (f'schedule.{name}: {old} -> {new}' in refusal) == (old != new)
        return
    assert same or ended
    assert is_new == (not same)
    assert (found.total, found.warmup, found.decay) == (total, *intended[:2])
    ahead = np.asarray(make_schedule(run_now, found)(np.arange(total)))[step:]
    np.testing.assert_allclose(ahead, closed_form(*intended, total)[step:], rtol=1e-4, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(step=st.integers(0, 40), decay=st.integers(7, 60), floor=floors, total=st.integers(1, 60))
def test_steps_of_rate_0_are_said_with_the_way_out_and_refused_where_there_are_no_others(
    run, step, decay, floor, total
):
    assume(step < total)
    rates = closed_form(2, decay, floor, total)[step:]
    call = (run(total, 2, decay, floor), Lengths(total, 2, decay), step)
    if not (rates == 0).any():
        assert check_rates(*call) is None
    elif (rates == 0).all():
        with pytest.raises(InputError, match=f'add --config.schedule.decay_steps={total} to go on'):
            check_rates(*call)
    else:
        first = step + int(np.argmax(rates == 0)) + 1
        assert check_rates(*call).startswith(f'notice: steps {first} to {total} will learn nothing')
        assert f'--config.schedule.decay_steps={total}' in check_rates(*call)


@pytest.mark.slow
def test_a_finished_run_is_not_made_longer_for_nothing_and_goes_on_with_a_longer_decay(tiny_config, tmp_path, capsys):
    def go(**changes):
        base = {'train.steps': 3, 'schedule.final_fraction': 0.0, 'schedule.warmup_steps': 1}
        return train(tiny_config(base | {name.replace('__', '.'): value for name, value in changes.items()}), tmp_path)

    go()
    with pytest.raises(InputError, match=r'steps 4 to 6 would learn nothing.*--config.schedule.decay_steps=6') as error:
        go(train__steps=6)
    assert '\n' not in str(error.value)
    assert load(tmp_path).step == 3
    with pytest.raises(InputError, match=r'schedule\.warmup_steps: 1 -> 2: step 1 of the 3 that were taken'):
        go(train__steps=6, schedule__warmup_steps=2)
    capsys.readouterr()
    result = go(train__steps=6, schedule__decay_steps=6)
    assert 'schedule: another one from step 4 on' in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    rates = [row['learning_rate'] for row in rows if 'loss' in row]
    expected = [*closed_form(1, 3, 0.0, 3), *closed_form(1, 6, 0.0, 6)[3:]]
    assert rates == pytest.approx(expected, rel=1e-5)
    meta = load(tmp_path, step=result.step).meta
    assert meta['config']['schedule']['decay_steps'] == 6
    shape = {'final_fraction': 0.0, 'shape': 'cosine', 'cooldown_fraction': 0.2}
    assert meta['earlier_schedules'] == [{'until': 3, 'warmup': 1, 'decay': 3} | shape]
    assert go(train__steps=6, schedule__decay_steps=6).params is None  # finished, by what the checkpoint records
