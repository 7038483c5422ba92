"""AdamW as one visible chain, and the schedule it follows."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import optax

from gpt_jax.config import LENGTHS, MOST_STEPS, OptimizerConfig, RunConfig
from gpt_jax.errors import InputError
from gpt_jax.parallel.sharding import path_name

# Matrices and embeddings decay, gains and biases do not (GPT-1, section 4.1: "on all non bias or gain weights"). By
# name, since stacked over the layers a bias has two dimensions; each parameter must match exactly one of the two.
DECAYED = (r'wte|wpe|lm_head', r'blocks/(attention/(qkv|out)|mlp/(up|down))/kernel')
NOT_DECAYED = (r'ln_f/(scale|bias)', r'blocks/ln_[12]/(scale|bias)', r'blocks/(attention/(qkv|out)|mlp/(up|down))/bias')


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long things last, in optimizer steps."""

    total: int
    warmup: int
    decay: int


def lengths(run: RunConfig, windows_per_epoch: int) -> Lengths:
    """Resolves steps, tokens and epochs; the cosine's end defaults to the run's.

    Args:
      run: the experiment.
      windows_per_epoch: training sequences of block_size tokens in the corpus.

    Raises:
      InputError: the warmup is not shorter than the decay, or the run longer than int32 can count.
    """
    tokens_per_step = run.train.batch_size * run.model.block_size

    def steps(section: Any, prefix: str = '') -> int | None:
        if (count := getattr(section, f'{prefix}steps')) is not None:
            return count
        if (tokens := getattr(section, f'{prefix}tokens')) is not None:
            return math.ceil(tokens / tokens_per_step)
        if (epochs := getattr(section, f'{prefix}epochs')) is not None:
            return math.ceil(epochs * windows_per_epoch / run.train.batch_size)
        return None

    total = steps(run.train)
    if total > MOST_STEPS:
        raise InputError(
            f'train.tokens={run.train.tokens} or train.epochs={run.train.epochs} makes {total:,} steps of '
            f'{tokens_per_step:,} tokens; at most {MOST_STEPS:,} can be counted'
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
      InputError: keys of the schedule differ, and with them rates of steps that were taken.
    """
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
    if first >= lengths.total or run.schedule.final_fraction > 0:
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

    Linear from peak / warmup to the peak (the first step learns already), a cosine from there to
    `final_fraction` x peak at `lengths.decay`, constant after it (GPT-3, appendix B; GPT-1, section 4.1).
    """

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


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip -> Adam -> decoupled weight decay -> learning rate (Loshchilov & Hutter 2019, algorithm 2)."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


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
