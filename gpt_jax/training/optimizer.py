"""AdamW as one visible chain, the schedule it follows, and what of both differs by parameter."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_jax.config import LENGTHS, MOST_STEPS, OptimizerConfig, RunConfig
from gpt_jax.data import BatchSizes
from gpt_jax.errors import InputError
from gpt_jax.parallel.sharding import path_name

# Matrices and embeddings decay, gains and biases do not (GPT-1, section 4.1: "on all non bias or gain weights"). By
# name, since stacked over the layers a bias has two dimensions; each parameter must match exactly one of the two.
DECAYED = (r'wte|wpe|lm_head', r'blocks/(attention/(qkv|out)|mlp/(up|down))/kernel')
NOT_DECAYED = (r'ln_f/(scale|bias)', r'blocks/ln_[12]/(scale|bias)', r'blocks/(attention/(qkv|out)|mlp/(up|down))/bias')

# What GPT-3's batches began with (appendix B), over which they then grew.
FIRST_BATCH_TOKENS = 32_000


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long things last, in optimizer steps."""

    total: int
    warmup: int
    decay: int


def batch_sizes(run: RunConfig) -> BatchSizes:
    """The rows of each step's batch: `train.batch_size`, or up to it along the ramp of the schedule.

    Raises:
      InputError: the first size does not divide the last.
    """
    schedule, full = run.schedule, run.train.batch_size
    if schedule.batch_ramp_tokens is None:
        return BatchSizes.constant(full)
    first = schedule.initial_batch_size
    if first is None:
        first = max(1, min(full, round(FIRST_BATCH_TOKENS / run.model.block_size)))
        # The nearest below that divides the full batch, so that the same key serves every context.
        first = next(size for size in range(first, 0, -1) if full % size == 0)
    return BatchSizes.ramp(first, full, run.model.block_size, schedule.batch_ramp_tokens)


def lengths(run: RunConfig, windows_per_epoch: int) -> Lengths:
    """Resolves steps, tokens and epochs; the shape's end defaults to the run's.

    Args:
      run: the experiment.
      windows_per_epoch: training sequences of block_size tokens in the corpus.

    Raises:
      InputError: the warmup is not shorter than the decay, or the run longer than int32 can count.
    """
    sizes = batch_sizes(run)

    def steps(section: Any, prefix: str = '') -> int | None:
        if (count := getattr(section, f'{prefix}steps')) is not None:
            return count
        if (tokens := getattr(section, f'{prefix}tokens')) is not None:
            return sizes.steps(tokens, of_row=run.model.block_size)
        if (epochs := getattr(section, f'{prefix}epochs')) is not None:
            return sizes.steps(epochs * windows_per_epoch)
        return None

    total = steps(run.train)
    if total > MOST_STEPS:
        raise InputError(
            f'train.tokens={run.train.tokens} or train.epochs={run.train.epochs} makes {total:,} steps of '
            f'{run.train.batch_size * run.model.block_size:,} tokens; at most {MOST_STEPS:,} can be counted'
        )
    warmup = steps(run.schedule, 'warmup_') or 0
    decay = steps(run.schedule, 'decay_') or total
    if warmup >= decay > 1 or (decay == 1 and warmup > 1):
        raise InputError(
            f'schedule: a warmup of {warmup} steps leaves no step of the {decay} of the decay; '
            'shorten it (schedule.warmup_steps) or lengthen the run'
        )
    return Lengths(total, min(warmup, decay - 1), decay)


