"""What a training step reads and writes, and the compiled steps: one of training, one of evaluation.

A step that would do harm is skipped inside the compiled program: where the loss or the gradient is not finite, and
where `StepSettings` has it judged a spike. Parameters, moments and average stay what they were; the schedule waits.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh

from gpt_jax.config import RunConfig
from gpt_jax.errors import InputError
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import activate, batch_sharding, constrain, replicated, tree_shardings
from gpt_jax.parallel.devices import GIB, memory_of
from gpt_jax.parallel.sharding import path_name
from gpt_jax.training.optimizer import (
    as_f32,
    batch_sizes,
    factors,
    parse_multipliers,
    rounded_by_chance,
    without_gradient,
)

F32 = 4
BYTES = {'f32': 4, 'bf16': 2}

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# On CPU XLA hands fusions around matrix products to YNNPACK, which slows training down (docs/PERFORMANCE.md).
CPU_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': ''}


def compiler_options(mesh: Mesh | None = None) -> dict[str, Any] | None:
    """XLA options of a program for the devices of `mesh`, or for those in use.

    A step can be compiled for devices that are not here: it is the mesh that says what they are.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return CPU_OPTIONS if platform == 'cpu' else None


# Why a step was skipped, in its metrics: 0 where it was not. An overflow is that of fp16 while its scale can fall.
NOT_FINITE, OVERFLOW, LOSS_SPIKE, GRADIENT_SPIKE = range(1, 5)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step does besides the gradient and the optimizer's chain; by default nothing.

    Attributes:
      params: the type that parameters are stored in, 'f32' or 'bf16'.
      ema_decay: of the average of the parameters; None: there is none.
      loss_deviations, grad_norm_deviations: what is further above its window's mean, in standard deviations, is a
        spike; None: nothing is.
      window: steps that a spike is held against.
      multipliers: `optimizer.multipliers`, of which those of 0 freeze.
      norms: whether the metrics have the norms of each parameter, its gradient and its update.
    """

    params: str = 'f32'
    ema_decay: float | None = None
    loss_deviations: float | None = None
    grad_norm_deviations: float | None = None
    window: int = 128
    multipliers: str | None = None
    norms: bool = False

    @classmethod
    def of(cls, run: RunConfig) -> Self:
        """Those of an experiment."""
        return cls(
            run.precision.params,
            run.optimizer.ema_decay,
            run.train.spike_loss_deviations,
            run.train.spike_grad_norm_deviations,
            run.train.spike_window_steps,
            run.optimizer.multipliers,
            run.train.norms_every_steps > 0,
        )

    @property
    def sees_spikes(self) -> bool:
        """Whether any step may be judged one."""
        return self.loss_deviations is not None or self.grad_norm_deviations is not None


@flax.struct.dataclass
class SpikeWindow:
    """The latest steps that were not skipped.

    Attributes:
      losses, grad_norms: float32 [window], each a ring.
      count: int32, steps that were ever put in.
    """

    losses: jax.Array
    grad_norms: jax.Array
    count: jax.Array


@flax.struct.dataclass
class TrainState:
    """One pytree, so that it is made, sharded, donated and stored as a whole.

    Attributes:
      step: int32, steps taken (skipped ones too).
      skipped: int32, steps that changed nothing.
      params: parameters, layers stacked; float32 or, as `precision.params` says, bfloat16.
      opt_state: the optax chain's.
      loss_scale: flax's dynamic loss scale, or None where the precision needs none.
      skipped_in_a_row: int32, the latest steps without one that was not skipped; fp16's search for a scale is left out.
      spikes: what a spike is held against, or None.
      ema: the parameters' exponential moving average, float32, or None.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: optax.OptState
    loss_scale: DynamicScale | None
    skipped_in_a_row: jax.Array
    spikes: SpikeWindow | None = None
    ema: Any = None

    @property
    def optimizer(self) -> dict[str, Any]:
        """All but the parameters and their average: what a checkpoint needs besides them to resume."""
        return {
            'step': self.step,
            'skipped': self.skipped,
            'opt_state': self.opt_state,
            'loss_scale': self.loss_scale,
            'skipped_in_a_row': self.skipped_in_a_row,
            'spikes': self.spikes,
        }

    @classmethod
    def join(cls, params: Any, optimizer: dict[str, Any], ema: Any = None) -> Self:
        """The inverse of taking `params`, `optimizer` and `ema` apart."""
        return cls(params=params, ema=ema, **optimizer)


