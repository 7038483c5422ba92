"""What a training step reads and writes, and the compiled steps: one of training, one of evaluation."""

from collections.abc import Callable, Mapping
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

F32 = 4

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


@flax.struct.dataclass
class TrainState:
    """One pytree, so that it is made, sharded, donated and stored as a whole.

    Attributes:
      step: int32, steps taken (skipped ones too).
      skipped: int32, steps whose gradients were not finite and changed nothing (fp16 alone).
      params: float32 parameters, layers stacked.
      opt_state: the optax chain's.
      loss_scale: flax's dynamic loss scale, or None where the precision needs none.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: optax.OptState
    loss_scale: DynamicScale | None

    @property
    def optimizer(self) -> dict[str, Any]:
        """All but the parameters: what a checkpoint needs besides them to resume."""
        return {
            'step': self.step,
            'skipped': self.skipped,
            'opt_state': self.opt_state,
            'loss_scale': self.loss_scale,
        }

    @classmethod
    def join(cls, params: Any, optimizer: dict[str, Any]) -> Self:
        """The inverse of taking `params` and `optimizer` apart."""
        return cls(params=params, **optimizer)


def abstract_state(model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings on `mesh`; nothing is allocated.

    Raises:
      InputError: a parameter cannot be divided over the mesh.
    """
    with activate(mesh):
        shapes = jax.eval_shape(lambda: _state_before_step_0(model, optimizer, _init_params(model, seed=0)))
    shardings = tree_shardings(mesh, shapes.params, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def init_state(
    model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int = 0, params: Any = None
) -> TrainState:
    """The state before step 0, made in one jit so that every part is born on its own devices.

    Parameters are drawn from `seed`, or are the given ones, which lie where `abstract_state` says.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    if params is not None:
        rest = jax.jit(
            lambda params: _state_before_step_0(model, optimizer, params).optimizer, out_shardings=shardings.optimizer
        )
        return TrainState.join(params, rest(params))
    with activate(mesh):
        return jax.jit(
            lambda: _state_before_step_0(model, optimizer, _init_params(model, seed)), out_shardings=shardings
        )()


def _init_params(model: GPT, seed: int) -> Any:
    return model.init(_key(seed), jnp.zeros((1, 1), jnp.int32))['params']


def _key(seed: int) -> jax.Array:
    """Of a seed below 2**32; as uint32 none of them is out of the range of jax's default int32."""
    return jax.random.key(np.uint32(seed))


def _state_before_step_0(model: GPT, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        loss_scale=DynamicScale() if model.config.compute_dtype == 'fp16' else None,
    )


def make_train_step(
    model: GPT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    accumulation_steps: int = 1,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step (state, batch) -> (state, metrics); the given state is donated.

    The batch holds `tokens` and `targets`, int32 [batch, time], and with a document mask `positions` and `documents`,
    the same. It is cut into `accumulation_steps` micro-batches whose gradients are added up: the result is that of the
    whole batch at once, the mean over all tokens. Metrics are float32 scalars `loss` (nats a token), `grad_norm`
    (before clipping) and `learning_rate`, and with fp16 `loss_scale` and `skipped_steps`.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with activate(mesh):
            key = jax.random.fold_in(_key(seed), state.step)
            rows_B = jnp.arange(batch['tokens'].shape[0])
            loss, gradients, finite, loss_scale = _gradients(
                model, state, batch | {'rows': rows_B}, accumulation_steps, key
            )
            return _apply(optimizer, schedule, state, loss, gradients, finite, loss_scale)

    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def _gradients(model: GPT, state: TrainState, batch: Batch, accumulation_steps: int, key: jax.Array):
    """Mean loss and its gradient, whether all of it is finite, and the next loss scale."""
    count = batch['tokens'].size

    def loss_fn(params: Any, micro_batch: Batch, key: jax.Array) -> jax.Array:
        losses_BT = _token_losses(model, params, micro_batch, rngs={'dropout': key})
        # Over the count of the whole batch, so that micro-batches simply add up.
        return jnp.sum(losses_BT) / count

    def value_and_grad(loss_scale: DynamicScale | None, micro_batch: Batch, key: jax.Array):
        if loss_scale is None:
            loss, gradients = jax.value_and_grad(loss_fn)(state.params, micro_batch, key)
            return loss, gradients, jnp.array(True), None
        loss_scale, finite, loss, gradients = loss_scale.value_and_grad(loss_fn)(state.params, micro_batch, key)
        return loss, gradients, finite, loss_scale

    if accumulation_steps == 1:
        return value_and_grad(state.loss_scale, batch, key)

    def accumulate(carry, micro_batch):
        loss, gradients, finite, loss_scale = carry
        micro_batch = {name: constrain(array, *('batch', 'time')[: array.ndim]) for name, array in micro_batch.items()}
        more = value_and_grad(loss_scale, micro_batch, key)
        gradients = jax.tree.map(jnp.add, gradients, more[1])
        return (loss + more[0], gradients, finite & more[2], more[3]), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    carry = (jnp.zeros(()), zeros, jnp.array(True), state.loss_scale)
    return jax.lax.scan(accumulate, carry, _micro_batches(batch, accumulation_steps))[0]


def _token_losses(model: GPT, params: Any, batch: Batch, **settings: Any) -> jax.Array:
    """[batch, time], each token seen as the batch says: in its row and document where these are given."""
    info = {name: batch[name] for name in ('positions', 'rows', 'documents') if name in batch}
    return model.apply({'params': params}, batch['tokens'], batch['targets'], **info, **settings, method='token_losses')


def _micro_batches(batch: Batch, count: int) -> Batch:
    """[batch, ...] -> [count, batch / count, ...], every count-th row in one, so that no row changes its device."""
    return {name: jnp.moveaxis(array.reshape(-1, count, *array.shape[1:]), 1, 0) for name, array in batch.items()}


def _apply(optimizer, schedule, state: TrainState, loss, gradients, finite, loss_scale):
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        'loss': loss,
        'grad_norm': optax.tree.norm(gradients),
        'learning_rate': schedule(state.step - state.skipped),
    }
    skipped = state.skipped
    if loss_scale is not None:
        # Overflow under fp16 is part of the search for the scale: such a step leaves everything as it was.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = skipped + jnp.where(finite, 0, 1)
        metrics |= {'loss_scale': loss_scale.scale, 'skipped_steps': skipped}
    return TrainState(state.step + 1, skipped, params, opt_state, loss_scale), metrics


def make_eval_step(model: GPT, mesh: Mesh) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """The jitted (params, batch) -> `loss` summed in nats and `tokens` counted, both over weights of 1.

    The batch holds `tokens` and `targets`, int32, and `weights`, float32 0 or 1, all [batch, time]; with a document
    mask `positions` and `documents` as well.
    """

    def eval_step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        with activate(mesh):
            losses_BT = _token_losses(model, params, batch)
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
    if run.eval.batch_size is not None and run.eval.batch_size % rows:
        raise InputError(f'eval.batch_size={run.eval.batch_size} is not divisible by {where}; choose a multiple')


def check_memory(run: RunConfig, config: GPTConfig, mesh: Mesh) -> None:
    """Raises InputError, with the numbers, where a run cannot fit its devices whatever the compiler does.

    Counted is what no setting avoids: parameters, their gradients and AdamW's two moments in float32, split over fsdp
    and tensor; the input of each layer, which even remat='full' keeps; the tokens and targets of a batch. A run that
    passes may still need more: `python -m gpt_jax.plan` estimates all of it.
    """
    limit = memory_of(mesh.local_devices) / len(mesh.local_devices)
    sizes, train = mesh.shape, run.train
    rows = sizes['data'] * sizes['fsdp']
    state = 4 * F32 * config.num_parameters / (sizes['fsdp'] * sizes['tensor'])
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