def resumed_lengths(
    run: RunConfig, new: Lengths, run_before: RunConfig, before: Lengths, step: int
) -> tuple[Lengths, bool]:
    """The lengths of a run that goes on after `step` steps, and whether its schedule is another one from there on.

    A decay that no key gives stays where it was, whatever the run's length is now. What a key of the schedule changes
    must lie ahead: no step that was taken would have had another rate, or the decay has ended, after which there is no
    more to the schedule that was. Then the rates from `step` on are those of the new keys, counted from step 0.

    Args:
      run, new: the experiment as it is now, and its `lengths`.
      run_before, before: as the checkpoint records them.
      step: steps taken.

    Raises:
      InputError: keys of the schedule differ, and with them rates or batches of steps that were taken.
    """
    sizes, sizes_before = batch_sizes(run), batch_sizes(run_before)
    if sizes != sizes_before:
        names = ('batch_ramp_tokens', 'initial_batch_size')
        changes = [f'schedule.{name}={getattr(run_before.schedule, name)}' for name in names]
        raise InputError(
            f'the batches of this run grow otherwise than they did: it began with {" and ".join(changes)}; give these '
            'keys their old values, or choose another --workdir'
        )
    keys, keys_before = (dataclasses.asdict(config.schedule) for config in (run, run_before))
    kept = dataclasses.replace(before, total=new.total)
    if keys == keys_before:
        return kept, False
    gives_decay = any(keys[name] is not None for name in LENGTHS['schedule', 'decay'])
    new = new if gives_decay else dataclasses.replace(new, decay=before.decay)
    steps = np.arange(step)
    rates, rates_before = (
        np.broadcast_to(make_schedule(*parts)(steps), steps.shape) for parts in ((run, new), (run_before, before))
    )
    if np.array_equal(rates, rates_before):
        return new, False
    if step >= before.decay and new.warmup == before.warmup:
        return new, True
    changes = [
        f'schedule.{name}: {keys_before[name]} -> {keys[name]}' for name in keys if keys[name] != keys_before[name]
    ]
    taken = int(np.argmax(rates != rates_before)) + 1
    raise InputError(
        f'{"; ".join(changes)}: step {taken} of the {step} that were taken would have had another learning rate; give '
        f'these keys their old values until the decay has ended, at step {before.decay}, or choose another --workdir'
    )


def check_rates(run: RunConfig, lengths: Lengths, step: int) -> str | None:
    """What to say of steps after `step` whose learning rate is 0, which change nothing; None where there are none.

    Raises:
      InputError: they are all that is left.
    """
    first = max(step, lengths.decay)
    endless = run.schedule.shape in ('constant', 'inverse_sqrt')
    if first >= lengths.total or run.schedule.final_fraction > 0 or endless:
        return None
    ended = f'the learning rate is 0 since the decay ended at step {lengths.decay} (schedule.final_fraction=0.0)'
    way_out = f'--config.schedule.decay_steps={lengths.total}'
    if first == step:
        raise InputError(f'steps {step + 1} to {lengths.total} would learn nothing: {ended}; add {way_out} to go on')
    later = f'once step {lengths.decay} is reached, ' if step else ''
    ended = ended.replace('is 0 since the decay ended', 'is 0 once the decay ends')
    return f'notice: steps {first + 1} to {lengths.total} will learn nothing: {ended}; {later}{way_out} changes that'


def make_schedule(config: RunConfig, lengths: Lengths) -> optax.Schedule:
    """Learning rate of each step, counted from 0.

    Linear from peak / warmup to the peak (the first step learns already); from there `schedule.shape`, with its end at
    `lengths.decay` and `final_fraction` x peak from there on:

      cosine        half a period of it (GPT-3, appendix B; GPT-1, section 4.1)
      linear        a line
      wsd           the peak, and a line over the last `cooldown_fraction` of the steps (Hu et al. 2024, section 4)
      constant      the peak, without end
      inverse_sqrt  peak x sqrt(warmup / step), without end but the floor (Vaswani et al. 2017, section 5.3)

    Where the batch grows, time is counted in tokens: in steps of the full batch.
    """
    sizes = batch_sizes(config)
    if config.schedule.shape == 'cosine' and len(sizes.stages) == 1:
        return _cosine(config, lengths)
    first_steps, first_rows, rows = (np.asarray(column) for column in zip(*sizes.stages, strict=True))

    def time(step: Any) -> jax.Array:
        """Steps of the full batch, float32."""
        if len(sizes.stages) == 1:
            return jnp.asarray(step, jnp.float32)
        stage = jnp.searchsorted(jnp.asarray(first_steps, jnp.int32), step, side='right') - 1
        since = (step - jnp.asarray(first_steps, jnp.int32)[stage]).astype(jnp.float32)
        before, ratio = (jnp.asarray(column / sizes.full, jnp.float32)[stage] for column in (first_rows, rows))
        return before + since * ratio

    peak, floor = config.optimizer.learning_rate, config.schedule.final_fraction
    warmup, decay = (sizes.rows_before(steps) / sizes.full for steps in (lengths.warmup, lengths.decay))
    start = max(warmup, decay * (1 - config.schedule.cooldown_fraction))  # of the cooldown of 'wsd'

    def line(now: jax.Array, first: float) -> jax.Array:
        return jnp.clip((now - first) / (decay - first), 0, 1)

    shapes: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
        'cosine': lambda now, _: 1 - (1 - floor) * (1 - jnp.cos(math.pi * line(now, warmup))) / 2,
        'linear': lambda now, _: 1 - (1 - floor) * line(now, warmup),
        'wsd': lambda now, _: 1 - (1 - floor) * line(now, start),
        'constant': lambda now, _: jnp.ones_like(now),
        'inverse_sqrt': lambda _, after: jnp.maximum(
            floor, jnp.sqrt(max(warmup, 1.0) / jnp.maximum(after, max(warmup, 1.0)))
        ),
    }
    shape = shapes[config.schedule.shape]

    def schedule(step: Any) -> jax.Array:
        now, after = time(step), time(step + 1)
        return peak * jnp.where(now < warmup, after / max(warmup, 1e-30), shape(now, after))

    return schedule


