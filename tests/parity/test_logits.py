"""Logits and gradients of random models, against PyTorch's."""

import pytest

REASON = "compares with PyTorch: pip install -e '.[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
pytest.importorskip('transformers', reason=REASON)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402

from gpt_jax.models import GPT  # noqa: E402

GPT2 = {
    'tied head, 300 tokens padded to 384': {},
    'untied head': {'tie_word_embeddings': False},
    'a vocabulary without padding': {'vocab_size': 256},
    'one layer, one head, a narrow MLP': {'n_layer': 1, 'n_head': 1, 'n_inner': 64},
    '4 layers of 96, 200 tokens of context': {'n_layer': 4, 'n_embd': 96, 'n_head': 6, 'n_positions': 200},
    'unscaled attention': {'scale_attn_weights': False},
    'another epsilon': {'layer_norm_epsilon': 1e-3},
}
GPT_NEO = {
    'global and local in turn': {},
    'an odd number of layers': {'kinds': ('global', 'local', 'global')},
    'all global': {'kinds': ('global', 'global')},
    'a window of 70 in 200 tokens': {'max_position_embeddings': 200, 'window_size': 70},
    'untied head': {'tie_word_embeddings': False},
}
DIFFERENTIATED = [*list(GPT2)[:2], *list(GPT_NEO)[:2], 'a window of 70 in 200 tokens']


def each(gpt2, gpt_neo):
    cases = [
        *(pytest.param(peers.gpt2, gpt2[name], name, id=f'gpt2-{name}') for name in gpt2),
        *(pytest.param(peers.gpt_neo, gpt_neo[name], name, id=f'gpt_neo-{name}') for name in gpt_neo),
    ]
    return pytest.mark.parametrize(('make', 'changes', 'name'), cases)


every_model = each(GPT2, GPT_NEO)
some_models = each(*({name: all_[name] for name in all_ if name in DIFFERENTIATED} for all_ in (GPT2, GPT_NEO)))


def cross_entropy(model, tokens_BT, targets_BT):
    logits = model(torch.from_numpy(tokens_BT).long()).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets_BT).long().flatten())


@every_model
def test_logits_are_those_of_transformers(make, changes, name, loaded, tokens, fidelity):
    peer = make(**changes)
    config, params = loaded(peer)
    tokens_BT = tokens(config, time=config.block_size)
    with torch.no_grad():
        expected = peer(torch.from_numpy(tokens_BT).long()).logits.numpy()
    logits = jax.jit(lambda p: GPT(config).apply({'params': p}, tokens_BT))(params)
    assert logits.shape == expected.shape
    fidelity(f'logits: {name}', type(peer).__name__, np.abs(logits - expected).max(), 1e-4)


@some_models
def test_the_gradient_of_every_parameter_is_pytorchs(make, changes, name, loaded, tokens, fidelity):
    peer = make(**changes)
    config, params = loaded(peer)
    tokens_BT, targets_BT = (tokens(config, time=config.block_size, seed=seed) for seed in (0, 1))
    cross_entropy(peer, tokens_BT, targets_BT).backward()
    expected = peers.tree(peer, of=lambda parameter: parameter.grad)

    def loss(p):
        return GPT(config).apply({'params': p}, tokens_BT, targets_BT, method='token_losses').mean()

    gradients = jax.jit(jax.grad(loss))(params)
    errors = jax.tree.map(lambda ours, theirs: np.abs(np.asarray(ours) - theirs).max(), gradients, expected)
    # A layer that got no gradient on either side would agree for nothing.
    assert all(np.abs(theirs).max() > 1e-4 for theirs in jax.tree.leaves(expected))
    fidelity(f'gradients: {name}', type(peer).__name__, max(jax.tree.leaves(errors)), 1e-4)


@every_model
def test_parameters_are_those_of_the_model_that_was_saved(make, changes, name, loaded):
    peer = make(**changes)
    config, params = loaded(peer)
    expected = peers.tree(peer)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