def abstract_state(
    model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh, settings: StepSettings = StepSettings()
) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings on `mesh`; nothing is allocated.

    Raises:
      InputError: a parameter cannot be divided over the mesh.
    """
    with activate(mesh):
        shapes = jax.eval_shape(lambda: _state_before_step_0(model, optimizer, settings, _init_params(model, seed=0)))
    shardings = tree_shardings(mesh, shapes.params, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def init_state(
    model: GPT,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int = 0,
    params: Any = None,
    settings: StepSettings = StepSettings(),
) -> TrainState:
    """The state before step 0, made in one jit so that every part is born on its own devices.

    Parameters are drawn from `seed`, or are the given ones, which lie where `abstract_state` says, in float32.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh, settings))
    if params is not None:
        if settings.params == 'f32':
            # They stay where they are: all but them is made.
            rest = jax.jit(
                lambda params: _state_before_step_0(model, optimizer, settings, params).replace(params=None),
                out_shardings=shardings.replace(params=None),
            )
            return rest(params).replace(params=params)
        return jax.jit(
            lambda params: _state_before_step_0(model, optimizer, settings, params), out_shardings=shardings
        )(params)
    with activate(mesh):
        return jax.jit(
            lambda: _state_before_step_0(model, optimizer, settings, _init_params(model, seed)),
            out_shardings=shardings,
        )()


def _init_params(model: GPT, seed: int) -> Any:
    return model.init(_key(seed), jnp.zeros((1, 1), jnp.int32))['params']


def _key(seed: int) -> jax.Array:
    """Of a seed below 2**32; as uint32 none of them is out of the range of jax's default int32."""
    return jax.random.key(np.uint32(seed))


def _state_before_step_0(
    model: GPT, optimizer: optax.GradientTransformation, settings: StepSettings, params: Any
) -> TrainState:
    # Arrays of their own, each of them: a step is given the state to write over.
    window = SpikeWindow(*(jnp.zeros((settings.window,), jnp.float32) for _ in range(2)), jnp.zeros((), jnp.int32))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params) if settings.params == 'bf16' else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=narrow,
        opt_state=optimizer.init(params),
        loss_scale=DynamicScale() if model.config.compute_dtype == 'fp16' else None,
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        spikes=window if settings.sees_spikes else None,
        ema=None if settings.ema_decay is None else jax.tree.map(jnp.copy, params),
    )


def make_train_step(
    model: GPT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    accumulation_steps: int = 1,
    seed: int = 0,
    settings: StepSettings = StepSettings(),
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step (state, batch) -> (state, metrics); the given state is donated.

    The batch holds `tokens` and `targets`, int32 [batch, time], and with a document mask `positions` and `documents`,
    the same. It is cut into `accumulation_steps` micro-batches whose gradients are added up: the result is that of the
    whole batch at once, the mean over all tokens. Metrics are scalars: float32 `loss` (nats a token), `grad_norm`
    (before clipping) and `learning_rate`, with fp16 `loss_scale`; int32 `skipped_steps` so far, `skipped_in_a_row`, and
    `skip_reason`, see above.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh, settings))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with activate(mesh):
            key = _step_key(seed, state.step)
            # What is stored in 16 bits is summed and updated in 32.
            params = as_f32(state.params)
            found = _gradients(model, params, state.loss_scale, batch, accumulation_steps, key, settings.multipliers)
            rounding = jax.random.fold_in(key, ROUNDING)
            return _apply(optimizer, schedule, settings, state, params, *found, rounding)

    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


ROUNDING = 0x526F756E  # folded into a step's key, which is that of its dropout


