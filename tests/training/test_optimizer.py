"""Schedule and optimizer against their closed forms in NumPy."""

import dataclasses
import itertools
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
from gpt_jax.training.optimizer import (
    Lengths,
    batch_sizes,
    decay_mask,
    factors,
    lengths,
    make_optimizer,
    make_schedule,
    parse_multipliers,
    rounded_by_chance,
)

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


def numpy_rates(shape, steps, warmup, decay, floor, cooldown):
    """Each shape's closed form for a peak of 1, in float64, at every step counted from 0."""
    rates = []
    for step in range(steps):
        if step < warmup:
            rates.append((step + 1) / warmup)
            continue
        down = min(1.0, (step - warmup) / (decay - warmup))
        start = max(warmup, decay - cooldown * decay)
        rates.append(
            {
                'cosine': floor + (1 - floor) * (1 + math.cos(math.pi * down)) / 2,
                'linear': 1 + (floor - 1) * down,
                'wsd': 1.0 if step < start else 1 + (floor - 1) * min(1.0, (step - start) / (decay - start)),
                'constant': 1.0,
                'inverse_sqrt': max(floor, math.sqrt(max(warmup, 1) / (step + 1))),
            }[shape]
        )
    return rates


@pytest.mark.parametrize('shape', ['linear', 'wsd', 'constant', 'inverse_sqrt'])
@pytest.mark.parametrize(('warmup', 'decay', 'floor'), [(0, 20, 0.0), (4, 20, 0.1), (19, 20, 0.5), (1, 40, 0.0)])
def test_each_shape_is_its_closed_form(run, shape, warmup, decay, floor):
    keys = {'schedule.shape': shape, 'schedule.final_fraction': floor, 'schedule.cooldown_fraction': 0.3}
    schedule = make_schedule(run({'optimizer.learning_rate': 1.0} | keys), Lengths(30, warmup, decay))
    rates = np.asarray(schedule(np.arange(30)))
    np.testing.assert_allclose(rates, numpy_rates(shape, 30, warmup, decay, floor, 0.3), rtol=1e-5, atol=1e-7)


def test_a_stable_phase_may_be_made_longer_and_a_constant_rate_be_led_down(run):
    """Nothing that was taken had another rate: what `resumed_lengths` asks for, to the bit."""
    keys = {'schedule.cooldown_fraction': 0.25, 'schedule.final_fraction': 0.0}
    short, long = (Lengths(total, 2, total) for total in (40, 80))
    wsd = make_schedule(run({'schedule.shape': 'wsd'} | keys), short)(np.arange(31))
    longer = make_schedule(run({'schedule.shape': 'wsd'} | keys), long)(np.arange(31))
    constant = make_schedule(run({'schedule.shape': 'constant'} | keys), short)(np.arange(31))
    assert np.array_equal(wsd, longer)
    assert np.array_equal(wsd, constant)


RAMP = {'train.batch_size': 64, 'schedule.initial_batch_size': 8, 'schedule.batch_ramp_tokens': 40_000}