def _cosine(config: RunConfig, lengths: Lengths) -> optax.Schedule:
    """The shape of most runs, in optax's own words, whose bits they keep."""

    def countable(steps: int) -> int | float:
        """A length that no run comes to, such as GPT-3's 260 billion tokens in tiny batches, is no int32."""
        return steps if steps <= MOST_STEPS else float(steps)

    peak = config.optimizer.learning_rate
    decay, warmup = countable(lengths.decay - lengths.warmup), lengths.warmup
    cosine = optax.cosine_decay_schedule(peak, decay, config.schedule.final_fraction)
    if not warmup:
        return cosine
    linear = optax.linear_schedule(peak / warmup, peak, countable(max(warmup - 1, 1)))
    return optax.join_schedules([linear, cosine], [countable(warmup)])


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, moments: str = 'f32', seed: int = 0
) -> optax.GradientTransformation:
    """Clip -> Adam -> decoupled weight decay -> learning rate (Loshchilov & Hutter 2019, algorithm 2).

    Args:
      config: of the section `optimizer`; its multipliers scale the last two by parameter.
      schedule: the learning rate of each step.
      moments: the type that Adam's moments are stored in, 'f32' or 'bf16'; they are computed in float32.
      seed: of the chance that rounds them.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    multipliers = parse_multipliers(config.multipliers)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    if multipliers:
        decay = optax.stateless(functools.partial(_add_decay, config.weight_decay, multipliers))
    return optax.chain(
        clip,
        adam if moments == 'f32' else _rounded_moments(adam, seed),
        decay,
        optax.scale_by_learning_rate(schedule),
        *([optax.stateless(functools.partial(_scale, multipliers))] if multipliers else []),
    )


def _rounded_moments(adam: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """Adam with moments of 16 bits: computed in float32, and rounded by chance, or the second would stand still."""

    def init(params: Any) -> optax.ScaleByAdamState:
        state = adam.init(params)
        mu, nu = (jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), moment) for moment in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None):
        wide = state._replace(mu=as_f32(state.mu), nu=as_f32(state.nu))
        updates, wide = adam.update(gradients, wide, params)
        mu_key, nu_key = jax.random.split(jax.random.fold_in(jax.random.key(np.uint32(seed)), state.count))
        return updates, wide._replace(mu=rounded_by_chance(wide.mu, mu_key), nu=rounded_by_chance(wide.nu, nu_key))

    return optax.GradientTransformation(init, update)


def as_f32(tree: Any) -> Any:
    """Every array in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def rounded_by_chance(tree: Any, key: jax.Array) -> Any:
    """Float32 arrays as bfloat16, each number rounded up or down with the chance that makes its mean right.

    An update far below a number's last place is lost by rounding to the nearest, step after step; here it counts in
    the mean (Gupta et al. 2015, section 3.1). Numbers that bfloat16 has stay what they are.
    """
    leaves, treedef = jax.tree.flatten(tree)

    def one(number: int, leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        # bfloat16 is the upper half of float32: what the lower half and as many random bits carry over is the chance.
        carried = bits + jax.random.bits(jax.random.fold_in(key, number), leaf.shape, jnp.uint16).astype(jnp.uint32)
        cut = jax.lax.bitcast_convert_type(carried & np.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(leaf), cut, leaf).astype(jnp.bfloat16)

    return treedef.unflatten([one(number, leaf) for number, leaf in enumerate(leaves)])


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """A rule of `optimizer.multipliers`: factors for the parameters whose path its pattern matches; None: as before."""

    pattern: str
    lr: float | None
    decay: float | None


def parse_multipliers(text: str | None) -> tuple[Multiplier, ...]:
    """The rules of a text such as 'wte:lr=0.5,decay=0;blocks/mlp/.*:lr=2.0'.

    Raises:
      InputError: it has another form, a pattern is no regular expression, or a factor is below 0 or not finite.
    """

    def refuse(part: str, why: str) -> InputError:
        return InputError(
            f"optimizer.multipliers={text!r}: {part!r} {why}; write PATTERN:lr=FACTOR,decay=FACTOR with ';' between "
            'rules, one factor or both'
        )

    rules = []
    for part in filter(None, (part.strip() for part in (text or '').split(';'))):
        pattern, colon, factors = (piece.strip() for piece in part.rpartition(':'))
        if not colon or not pattern:
            raise refuse(part, 'has no PATTERN:')
        try:
            re.compile(pattern)
        except re.error as error:
            raise refuse(pattern, f'is no regular expression ({error})') from None
        found: dict[str, float] = {}
        for factor in factors.split(','):
            name, _, number = (piece.strip() for piece in factor.partition('='))
            try:
                value = float(number)
            except ValueError:
                raise refuse(factor, 'is no lr=FACTOR or decay=FACTOR') from None
            if name not in ('lr', 'decay') or name in found:
                raise refuse(factor, 'is no lr=FACTOR or decay=FACTOR, each given once')
            if not 0 <= value < 2**127:
                raise refuse(factor, 'must be a factor of 0 or more')
            found[name] = value
        rules.append(Multiplier(pattern, found.get('lr'), found.get('decay')))
    return tuple(rules)


def factors(rules: tuple[Multiplier, ...], params: Any, which: str) -> Any:
    """The factor 'lr' or 'decay' of each parameter, a tree like `params`: that of the last rule that gives one, or 1.

    Raises:
      InputError: a rule matches no parameter.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for rule in rules:
        if not any(re.fullmatch(rule.pattern, name) for name in names):
            raise InputError(
                f'optimizer.multipliers: {rule.pattern!r} matches no parameter; there are {", ".join(names)}'
            )

    def factor(path: tuple[Any, ...], _: Any) -> float:
        found = [getattr(rule, which) for rule in rules if re.fullmatch(rule.pattern, path_name(path))]
        return next((value for value in reversed(found) if value is not None), 1.0)

    return jax.tree_util.tree_map_with_path(factor, params)


def without_gradient(params: Any, multipliers: str | None) -> Any:
    """`params` of which those with a learning rate of 0 have no gradient: it is not computed, and clips no other."""
    rules = parse_multipliers(multipliers)
    if not rules:
        return params
    rates = factors(rules, params, 'lr')
    return jax.tree.map(lambda leaf, rate: leaf if rate else jax.lax.stop_gradient(leaf), params, rates)


def _add_decay(weight_decay: float, rules: tuple[Multiplier, ...], updates: Any, params: Any) -> Any:
    shares = jax.tree.map(lambda factor, decays: factor * decays, factors(rules, params, 'decay'), decay_mask(params))
    return jax.tree.map(
        lambda update, param, share: update + weight_decay * share * param if share else update, updates, params, shares
    )


def _scale(rules: tuple[Multiplier, ...], updates: Any, params: Any) -> Any:
    def scale(update: jax.Array, rate: float) -> jax.Array:
        # What is added to a frozen parameter leaves every bit of it, that of -0.0 too.
        return update * rate if rate else jnp.full_like(update, -0.0)

    return jax.tree.map(scale, updates, factors(rules, params, 'lr'))


def decay_mask(params: Any) -> Any:
    """Whether each parameter decays, a tree like `params`.

    Raises:
      ValueError: a parameter is named by neither list above, or by both.
    """

    def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
        name = path_name(path)
        found = [any(re.fullmatch(pattern, name) for pattern in patterns) for patterns in (DECAYED, NOT_DECAYED)]
        if sum(found) != 1:
            raise ValueError(f'parameter {name!r} must be named in exactly one of DECAYED and NOT_DECAYED')
        return found[0]

    return jax.tree_util.tree_map_with_path(decays, params)
