"""What a training step reads and writes: parameters, optimizer, counters."""

from typing import Any, Self

import flax
import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh

from gpt_jax.models import GPT
from gpt_jax.parallel import activate, tree_shardings


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


def _initialiser(model: GPT, optimizer: optax.GradientTransformation, seed: int):
    def init() -> TrainState:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))['params']
        return TrainState.join(params, _before_step_0(model, optimizer, params))

    return init


def _before_step_0(model: GPT, optimizer: optax.GradientTransformation, params: Any) -> dict[str, Any]:
    return {
        'step': jnp.zeros((), jnp.int32),
        'skipped': jnp.zeros((), jnp.int32),
        'opt_state': optimizer.init(params),
        'loss_scale': DynamicScale() if model.config.compute_dtype == 'fp16' else None,
    }


def abstract_state(model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings on `mesh`; nothing is allocated.

    Raises:
      InputError: a parameter cannot be divided over the mesh.
    """
    with activate(mesh):
        shapes = jax.eval_shape(_initialiser(model, optimizer, 0))
    shardings = tree_shardings(mesh, shapes.params, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def init_state(model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The state before step 0, made in one jit so that every part is born on its own devices."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    with activate(mesh):
        return jax.jit(_initialiser(model, optimizer, seed), out_shardings=shardings)()


def start_state(model: GPT, optimizer: optax.GradientTransformation, mesh: Mesh, params: Any) -> TrainState:
    """The state before step 0 around given parameters, which lie where `abstract_state` says."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh)).optimizer
    rest = jax.jit(lambda params: _before_step_0(model, optimizer, params), out_shardings=shardings)(params)
    return TrainState.join(params, rest)