def brute_force_ramp(first, full, block_size, ramp_tokens, count, steps):
    """The rows of each step, by walking: the largest of evenly spaced sizes that the line has reached."""
    sizes = {first * round(1 + (full // first - 1) * k / (count - 1)) for k in range(count)}
    rows, found = 0, []
    for _ in range(steps):
        line = first + (full - first) * min(1.0, rows * block_size / ramp_tokens)
        found.append(max(size for size in sizes if size <= line + 1e-9))
        rows += found[-1]
    return found


@pytest.mark.parametrize(
    ('first', 'full', 'block_size', 'tokens', 'count'),
    [(8, 64, 32, 40_000, 8), (16, 256, 2048, 4 * 10**9, 8), (16, 1600, 2048, 12 * 10**9, 8), (8, 16, 32, 100, 2)],
)
def test_a_ramp_grows_in_at_most_eight_sizes_along_the_line(run, first, full, block_size, tokens, count):
    keys = {'batch_size': full}
    config = dataclasses.replace(run(RAMP), train=dataclasses.replace(run(RAMP).train, **keys))
    schedule = {'initial_batch_size': first, 'batch_ramp_tokens': tokens}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, block_size=block_size),
        schedule=dataclasses.replace(config.schedule, **schedule),
    )
    sizes = batch_sizes(config)
    assert len(sizes.stages) == count
    assert all(size % first == 0 for _, _, size in sizes.stages)
    steps = min(sizes.stages[-1][0] + 5, 50_000)
    expected = brute_force_ramp(first, full, block_size, tokens, count, steps)
    assert [sizes.at(step) for step in range(steps)] == expected
    rows = np.concatenate([[0], np.cumsum(expected)])
    assert [sizes.rows_before(step) for step in range(steps + 1)] == rows.tolist()
    if sizes.stages[-1][0] < steps:
        # Full once the tokens are there, and not before.
        assert rows[sizes.stages[-1][0]] * block_size >= tokens > rows[sizes.stages[-1][0] - 1] * block_size


def test_the_first_batch_of_a_ramp_has_some_32_thousand_tokens_where_no_key_says_so(run):
    gpt3 = {'model.version': 'gpt3', 'model.block_size': 2048, 'train.batch_size': 1600}
    assert batch_sizes(run(gpt3 | {'schedule.batch_ramp_tokens': 12 * 10**9})).stages[0] == (0, 0, 16)
    assert batch_sizes(run(gpt3)).stages == ((0, 0, 1600),)
    assert batch_sizes(run({'schedule.batch_ramp_tokens': 10})).stages[-1][2] == 16
    with pytest.raises(InputError, match=r'train\.batch_size=64 is no multiple of schedule\.initial_batch_size=24'):
        batch_sizes(run(RAMP | {'schedule.initial_batch_size': 24}))


@pytest.mark.parametrize('shape', ['cosine', 'linear', 'wsd', 'inverse_sqrt'])
def test_with_a_ramp_lengths_and_rates_follow_the_tokens(run, shape):
    keys = {'optimizer.learning_rate': 1.0, 'schedule.shape': shape, 'schedule.final_fraction': 0.1}
    keys |= {'schedule.warmup_steps': None, 'schedule.warmup_tokens': 10_000, 'schedule.decay_tokens': 150_000}
    config = run(RAMP | keys | {'train.steps': None, 'train.tokens': 200_000})
    sizes, found = batch_sizes(config), lengths(config, 100)
    tokens = [32 * sizes.rows_before(step) for step in range(found.total + 1)]
    for reached, wanted in ((found.total, 200_000), (found.warmup, 10_000), (found.decay, 150_000)):
        assert tokens[reached] >= wanted > tokens[reached - 1]
    rates = np.asarray(make_schedule(config, found)(np.arange(found.total)))
    warmup, decay, full = tokens[found.warmup], tokens[found.decay], 64 * 32
    start = max(warmup, decay * 0.8)
    for step, (now, after) in enumerate(itertools.pairwise(tokens)):
        down = min(1.0, max(0.0, (now - warmup) / (decay - warmup)))
        expected = {
            'cosine': 0.1 + 0.9 * (1 + math.cos(math.pi * down)) / 2,
            'linear': 1 - 0.9 * down,
            'wsd': 1 - 0.9 * min(1.0, max(0.0, (now - start) / (decay - start))),
            'inverse_sqrt': max(0.1, math.sqrt(max(warmup, full) / max(after, warmup, full))),
        }[shape]
        expected = after / warmup if now < warmup else expected
        assert rates[step] == pytest.approx(expected, rel=1e-4), step


@pytest.mark.parametrize('text', [None, '', ' ; '])
def test_no_multipliers_are_no_rules(text):
    assert parse_multipliers(text) == ()


def test_the_last_rule_that_gives_a_factor_wins():
    text = '.*:lr=0 ; blocks/mlp/.*: lr=2.0, decay=0.5; blocks/mlp/up/kernel:decay=0;ln_f/scale:lr=1'
    rules, up, down = parse_multipliers(text), 'blocks/mlp/up/kernel', 'blocks/mlp/down/kernel'
    names = {'wte': 0.0, up: 2.0, down: 2.0, 'ln_f/scale': 1.0, 'ln_f/bias': 0.0}
    rates, decays = (
        {jax.tree_util.keystr(path, simple=True, separator='/'): value for path, value in found}
        for found in (
            jax.tree_util.tree_leaves_with_path(factors(rules, params_of(True), which)) for which in ('lr', 'decay')
        )
    )
    assert {name: rates[name] for name in names} == names
    assert (decays[up], decays[down], decays['wte']) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('wte', "'wte' has no PATTERN:"),
        (':lr=1', 'has no PATTERN:'),
        ('wte:', 'is no lr=FACTOR or decay=FACTOR'),
        ('wte:rate=1', 'is no lr=FACTOR or decay=FACTOR'),
        ('wte:lr=1,lr=2', 'each given once'),
        ('wte:lr=fast', "'lr=fast' is no lr=FACTOR"),
        ('wte:lr=-1', 'must be a factor of 0 or more'),
        ('wte:lr=nan', 'must be a factor of 0 or more'),
        ('wte:lr=inf', 'must be a factor of 0 or more'),
        ('w(te:lr=1', "'w(te' is no regular expression"),
    ],
)
def test_multipliers_that_say_nothing_are_refused(text, message):
    with pytest.raises(InputError) as error:
        parse_multipliers(text)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_a_rule_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match=r"'mlp' matches no parameter; there are blocks/attention/out/bias, .*, wte"):
        factors(parse_multipliers('mlp:lr=1'), params_of(True), 'lr')


