"""Random models of `transformers`, written to disk and read by gpt_jax; the figures of docs/FIDELITY.md."""

import numpy as np
import pytest


@pytest.fixture
def loaded(tmp_path):
    """A function: a model of transformers -> config and params, by way of its saved directory."""
    from gpt_jax.models import huggingface

    def load(model, **options):
        model.save_pretrained(tmp_path / 'hf', **options)
        return huggingface.load(tmp_path / 'hf')

    return load


@pytest.fixture
def fidelity():
    """A function: what, against whom, the largest error and its level -> printed with -s, and checked."""

    def check(what, peer, error, level):
        print(f'\nfidelity: | {what} | {peer} | {error:.1e} | {level:.0e} |')
        assert error <= level, f'{what}: {error} against {peer}'

    return check


@pytest.fixture
def tokens():
    """A function: a config, batch, time -> random token ids."""

    def make(config, batch=2, time=20, seed=0):
        return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time), np.int32)

    return make
