"""Tiny models, states and compiled steps, made once for the whole folder."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

from gpt_jax.config import OptimizerConfig
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import MeshConfig, batch_sharding, make_mesh
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.step import StepSettings, abstract_state, init_state, make_train_step

VOCAB, BLOCK = 50, 16
LEARNING_RATE = 1e-2
OPTIMIZER = OptimizerConfig(LEARNING_RATE, 0.9, 0.95, 1e-8, 0.1, 1.0)
RATES = ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout')


class Lab:
    """A compiled training step on one mesh, with states and batches for it."""

    def __init__(self, mesh, accumulation_steps, dropout, seed, precision, settings, moments, multipliers):
        rates = dict.fromkeys(RATES, dropout)
        self.model = GPT(GPTConfig(VOCAB, BLOCK, n_layer=2, n_head=2, d_model=32, compute_dtype=precision, **rates))
        devices = jax.devices()[: int(np.prod(mesh))]
        self.mesh = make_mesh(MeshConfig(*mesh), devices=devices)
        schedule = optax.constant_schedule(LEARNING_RATE)
        self.settings = StepSettings(**dict(settings), multipliers=multipliers)
        self.optimizer = make_optimizer(
            dataclasses.replace(OPTIMIZER, multipliers=multipliers), schedule, moments, seed
        )
        self.step = make_train_step(
            self.model, self.optimizer, schedule, self.mesh, accumulation_steps, seed, self.settings
        )
        self._abstract = abstract_state(self.model, self.optimizer, self.mesh, self.settings)

    def state(self):
        """Before step 0; the same on every mesh."""
        state, (spikes, ema) = first_state(), (self._abstract.spikes, self._abstract.ema)
        state = state.replace(
            loss_scale=DynamicScale() if self.model.config.compute_dtype == 'fp16' else None,
            spikes=jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spikes),
            ema=None if ema is None else state.params,
        )
        described, structure = jax.tree.flatten(self._abstract)
        leaves = zip(jax.tree.leaves(state), described, strict=True)
        return structure.unflatten(
            [jax.device_put(np.asarray(leaf, wanted.dtype), wanted.sharding) for leaf, wanted in leaves]
        )

    def put(self, batch):
        """Arrays [batch, time] on the devices of the mesh, as a step takes them."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def batch(self, index=0):
        """Learnable: the next token is a function of the one before."""
        tokens = ((np.arange(BLOCK + 1) + 5) * np.arange(1, 9)[:, None] + index) % VOCAB
        return self.put({'tokens': tokens[:, :-1].astype(np.int32), 'targets': tokens[:, 1:].astype(np.int32)})

    def run(self, steps):
        """The state after `steps` steps, and the metrics of each as floats."""
        state, rows = self.state(), []
        for index in range(steps):
            state, metrics = self.step(state, self.batch(index))
            rows.append({name: value.item() for name, value in metrics.items()})
        return state, rows


@functools.cache
def first_state():
    """On the host, so that a mesh can take it without compiling an initialisation of its own."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    model = GPT(GPTConfig(VOCAB, BLOCK, n_layer=2, n_head=2, d_model=32))
    state = init_state(model, make_optimizer(OPTIMIZER, optax.constant_schedule(LEARNING_RATE)), mesh, seed=3)
    return jax.device_get(state)


@pytest.fixture(scope='session')
def lab():
    """A function that gives the Lab for a mesh (data, fsdp, tensor, context), compiled once."""

    @functools.cache
    def make(
        mesh=(1, 1, 1, 1),
        accumulation_steps=1,
        dropout=0.0,
        seed=0,
        precision='f32',
        settings=(),
        moments='f32',
        multipliers=None,
    ):
        """`settings` are pairs of what StepSettings takes."""
        return Lab(mesh, accumulation_steps, dropout, seed, precision, settings, moments, multipliers)

    return make


@pytest.fixture(scope='session')
def assert_close():
    """Trees of the same structure, and every array near its counterpart."""

    def check(tree, expected, **tolerances):
        flat = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), wanted in zip(flat, jax.tree.leaves(expected), strict=True):
            name = jax.tree_util.keystr(path)
            np.testing.assert_allclose(np.asarray(leaf), np.asarray(wanted), err_msg=name, **tolerances)

    return check


@pytest.fixture(scope='session')
def assert_same_bits():
    """Trees of the same structure, and every array its counterpart to the bit."""

    def check(tree, expected):
        flat = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), wanted in zip(flat, jax.tree.leaves(expected), strict=True):
            assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), jax.tree_util.keystr(path)

    return check


@pytest.fixture(scope='session')
def two_steps(tiny_config, tmp_path_factory):
    """The workdir of a finished run with checkpoints of steps 3 and 6. Copied before it is changed."""
    from gpt_jax.training import train

    workdir = tmp_path_factory.mktemp('two') / 'run'
    train(tiny_config({'checkpoint.keep_latest': 2}), workdir)
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['3', '6']
    return workdir