def test_multipliers_scale_rate_and_decay_of_the_chain():
    config = OptimizerConfig(0.1, 0.8, 0.9, 1e-8, 0.3, 0.0, 'wte:lr=0.5,decay=3;ln_f/bias:lr=0')
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {'wte': (6, 4), 'b': (4,)}.items()}
    params['b'][0] = -0.0
    gradients = [{name: rng.standard_normal(value.shape).astype(np.float32) for name, value in params.items()}] * 3
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))

    def tree(flat):
        return {'wte': flat['wte'], 'ln_f': {'bias': flat['b']}}

    current = jax.tree.map(jnp.asarray, tree(params))
    state = optimizer.init(current)
    for gradient in gradients:
        updates, state = optimizer.update(tree(gradient), state, current)
        current = optax.apply_updates(current, updates)
    # Half the rate of three times the decay.
    scaled = dataclasses.replace(config, weight_decay=0.9)
    expected = numpy_adamw(params, gradients, scaled, [0.05] * 3, {'wte'})
    np.testing.assert_allclose(current['wte'], expected['wte'], atol=2e-6)
    assert np.asarray(current['ln_f']['bias']).tobytes() == params['b'].tobytes()


def test_rounding_by_chance_has_no_bias_and_keeps_what_needs_none():
    value = np.float32(1 + 2**-7 * 0.3)  # three tenths of the way from 1 to the next number
    many = np.asarray(rounded_by_chance({'a': jnp.full(100_000, value)}, jax.random.key(0))['a'], np.float32)
    assert set(np.unique(many)) == {np.float32(1), np.float32(1 + 2**-7)}
    assert many.mean() == pytest.approx(value, abs=4 * 2**-7 * math.sqrt(0.21 / 100_000))
    exact = jnp.asarray([0.0, -0.0, 1.5, -3.0, 1e-38, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16).astype(jnp.float32)
    same = rounded_by_chance([exact], jax.random.key(1))[0]
    assert same.dtype == jnp.bfloat16
    assert np.asarray(same, np.float32).tobytes() == np.asarray(exact).tobytes()
    negative = np.asarray(rounded_by_chance([jnp.full(10_000, -value)], jax.random.key(0))[0], np.float32)
    assert negative.mean() == pytest.approx(-value, abs=4 * 2**-7 * math.sqrt(0.21 / 10_000))


def test_moments_of_16_bits_follow_those_of_32():
    """Where plain rounding stands still: a second moment that changes by a thousandth of itself a step."""
    config = OptimizerConfig(0.1, 0.9, 0.999, 1e-8, 0.0, 0.0)
    params = {'wte': jnp.zeros((64, 64))}
    chains = [make_optimizer(config, optax.constant_schedule(0.1), moments) for moments in ('f32', 'bf16')]
    states = [chain.init(params) for chain in chains]
    assert {leaf.dtype for leaf in jax.tree.leaves((states[1][1].mu, states[1][1].nu))} == {jnp.dtype('bfloat16')}
    update = [jax.jit(chain.update) for chain in chains]
    for step in range(300):
        gradient = {'wte': jnp.full((64, 64), 1.0 if step < 100 else 2.0)}
        for index in range(2):
            _, states[index] = update[index](gradient, states[index], params)
    for name in ('mu', 'nu'):
        wide, narrow = (getattr(state[1], name)['wte'].astype(jnp.float32).mean().item() for state in states)
        assert narrow == pytest.approx(wide, rel=0.01)
