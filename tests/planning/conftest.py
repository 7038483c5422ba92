"""A tiny training step with its estimate, and what XLA says of the compiled one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax.config import OptimizerConfig
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import MeshConfig, batch_sharding, make_mesh
from gpt_jax.planning import Placement, training_memory
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.step import abstract_state, make_train_step


@pytest.fixture(scope='session')
def estimate_and_truth(as_users):
    """A function: mesh, batch, accumulation steps, fields of GPTConfig -> Memory, and bytes by XLA."""

    def measure(mesh=(1, 1, 1, 1), batch_size=8, accumulation_steps=1, **fields):
        config = GPTConfig(512, **({'block_size': 64, 'n_layer': 8, 'n_head': 4, 'd_model': 128} | fields))
        mesh_config, devices = MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))]
        made = make_mesh(mesh_config, devices)
        schedule = optax.constant_schedule(1e-3)
        optimizer = make_optimizer(OptimizerConfig(1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0), schedule)
        state = abstract_state(GPT(config), optimizer, made)
        step = make_train_step(GPT(config), optimizer, schedule, made, accumulation_steps)
        tokens = jax.ShapeDtypeStruct((batch_size, config.block_size), jnp.int32, sharding=batch_sharding(made))
        lowered = step.lower(state, {'tokens': tokens, 'targets': tokens})
        analysis = lowered.compile(compiler_options=as_users).memory_analysis()
        truth = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        truth += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        placement = Placement(config, mesh_config, batch_size, accumulation_steps)
        return training_memory(placement, state, cpu=True), truth

    return measure
