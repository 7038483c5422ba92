"""What a plan must know of a training that is not run: its recipe, its length, its state, its compiled step."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from gpt_jax.config import RunConfig, as_dict
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.models.config import GPT2_VOCAB_SIZE
from gpt_jax.parallel import MeshConfig, batch_sharding, make_abstract_mesh, make_mesh
from gpt_jax.training import recipe as recipes
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.recipe import facts, notes, provenance
from gpt_jax.training.state import TrainState, abstract_state
from gpt_jax.training.step import make_train_step


def recipe_section(run: RunConfig) -> dict[str, Any]:
    """`recipe`, name -> value and source, and `notes`, sentences."""
    model = run.model
    found = provenance(as_dict(run)) | facts(model.version, model.preset)
    return {
        'recipe': {name: {'value': value.value, 'source': value.source} for name, value in found.items()},
        'notes': notes(model.preset),
    }


def model_config(run: RunConfig) -> GPTConfig:
    """The architecture; where the corpus decides on the vocabulary, the size that the config asks for.

    A run trains a tokenizer of at most `data.vocab_size` tokens, or takes GPT-2's. Only the data tell how many
    characters there are: 256 stand for them.
    """
    sizes = {'bpe': run.data.vocab_size, 'char': 256}
    return recipes.model_config(run, run.model.vocab_size or sizes.get(run.data.tokenizer, GPT2_VOCAB_SIZE))


def training_tokens(run: RunConfig) -> int | None:
    """Tokens of the whole run; None where its length is in epochs of a corpus that is not at hand."""
    tokens_per_step = run.train.batch_size * run.model.block_size
    if run.train.steps is not None:
        return run.train.steps * tokens_per_step
    if run.train.tokens is None:
        return None
    return math.ceil(run.train.tokens / tokens_per_step) * tokens_per_step


def abstract_state_of(run: RunConfig, config: GPTConfig, mesh: MeshConfig) -> TrainState:
    """The training state as ShapeDtypeStructs, on a mesh of devices that need not be here."""
    count = math.prod((mesh.data, mesh.fsdp, mesh.tensor, mesh.context))
    return _state(run, config, make_abstract_mesh(mesh, count))


def lower_step(
    run: RunConfig, config: GPTConfig, mesh: MeshConfig, accumulation_steps: int, devices: Sequence[jax.Device]
) -> jax.stages.Lowered:
    """The real training step, lowered for `devices` that need not be here."""
    made = make_mesh(mesh, devices)
    schedule = optax.constant_schedule(run.optimizer.learning_rate)
    optimizer = make_optimizer(run.optimizer, schedule)
    step = make_train_step(GPT(config), optimizer, schedule, made, accumulation_steps, run.train.seed)
    shape = (run.train.batch_size, config.block_size)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(made))
    return step.lower(_state(run, config, made), {'tokens': tokens, 'targets': tokens})


def _state(run: RunConfig, config: GPTConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    # The schedule's form does not change the state's.
    schedule = optax.constant_schedule(run.optimizer.learning_rate)
    return abstract_state(GPT(config), make_optimizer(run.optimizer, schedule), mesh)
