"""Schedule and optimizer against their closed forms in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax.config import OptimizerConfig
from gpt_jax.errors import InputError
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.training import resolve
from gpt_jax.training.optimizer import Lengths, decay_mask, lengths, make_optimizer, make_schedule

DECAYED = {
    'wte',
    'wpe',
    'lm_head',
    'blocks/attention/qkv/kernel',
    'blocks/attention/out/kernel',
    'blocks/mlp/up/kernel',
    'blocks/mlp/down/kernel',
}


@pytest.fixture
def run(tiny_config):
    """A function: changed keys -> the resolved run."""
    return lambda changes=(): resolve(tiny_config(changes))


def params_of(tied):
    model = GPT(GPTConfig(50, 16, n_layer=2, n_head=2, d_model=32, tie_embeddings=tied))
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']


@pytest.mark.parametrize('tied', [True, False])
def test_matrices_and_embeddings_decay_and_gains_and_biases_do_not(tied):
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params_of(tied)))
    decayed = {jax.tree_util.keystr(path, simple=True, separator='/') for path, decays in mask if decays}
    assert decayed == DECAYED - ({'lm_head'} if tied else set())
    assert len(mask) == (16 if tied else 17)


@pytest.mark.parametrize('name', ['wte2', 'gate', 'kernel'])
def test_a_parameter_that_no_list_names_raises(name):
    params = params_of(True) | {name: jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    with pytest.raises(ValueError, match=f'parameter {name!r} must be named'):
        decay_mask(params)


@pytest.mark.parametrize(('warmup', 'decay'), [(0, 10), (1, 10), (2, 10), (5, 20), (9, 10), (0, 1)])
@pytest.mark.parametrize('final_fraction', [0.0, 0.1, 1.0])
def test_the_schedule_is_a_line_then_a_cosine_then_a_floor(run, warmup, decay, final_fraction):
    config = run({'optimizer.learning_rate': 3e-4, 'schedule.final_fraction': final_fraction})
    schedule = make_schedule(config, Lengths(total=30, warmup=warmup, decay=decay))
    for step in range(30):
        if step < warmup:
            expected = 3e-4 * (step + 1) / warmup
        else:
            progress = min(1.0, (step - warmup) / (decay - warmup))
            expected = 3e-4 * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-10), step


def test_the_schedule_starts_above_zero_and_reaches_its_peak_at_the_end_of_the_warmup(run):
    schedule = make_schedule(run({'optimizer.learning_rate': 1.0}), Lengths(20, 4, 20))
    rates = [float(schedule(step)) for step in range(20)]
    assert rates[0] == 0.25
    assert rates[3] == rates[4] == max(rates) == 1.0


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({}, Lengths(6, 2, 6)),
        # A step is 16 x 32 = 512 tokens, an epoch 100 / 16 steps; a part of a step is a step.
        ({'train.steps': None, 'train.tokens': 5120}, Lengths(10, 2, 10)),
        ({'train.steps': None, 'train.tokens': 5121}, Lengths(11, 2, 11)),
        ({'train.steps': None, 'train.epochs': 2.0}, Lengths(13, 2, 13)),
        ({'schedule.warmup_steps': None, 'schedule.warmup_tokens': 1500}, Lengths(6, 3, 6)),
        ({'schedule.warmup_steps': None, 'schedule.warmup_epochs': 0.5}, Lengths(6, 4, 6)),
        ({'schedule.decay_steps': 4}, Lengths(6, 2, 4)),
        ({'schedule.decay_tokens': 51200}, Lengths(6, 2, 100)),
        ({'schedule.decay_epochs': 1.0}, Lengths(6, 2, 7)),
        ({'schedule.warmup_steps': 0}, Lengths(6, 0, 6)),
        ({'schedule.warmup_steps': 0, 'train.steps': 1}, Lengths(1, 0, 1)),
    ],
)
def test_lengths_in_steps_tokens_and_epochs_become_steps(run, changes, expected):
    assert lengths(run(changes), windows_per_epoch=100) == expected


@pytest.mark.parametrize('warmup', [6, 7])
def test_a_warmup_as_long_as_the_decay_is_refused(run, warmup):
    with pytest.raises(InputError, match=f'a warmup of {warmup} steps leaves no step of the 6 of the decay'):
        lengths(run({'schedule.warmup_steps': warmup}), windows_per_epoch=100)


def numpy_adamw(params, gradients, c, rates, decayed):
    """Loshchilov & Hutter 2019, algorithm 2, in float64, on gradients clipped by their global norm."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first, second = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    for index, gradient in enumerate(gradients):
        norm = math.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in gradient.values()))
        scale = min(1.0, c.clip_norm / norm) if c.clip_norm else 1.0
        for name, value in gradient.items():
            g = value.astype(np.float64) * scale
            first[name] = c.beta1 * first[name] + (1 - c.beta1) * g
            second[name] = c.beta2 * second[name] + (1 - c.beta2) * g * g
            m = first[name] / (1 - c.beta1 ** (index + 1))
            v = second[name] / (1 - c.beta2 ** (index + 1))
            update = m / (np.sqrt(v) + c.epsilon)
            if name in decayed:
                update = update + c.weight_decay * params[name]
            params[name] = params[name] - rates[index] * update
    return params


