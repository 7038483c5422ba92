"""Ten steps of training on every mix of the four axes: the losses of one device, dropout and all."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import optax
import pytest

from gpt_jax.config import MeshConfig, OptimizerConfig
from gpt_jax.data import document_positions
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import global_batch, make_mesh
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.step import init_state, make_train_step

VOCAB, SHAPE, STEPS = 50, (8, 32), 10
DROPOUT = dict.fromkeys(('embedding_dropout', 'mlp_dropout', 'resid_dropout'), 0.1)
# A band that reaches over three devices where time is split over eight; 8 heads, so that each axis can have 8 devices.
CONFIG = GPTConfig(
    VOCAB, SHAPE[1], n_layer=2, n_head=8, d_model=32, attention_pattern='alternating', band_size=10, **DROPOUT
)
MODELS = {
    'alternating': CONFIG,
    'dense': dataclasses.replace(
        CONFIG, attention_pattern='dense', scan_layers=True, remat='names', scale_attn_by_inverse_layer_idx=True
    ),
    'untied': dataclasses.replace(CONFIG, tie_embeddings=False, remat='full'),
    'attention dropout': dataclasses.replace(CONFIG, attention_dropout=0.1),
}
OPTIMIZER = OptimizerConfig(1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0)
MIXES = [
    sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) in (2, 4, 8)
]


@functools.cache
def tokens(documents):
    """The batches of all steps, as numpy arrays."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(STEPS):
        # The next token follows from the one before, most often: there is something to learn.
        rows = np.cumsum(rng.choice((3, 5), (SHAPE[0], SHAPE[1] + 1), p=(0.9, 0.1)), axis=1) % VOCAB
        batch = {'tokens': rows[:, :-1].astype(np.int32), 'targets': rows[:, 1:].astype(np.int32)}
        if documents:
            batch |= zip(('positions', 'documents'), document_positions(batch['tokens'], end_of_text=7), strict=True)
        batches.append(batch)
    return batches


@functools.cache
def losses(model, sizes=(1, 1, 1, 1), documents=False, accumulation_steps=1):
    """Of each step on a mesh of (data, fsdp, tensor, context)."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    schedule = optax.constant_schedule(OPTIMIZER.learning_rate)
    optimizer, model = make_optimizer(OPTIMIZER, schedule), GPT(MODELS[model])
    step = make_train_step(model, optimizer, schedule, mesh, accumulation_steps)
    state, found = init_state(model, optimizer, mesh, seed=3), []
    for batch in tokens(documents):
        rows = global_batch(
            lambda start, stop, batch=batch: {name: array[start:stop] for name, array in batch.items()}, SHAPE, mesh
        )
        state, metrics = step(state, rows)
        found.append(metrics['loss'].item())
    return found
