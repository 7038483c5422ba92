"""Memory of a step on 32 768 tokens that eight devices share, by the compiler's own account; nothing is run."""

import jax
import jax.numpy as jnp
import optax
import pytest

from gpt_jax.config import MeshConfig, OptimizerConfig
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import batch_sharding, make_mesh
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.step import abstract_state, make_train_step

OPTIMIZER = OptimizerConfig(1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0)


def temporaries(context, time, options):
    """Bytes that a device holds besides the state and the batch."""
    config = GPTConfig(512, time, n_layer=2, n_head=4, d_model=256, scan_layers=True, remat='names')
    mesh = make_mesh(MeshConfig(data=1, context=context), jax.devices()[:context])
    model, schedule = GPT(config), optax.constant_schedule(OPTIMIZER.learning_rate)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    tokens = jax.ShapeDtypeStruct((1, time), jnp.int32, sharding=batch_sharding(mesh))
    step = make_train_step(model, optimizer, schedule, mesh)
    lowered = step.lower(abstract_state(model, optimizer, mesh), {'tokens': tokens, 'targets': tokens})
    return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_each_of_eight_devices_needs_an_eighth_of_the_activations(as_users):
    shared = temporaries(context=8, time=32_768, options=as_users)
    # What one device needs for a sequence of an eighth: nothing of a device grows with the whole sequence.
    assert shared <= temporaries(context=1, time=32_768 // 8, options=as_users)
    assert shared <= temporaries(context=1, time=32_768, options=as_users) / 8