# The gradients' norms lie on both sides of 6, so that some steps are clipped and some are not.
@pytest.mark.parametrize('clip_norm', [6.0, 0.0], ids=['clipped', 'not clipped'])
@pytest.mark.parametrize('epsilon', [1e-8, 1.0])
def test_five_steps_are_those_of_adamw_behind_a_clip(clip_norm, epsilon):
    config = OptimizerConfig(0.1, 0.8, 0.9, epsilon, 0.3, clip_norm)
    schedule = optax.linear_schedule(0.1, 0.02, 4)
    rng = np.random.default_rng(0)
    shapes = {'wte': (6, 4), 'ln_f/scale': (4,), 'ln_f/bias': (4,)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [
        {name: size * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for size in (0.5, 3.0, 1.0, 5.0, 0.2)
    ]
    norms = [math.sqrt(sum((value**2).sum() for value in gradient.values())) for gradient in gradients]
    assert min(norms) < 6 < max(norms)

    def tree(flat):
        return {'wte': flat['wte'], 'ln_f': {'scale': flat['ln_f/scale'], 'bias': flat['ln_f/bias']}}

    optimizer = make_optimizer(config, schedule)
    current = jax.tree.map(jnp.asarray, tree(params))
    state = optimizer.init(current)
    for gradient in gradients:
        updates, state = optimizer.update(tree(gradient), state, current)
        current = optax.apply_updates(current, updates)
    rates = [0.1, 0.08, 0.06, 0.04, 0.02]
    expected = tree(numpy_adamw(params, gradients, config, rates, {'wte'}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), current, expected)


def test_the_reference_itself_tells_the_orders_apart():
    """Decay or clip in another place would give other numbers: what the test above compares is not blind to it."""
    config = OptimizerConfig(0.1, 0.8, 0.9, 1e-8, 0.3, 1.0)
    params, gradients = {'wte': np.ones(3)}, [{'wte': np.array([3.0, 0.1, -1.0])}]
    base = numpy_adamw(params, gradients, config, [0.1], {'wte'})['wte']
    coupled = [{'wte': gradients[0]['wte'] + 0.3 * params['wte']}]
    assert not np.allclose(base, numpy_adamw(params, coupled, config, [0.1], set())['wte'])
    # A first step of Adam does not know its gradient's size; a second one does.
    twice = [gradients[0], {'wte': np.array([0.1, 0.1, 0.1])}]
    unclipped = dataclasses.replace(config, clip_norm=0.0)
    clipped = numpy_adamw(params, twice, config, [0.1] * 2, set())['wte']
    assert not np.allclose(clipped, numpy_adamw(params, twice, unclipped, [0.1] * 2, set())['wte'])


@pytest.mark.parametrize(('warmup', 'decay'), [(0, 4 * 10**10), (2, 4 * 10**10), (3 * 10**10, 4 * 10**10)])
def test_lengths_beyond_int32_follow_the_same_formula(run, warmup, decay):
    """GPT-3's schedule of 260 billion tokens, in batches of a few: no run comes to its end."""
    experiment = run({'optimizer.learning_rate': 1.0, 'schedule.final_fraction': 0.1})
    schedule = make_schedule(experiment, Lengths(10, warmup, decay))
    for step in (0, 1, 5, 2**30, 2**31 - 2):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup))) / 2
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_run_that_no_counter_holds_is_refused(run):
    unset = {'train.steps': None, 'train.tokens': 9 * 10**18}
    with pytest.raises(InputError, match=r'train\.tokens=9000000000000000000 .* at most 2,147,483,646 can be counted'):
        lengths(run(unset), 100)
