"""A small random model for searches, and the same one as functions of whole texts, without a cache."""

import functools
import types

import numpy as np
import pytest

SIZES = {'n_layer': 2, 'n_head': 2, 'd_model': 32, 'attention_pattern': 'alternating', 'band_size': 5}


@pytest.fixture(scope='session')
def searched():
    """`engine`, of 24 tokens and bands of 5; `forward`, a text -> log-probabilities and hidden states [time, ...]."""
    import jax
    import jax.numpy as jnp
    from numpy_search import log_softmax

    from gpt_jax.inference import Engine
    from gpt_jax.models import GPT, GPTConfig

    model = GPT(GPTConfig(24, 64, **SIZES))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32), params)

    @jax.jit
    def apply(tokens_BT):
        logits, captured = model.apply(
            {'params': params}, tokens_BT, capture_intermediates=lambda module, _: module.name == 'ln_f'
        )
        return logits[0], captured['intermediates']['ln_f']['__call__'][0][0]

    @functools.cache
    def forward(tokens):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        logits, hidden = apply(padded)
        return log_softmax(logits)[: len(tokens)], np.asarray(hidden, np.float64)[: len(tokens)]

    return types.SimpleNamespace(
        engine=Engine(model, params),
        forward=lambda tokens: forward(tuple(tokens)),
        next_logprobs=lambda tokens: forward(tuple(tokens))[0][-1],
        prompts=[rng.integers(0, 24, length).tolist() for length in (3, 11, 6)],
    )
