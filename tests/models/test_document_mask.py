"""Several documents in one row, kept apart, against a forward pass of each on its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gpt_jax.models import GPT

LENGTHS = (7, 1, 8, 4)  # 20 tokens
DOCUMENTS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None]
POSITIONS = np.concatenate([np.arange(length) for length in LENGTHS])[None]
INFO = {'positions': jnp.asarray(POSITIONS), 'documents': jnp.asarray(DOCUMENTS)}

# Dense and banded layers in turn, scanned and made again in the backward pass; and the code of attention dropout, which
# keeps everything at 1 - 1e-9, that being 1 in float32.
BANDED = {'attention_pattern': 'alternating', 'band_size': 3}
FORMS = {
    'fused': BANDED | {'scan_layers': True, 'remat': 'full'},
    'dropout': BANDED | {'attention_dropout': 1e-9},
}


def apart(row_1T):
    """[1, 20] -> [4, 8]: each document in a row of its own; what fills the rows up comes after it, unseen by it."""
    return jnp.zeros((4, 8), row_1T.dtype).at[DOCUMENTS[0], POSITIONS[0]].set(row_1T[0])


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
def test_a_packed_row_gives_the_losses_and_gradients_of_separate_forward_passes(form, config, params, tokens, targets):
    model = GPT(dataclasses.replace(config, **FORMS[form]))
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20), np.float32))

    def weighted(losses, weights):
        return (losses * weights).sum(), losses

    def packed(p):
        rngs = {'dropout': jax.random.key(0)} if model.config.attention_dropout else {}
        arrays = (tokens[:1], targets[:1])
        return weighted(model.apply({'params': p}, *arrays, method='token_losses', rngs=rngs, **INFO), weights)

    def separate(p):
        arrays = (apart(tokens[:1]), apart(targets[:1]))
        return weighted(model.apply({'params': p}, *arrays, method='token_losses'), apart(weights))

    (_, losses), gradients = quick.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (_, expected), expected_gradients = quick.jit(jax.value_and_grad(separate, has_aux=True))(params)
    np.testing.assert_allclose(losses[0], expected[DOCUMENTS[0], POSITIONS[0]], rtol=1e-4, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), gradients, expected_gradients)


def test_each_row_has_documents_of_its_own(config, params, tokens, forward):
    # The same text twice: whole in the first row, cut in the second.
    both = jnp.concatenate([tokens[:1], tokens[:1]])
    documents = jnp.asarray(np.concatenate([np.zeros_like(DOCUMENTS), DOCUMENTS]))
    positions = jnp.asarray(np.concatenate([np.arange(20)[None], POSITIONS]))
    packed = quick.jit(lambda p: GPT(config).apply({'params': p}, both, positions=positions, documents=documents))(
        params
    )
    whole = forward(config)(params, both)
    np.testing.assert_allclose(packed[0], whole[0], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(packed[1, :7], whole[1, :7], rtol=1e-4, atol=2e-5)
    assert np.abs(packed[1, 7:] - whole[1, 7:]).max(axis=-1).min() > 1e-3


def test_a_cache_takes_no_documents(config, params, tokens):
    cache = GPT(config).init_cache(2, 24)
    with pytest.raises(ValueError, match='takes no documents='):
        GPT(config).apply({'params': params}, tokens, cache=cache, positions=tokens, documents=tokens)
