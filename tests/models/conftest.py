"""One tiny model, its parameters and some tokens, made once for the whole folder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gpt_jax.models import GPT, GPTConfig


def perturbed(params, seed=1, size=0.1):
    """Noise on every array: a fresh model has zero biases and unit scales, which hide what is left out or swapped."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda array: array + size * rng.standard_normal(array.shape, np.float32), params)


@pytest.fixture(scope='session')
def config():
    # 300 tokens in tables of 384 rows; no two dimensions are equal, so that none can stand for another.
    return GPTConfig(vocab_size=300, block_size=24, n_layer=2, n_head=4, d_model=32)


@pytest.fixture(scope='session')
def tokens():
    return jnp.asarray(np.random.default_rng(10).integers(0, 300, (2, 20), np.int32))


@pytest.fixture(scope='session')
def targets():
    return jnp.asarray(np.random.default_rng(11).integers(0, 300, (2, 20), np.int32))


@pytest.fixture(scope='session')
def fresh(config):
    """Parameters as `init` makes them."""
    return quick.jit(GPT(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']


@pytest.fixture(scope='session')
def params(fresh):
    """Parameters as training might leave them: nothing is zero or one."""
    return perturbed(fresh)


@pytest.fixture(scope='session')
def untied(config):
    return dataclasses.replace(config, tie_embeddings=False)


@pytest.fixture(scope='session')
def untied_params(params):
    return params | {'lm_head': params['wte'][::-1]}


@pytest.fixture(scope='session')
def forward():
    """Compiled, once a config: parameters, tokens and a dropout key or None -> logits."""

    @functools.cache
    def compiled(config):
        def apply(params, tokens, key=None):
            return GPT(config).apply({'params': params}, tokens, rngs={} if key is None else {'dropout': key})

        return quick.jit(apply)

    return compiled


@pytest.fixture(scope='session')
def logits(config, params, tokens, forward):
    return forward(config)(params, tokens)


@pytest.fixture(scope='session')
def token_losses(config, tokens, targets):
    """Compiled: parameters -> losses [batch, time]."""
    return quick.jit(lambda p: GPT(config).apply({'params': p}, tokens, targets, method='token_losses'))


@pytest.fixture(scope='session')
def gradients(config, params, tokens, targets):
    """Of the mean loss, by `token_losses`."""

    def mean_loss(p):
        return GPT(config).apply({'params': p}, tokens, targets, method='token_losses').mean()

    return quick.jit(jax.grad(mean_loss))(params)
