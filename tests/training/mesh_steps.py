"""A few training steps and an evaluation on a mesh, in whatever processes run this."""

import types
from fractions import Fraction

import jax
import numpy as np
import optax

from gpt_jax.config import MeshConfig, OptimizerConfig
from gpt_jax.data import Batches
from gpt_jax.data.batches import TokenSource
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import global_batch, make_mesh
from gpt_jax.training.evaluate import evaluate
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.step import init_state, make_eval_step, make_train_step

VOCAB, SHAPE, STEPS = 50, (8, 16), 2
OPTIMIZER = OptimizerConfig(1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0)


def mesh_steps(sizes, devices=None):
    """Loss and gradient norm of each step, then the validation loss, on a mesh of (data, fsdp, tensor, context)."""
    mesh = make_mesh(MeshConfig(*sizes), devices)
    model = GPT(GPTConfig(VOCAB, SHAPE[1], n_layer=1, n_head=4, d_model=32, resid_dropout=0.1))
    schedule = optax.constant_schedule(1e-2)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    step = make_train_step(model, optimizer, schedule, mesh)
    state = init_state(model, optimizer, mesh, seed=3)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 1000)
    batches = Batches([TokenSource('', tokens, Fraction(1))], *SHAPE, seed=0, end_of_text=7)
    numbers = []
    for number in range(STEPS):
        batch = global_batch(lambda start, stop, n=number: batches.rows(n, start, stop), SHAPE, mesh)
        state, metrics = step(state, batch)
        numbers += [float(metrics['loss']), float(metrics['grad_norm'])]
    prepared = types.SimpleNamespace(validation=tokens[:200], validation_bytes=200)
    tokenizer = types.SimpleNamespace(token_bytes=lambda _: b'x')
    data = types.SimpleNamespace(prepared={'a': prepared}, weights={'a': 1}, tokenizer=tokenizer)
    values = evaluate(make_eval_step(model, mesh), mesh, state.params, data, *SHAPE)
    jax.block_until_ready(state)
    return [*numbers, values['val_loss']]
