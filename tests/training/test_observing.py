"""One run that is observed in every way: compiled once, traced, its norms told, saved by the clock, shown elsewhere."""

import inspect
import json
import sys
import types

import jax
import numpy as np
import pytest

from gpt_jax.checkpoints import load
from gpt_jax.errors import InputError
from gpt_jax.training import train
from gpt_jax.training.tracing import parse_steps
from gpt_jax.training.trackers import parse_trackers

STEPS = 6


class Service:
    """What a tracker's library is, as far as it is used."""

    def __init__(self):
        self.started, self.rows, self.finished = [], [], 0

    def init(self, *arguments, **settings):
        self.started.append((arguments, settings))
        return self

    def log(self, numbers, step):
        self.rows.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture(scope='module')
def observed(tiny_config, tmp_path_factory):
    """The workdir, what was compiled, and the service that was told."""
    events, service = [], Service()

    def heard(name, seconds, **what):
        if name.endswith('backend_compile_duration'):
            events.append(str(what.get('fun_name')))

    jax.monitoring.register_event_duration_secs_listener(heard)
    changes = {
        'train.steps': STEPS,
        'train.log_every_steps': 2,
        'train.norms_every_steps': 3,
        'train.trackers': 'tensorboard,trackio',
        'eval.every_steps': STEPS,
        'preview.every_steps': STEPS,
        'checkpoint.every_steps': 0,
        'checkpoint.every_minutes': 1e-9,
        'checkpoint.keep_best': 0,
        'checkpoint.keep_every_steps': 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType('trackio')
        module.__spec__ = types.SimpleNamespace(name='trackio')
        module.init = service.init
        patch.setitem(sys.modules, 'trackio', module)
        result = train(tiny_config(changes), tmp_path_factory.mktemp('observed') / 'run', profile=(2, 3))
    events = events[:]
    return result.workdir, events, service


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_the_step_is_compiled_once(observed):
    assert [name for name in observed[1] if 'train_step' in name] == ['jit(train_step)']
    compiled = [row['compile_seconds'] for row in rows(observed[0]) if 'compile_seconds' in row]
    assert compiled[0] > 0
    assert not any(compiled[1:])


def test_the_trace_is_what_profilers_open(observed):
    found = list((observed[0] / 'profile').glob('plugins/profile/*/*.xplane.pb'))
    assert len(found) == 1
    assert b'train_step' in found[0].read_bytes()


def test_norms_are_those_of_the_parameters_that_were_saved(observed):
    workdir = observed[0]
    found = {row['step']: row for row in rows(workdir) if 'norms/parameter/wte' in row}
    assert sorted(found) == [3, 6]
    params = load(workdir, 6).params
    before = {'wte': np.asarray(load(workdir, 4).params['wte'])}
    assert found[6]['norms/parameter/wte'] == pytest.approx(np.linalg.norm(np.asarray(params['wte'])), rel=1e-5)
    kernel = np.asarray(params['blocks']['mlp']['up']['kernel'])
    assert found[6]['norms/parameter/blocks/mlp/up/kernel'] == pytest.approx(np.linalg.norm(kernel), rel=1e-5)
    gradients = [value for name, value in found[6].items() if name.startswith('norms/gradient/')]
    whole = next(row['grad_norm'] for row in rows(workdir) if row['step'] == 6 and 'grad_norm' in row)
    assert np.linalg.norm(gradients) == pytest.approx(whole, rel=1e-5)
    assert 0 < found[6]['norms/update/wte'] < np.linalg.norm(before['wte'])


def test_checkpoints_are_saved_by_the_clock_and_those_of_every_second_step_stay(observed):
    steps = sorted(int(path.name) for path in (observed[0] / 'checkpoints').iterdir())
    assert steps == [2, 4, 6]


def test_a_tracker_is_told_every_row_and_the_end(observed):
    workdir, _, service = observed
    ((_, settings),) = service.started
    assert settings['config']['train']['steps'] == STEPS
    assert settings['name'] == json.loads((workdir / 'tracker.json').read_text())['id']
    told = [(step, numbers.get('train/loss')) for step, numbers in service.rows if 'train/loss' in numbers]
    assert told == [(row['step'], row['loss']) for row in rows(workdir) if 'loss' in row]
    assert any('validation/val_loss' in numbers for _, numbers in service.rows)
    assert any('norms/update/wte' in numbers for _, numbers in service.rows)
    assert service.finished == 1


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_the_libraries_take_what_they_are_given(name):
    """Where they are installed: by their signatures, since they talk to servers."""
    library = pytest.importorskip(name)
    given = {'wandb': ('id', 'name', 'dir', 'config', 'resume'), 'trackio': ('name', 'config', 'resume', 'embed')}[name]
    assert set(given) <= set(inspect.signature(library.init).parameters)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('tensorbord', "'tensorbord' is not one of tensorboard, wandb, trackio"),
        ('tensorboard,tensorboard', 'each given once'),
        ('', "'' is not one of"),
    ],
)
def test_trackers_that_cannot_be_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_trackers(text)


def test_a_tracker_that_is_not_installed_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(InputError, match=r'train.trackers=wandb: wandb is not installed: pip install wandb'):
        parse_trackers('wandb')
    assert parse_trackers('none') == []


def test_steps_to_trace_are_two_numbers_in_order():
    assert parse_steps('10:15') == (10, 15)
    for text in ('10', '0:3', '5:4', 'a:b', '1:2:3', ''):
        with pytest.raises(InputError, match=r'must be START:STOP'):
            parse_steps(text)


def test_steps_beyond_the_run_are_refused(tiny_config, tmp_path):
    with pytest.raises(InputError, match=r'--profile=100:101: the run has 6 steps'):
        train(tiny_config(), tmp_path / 'run', profile=(100, 101))


def test_steps_that_are_taken_already_are_not_traced_and_that_is_said(tiny_config, tmp_path, capsys):
    train(tiny_config({'train.steps': 3, 'schedule.decay_steps': 6}), tmp_path)
    train(tiny_config(), tmp_path, profile=(1, 3))
    assert '--profile=1:3: these steps are taken; nothing is traced' in capsys.readouterr().out
    assert not (tmp_path / 'profile').exists()