def _step_key(seed: int, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(_key(seed), step)


def _gradients(
    model: GPT,
    params: Any,
    loss_scale: DynamicScale | None,
    batch: Batch,
    accumulation_steps: int,
    key: jax.Array,
    multipliers: str | None,
):
    """Mean loss and its gradient, whether all of it is finite, and the next loss scale."""
    count = batch['tokens'].size
    batch = batch | {'rows': jnp.arange(batch['tokens'].shape[0])}

    def loss_fn(params: Any, micro_batch: Batch, key: jax.Array) -> jax.Array:
        params = without_gradient(params, multipliers)
        losses_BT = _token_losses(model, params, micro_batch, rngs={'dropout': key})
        # Over the count of the whole batch, so that micro-batches simply add up.
        return jnp.sum(losses_BT) / count

    def value_and_grad(loss_scale: DynamicScale | None, micro_batch: Batch, key: jax.Array):
        if loss_scale is None:
            loss, gradients = jax.value_and_grad(loss_fn)(params, micro_batch, key)
            return loss, gradients, jnp.array(True), None
        loss_scale, finite, loss, gradients = loss_scale.value_and_grad(loss_fn)(params, micro_batch, key)
        return loss, gradients, finite, loss_scale

    if accumulation_steps == 1:
        return value_and_grad(loss_scale, batch, key)

    def accumulate(carry, micro_batch):
        loss, gradients, finite, loss_scale = carry
        micro_batch = {
            name: constrain(array, *('batch', 'time')[: array.ndim], called=f'{name} of a micro-batch')
            for name, array in micro_batch.items()
        }
        more = value_and_grad(loss_scale, micro_batch, key)
        gradients = jax.tree.map(jnp.add, gradients, more[1])
        return (loss + more[0], gradients, finite & more[2], more[3]), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    carry = (jnp.zeros(()), zeros, jnp.array(True), loss_scale)
    return jax.lax.scan(accumulate, carry, _micro_batches(batch, accumulation_steps))[0]


def _token_losses(model: GPT, params: Any, batch: Batch, **settings: Any) -> jax.Array:
    """[batch, time], each token seen as the batch says: in its row and document where these are given."""
    info = {name: batch[name] for name in ('positions', 'rows', 'documents') if name in batch}
    return model.apply({'params': params}, batch['tokens'], batch['targets'], **info, **settings, method='token_losses')


def _micro_batches(batch: Batch, count: int) -> Batch:
    """[batch, ...] -> [count, batch / count, ...], every count-th row in one, so that no row changes its device."""
    return {name: jnp.moveaxis(array.reshape(-1, count, *array.shape[1:]), 1, 0) for name, array in batch.items()}


def _apply(
    optimizer,
    schedule,
    settings: StepSettings,
    state: TrainState,
    params,
    loss,
    gradients,
    finite,
    loss_scale,
    rounding: jax.Array,
):
    """The next state and the metrics; `params` are the state's in float32."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    grad_norm, taken = optax.tree.norm(gradients), state.step - state.skipped
    finite = finite & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    # Overflow under fp16 is part of the search for the scale, as long as that is above 1: where it is not, the
    # gradients themselves are more than fp16 holds.
    searching = jnp.isfinite(loss) & (state.loss_scale.scale > 1) if loss_scale is not None else False
    reason = jnp.where(
        finite, _spike(settings, state.spikes, loss, grad_norm), jnp.where(searching, OVERFLOW, NOT_FINITE)
    )
    accepted = reason == 0
    ema = None
    if settings.ema_decay is not None:
        # Nearer to the parameters at first, which are still far from what they become (as TensorFlow's num_updates).
        decay = jnp.minimum(settings.ema_decay, (1 + taken) / (10 + taken)).astype(jnp.float32)
        ema = jax.tree.map(lambda average, leaf: average + (1 - decay) * (leaf - average), state.ema, params)
    if settings.params == 'bf16':
        params = rounded_by_chance(params, rounding)
    # A choice between two numbers that are at hand: it becomes part of the update's own loops, and costs nothing there.
    params, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(accepted, new, old),
        (params, opt_state, ema),
        (state.params, state.opt_state, state.ema),
    )
    skipped = state.skipped + jnp.where(accepted, 0, 1)
    in_a_row = jnp.where(accepted, 0, state.skipped_in_a_row + jnp.where(reason == OVERFLOW, 0, 1))
    metrics = {'loss': loss, 'grad_norm': grad_norm, 'learning_rate': schedule(taken)}
    if loss_scale is not None:
        metrics['loss_scale'] = loss_scale.scale
    metrics |= {'skipped_steps': skipped, 'skipped_in_a_row': in_a_row, 'skip_reason': reason}
    if settings.norms:
        trees = {'gradient': gradients, 'parameter': as_f32(params), 'update': updates}
        metrics['norms'] = {f'norms/{kind}/{name}': norm for kind, tree in trees.items() for name, norm in _norms(tree)}
    spikes = _remember(state.spikes, accepted, loss, grad_norm)
    return TrainState(state.step + 1, skipped, params, opt_state, loss_scale, in_a_row, spikes, ema), metrics


def _norms(tree: Any) -> Iterator[tuple[str, jax.Array]]:
    """Each parameter's name, and the norm of what the tree has of it, over all its layers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_name(path), optax.tree.norm(leaf)


def _spike(settings: StepSettings, window: SpikeWindow | None, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Why a step with finite numbers is skipped, or 0; nothing is a spike before the window is full."""

    def beyond(values: jax.Array, value: jax.Array, deviations: float | None) -> jax.Array | bool:
        if deviations is None:
            return False
        mean = jnp.mean(values)
        # What equal numbers differ by in float32 is no deviation.
        return value - mean > deviations * jnp.std(values) + 1e-6 * jnp.abs(mean)

    if window is None:
        return jnp.zeros((), jnp.int32)
    is_loss = beyond(window.losses, loss, settings.loss_deviations)
    is_gradient = beyond(window.grad_norms, grad_norm, settings.grad_norm_deviations)
    reason = jnp.where(is_loss, LOSS_SPIKE, jnp.where(is_gradient, GRADIENT_SPIKE, 0))
    return jnp.where(window.count >= settings.window, reason, 0)


def _remember(window: SpikeWindow | None, accepted, loss, grad_norm) -> SpikeWindow | None:
    if window is None:
        return None
    place = window.count % window.losses.size

    def put(values: jax.Array, value: jax.Array) -> jax.Array:
        return values.at[place].set(jnp.where(accepted, value, values[place]))

    return SpikeWindow(
        put(window.losses, loss), put(window.grad_norms, grad_norm), window.count + jnp.where(accepted, 1, 0)
    )


def find_not_finite(
    model: GPT,
    mesh: Mesh,
    state: TrainState,
    batch: Batch,
    accumulation_steps: int = 1,
    seed: int = 0,
    settings: StepSettings = StepSettings(),
) -> str | None:
    """Which parameters' values, or else whose gradient, was the first not to be finite in the step that was skipped.

    Args:
      model, mesh, accumulation_steps, seed, settings: as for the step.
      state: after that step, which changed nothing but its counters.
      batch: that of the step.

    Returns:
      Such as 'the gradient of blocks/mlp/up/kernel in layer 3', or None where all is finite. The first gradient is that
      nearest to the output, from where the backward pass begins.
    """

    def by_layer(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        stacked = path_name(path).startswith('blocks/')
        return ~jnp.isfinite(leaf).all(range(1, leaf.ndim) if stacked else None)

    def check(state: TrainState, batch: Batch):
        with activate(mesh):
            key, params = _step_key(seed, state.step - 1), as_f32(state.params)
            _, gradients, *_ = _gradients(
                model, params, state.loss_scale, batch, accumulation_steps, key, settings.multipliers
            )
            return [jax.tree_util.tree_map_with_path(by_layer, tree) for tree in (params, gradients)]

    checked = jax.jit(check, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh))(state, batch)
    of_params, of_gradients = (_bad_groups(jax.device_get(tree)) for tree in checked)
    if of_params:
        return f'the values of {of_params[-1]}'
    return f'the gradient of {of_gradients[0]}' if of_gradients else None


# From the output to the input, as the backward pass goes.
BACKWARD = ('lm_head', 'ln_f', 'mlp/down', 'mlp/up', 'ln_2', 'attention/out', 'attention/qkv', 'ln_1', 'wpe', 'wte')


def _bad_groups(flags: Any) -> list[str]:
    """The names, with their layers, of the parameters of which a flag is set, in the order of the backward pass."""
    found = []
    for path, bad in jax.tree_util.tree_leaves_with_path(flags):
        name = path_name(path)
        order = next(number for number, part in enumerate(BACKWARD) if part in name)
        if name.startswith('blocks/'):
            found += [((1, -layer, order), f'{name} in layer {layer}') for layer in np.flatnonzero(bad).tolist()]
        elif bad:
            found.append(((0 if order < 2 else 2, 0, order), name))
    return [name for _, name in sorted(found)]


def make_eval_step(model: GPT, mesh: Mesh) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """The jitted (params, batch) -> `loss` summed in nats and `tokens` counted, both over weights of 1.

    The batch holds `tokens` and `targets`, int32, and `weights`, float32 0 or 1, all [batch, time]; with a document
    mask `positions` and `documents` as well.
    """

    def eval_step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        with activate(mesh):
            losses_BT = _token_losses(model, as_f32(params), batch)
            return {'loss': jnp.sum(losses_BT * batch['weights']), 'tokens': jnp.sum(batch['weights'])}

    return jax.jit(eval_step, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh))


def check_mesh(run: RunConfig, sizes: Mapping[str, int], config: GPTConfig) -> None:
    """Raises InputError where a model cannot be trained on a mesh of these `sizes`, one for each axis.

    The vocabulary is left out: what it is padded to may be known only with the data (`tree_shardings` has it).
    """
    halves = 2 if sizes['context'] > 1 else 1
    divided = (
        ('fsdp', 'model.d_model', config.d_model, 1, ''),
        ('tensor', 'model.n_head', config.n_head, 1, ''),
        ('tensor', "the MLP's width", config.d_mlp, 1, ''),
        ('context', 'model.block_size', config.block_size, halves, ': each device has two pieces of a sequence'),
    )
    for axis, key, value, pieces, why in divided:
        if value % (sizes[axis] * pieces):
            product = f'{pieces} x ' if pieces > 1 else ''
            raise InputError(
                f'{key}={value} is not divisible by {product}mesh.{axis}={sizes[axis]}{why}; choose a multiple of '
                f'{sizes[axis] * pieces}, or another mesh.{axis}'
            )
    rows = sizes['data'] * sizes['fsdp']
    where = f'the {rows} devices of mesh.data={sizes["data"]} x mesh.fsdp={sizes["fsdp"]}'
    micro_batch = run.train.batch_size // run.train.accumulation_steps
    if micro_batch % rows:
        raise InputError(
            f'train.batch_size={run.train.batch_size} in {run.train.accumulation_steps} micro-batches of {micro_batch} '
            f'is not divisible by {where}; choose a multiple'
        )
    for _, _, size in batch_sizes(run).stages:
        if micro_batches(run, size, rows) is None:
            raise InputError(
                f'a batch of {size} sequences, on the way from schedule.initial_batch_size to train.batch_size='
                f'{run.train.batch_size}, is not divisible by {where}; choose an initial_batch_size that is a multiple'
            )
    if run.eval.batch_size is not None and run.eval.batch_size % rows:
        raise InputError(f'eval.batch_size={run.eval.batch_size} is not divisible by {where}; choose a multiple')


def micro_batches(run: RunConfig, size: int, rows: int) -> int | None:
    """Micro-batches of a batch of `size` on a mesh that splits it over `rows` devices; None where there is no way.

    The fewest that are no larger than those of the full batch, which has `train.accumulation_steps`.
    """
    largest = run.train.batch_size // run.train.accumulation_steps
    counts = range(-(-size // largest), size + 1)
    return next((count for count in counts if size % count == 0 and size // count % rows == 0), None)


def check_multipliers(run: RunConfig, config: GPTConfig) -> None:
    """Raises InputError where a rule of `optimizer.multipliers` cannot be read, matches nothing, or nothing learns."""
    if rules := parse_multipliers(run.optimizer.multipliers):
        params = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
        if not any(jax.tree.leaves(factors(rules, params, 'lr'))):
            raise InputError(
                f'optimizer.multipliers={run.optimizer.multipliers}: the learning rate of every parameter is 0; leave '
                'one that learns'
            )


def check_memory(run: RunConfig, config: GPTConfig, mesh: Mesh) -> None:
    """Raises InputError, with the numbers, where a run cannot fit its devices whatever the compiler does.

    Counted is what no setting avoids: parameters, AdamW's two moments and the average as they are stored, and gradients
    in float32, split over fsdp and tensor; the input of each layer, which even remat='full' keeps; the tokens and
    targets of a batch. A run that passes may still need more: `python -m gpt_jax.plan` estimates all of it.
    """
    limit = memory_of(mesh.local_devices) / len(mesh.local_devices)
    sizes, train = mesh.shape, run.train
    rows = sizes['data'] * sizes['fsdp']
    of_parameter = BYTES[run.precision.params] + F32 + 2 * BYTES[run.precision.moments]
    of_parameter += 0 if run.optimizer.ema_decay is None else F32
    state = of_parameter * config.num_parameters / (sizes['fsdp'] * sizes['tensor'])
    tokens = train.batch_size // train.accumulation_steps / rows * config.block_size / sizes['context']
    inputs = tokens * config.d_model * config.n_layer * config.dtype.dtype.itemsize
    batches = 2 * 4 * train.batch_size / rows * config.block_size / sizes['context']
    evaluated = (run.eval.batch_size or 0) / rows * config.block_size * config.d_model * config.dtype.dtype.itemsize
    needed = state + max(inputs, evaluated) + batches
    if needed > limit:
        which = (
            f'eval.batch_size={run.eval.batch_size}' if evaluated > inputs else f'train.batch_size={train.batch_size}'
        )
        raise InputError(
            f'this run needs at least {needed / GIB:,.1f} GiB on each device, which has {limit / GIB:,.1f}: '
            f'{state / GIB:,.1f} for {config.num_parameters:,} parameters with gradients and AdamW, '
            f'{(needed - state) / GIB:,.1f} for the inputs of {config.n_layer} layers of width {config.d_model} on '
            f'{which} sequences of {config.block_size} tokens; make these smaller, or raise train.accumulation_steps '
            'or mesh.fsdp'
        )
