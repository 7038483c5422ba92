"""The variants that GPT-2's and GPT-Neo's config.json can ask for: read, run in every way, trained and written."""

import pytest

REASON = "compares with transformers: pip install -e '.[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
transformers = pytest.importorskip('transformers', reason=REASON)

import dataclasses  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import peers  # noqa: E402

from gpt_jax.models import GPT, huggingface  # noqa: E402
from gpt_jax.models.config import ACTIVATIONS  # noqa: E402
from gpt_jax.models.huggingface import SYNONYMS  # noqa: E402

BY_LAYER = {'scale_attn_by_inverse_layer_idx': True, 'n_layer': 3}
ALL_AT_ONCE = BY_LAYER | {'n_inner': 52, 'activation_function': 'relu', 'scale_attn_weights': False}
CASES = {
    'gpt2-an MLP of 52, ReLU, unscaled but by the layer, untied head': (
        peers.gpt2,
        ALL_AT_ONCE | {'layer_norm_epsilon': 1e-3, 'tie_word_embeddings': False},
    ),
    'gpt2-an MLP of 52 for a width of 32': (peers.gpt2, {'n_inner': 52}),
    'gpt2-scores scaled by the layer': (peers.gpt2, BY_LAYER),
    'gpt2-exact GELU': (peers.gpt2, {'activation_function': 'gelu'}),
    'gpt2-reordered and upcast attention': (
        peers.gpt2,
        {'reorder_and_upcast_attn': True, 'attn_implementation': 'eager'},
    ),
    'gpt_neo-an MLP of 52 and SiLU': (peers.gpt_neo, {'intermediate_size': 52, 'activation_function': 'swish'}),
}


@pytest.mark.parametrize(
    ('make', 'changes', 'name'),
    [
        pytest.param(
            *case,
            name,
            id=name,
            marks=[] if name == 'gpt2-an MLP of 52, ReLU, unscaled but by the layer, untied head' else pytest.mark.slow,
        )
        for name, case in CASES.items()
    ],
)
def test_a_variant_is_that_of_transformers_in_training_decoding_and_when_exported(
    make, changes, name, loaded, tokens, fidelity, tmp_path
):
    peer, name = make(**changes), name.partition('-')[2]
    config, params = loaded(peer)
    tokens_BT, targets_BT = (tokens(config, time=config.block_size, seed=seed) for seed in (0, 1))
    theirs = peer(torch.from_numpy(tokens_BT).long()).logits
    targets = torch.from_numpy(targets_BT).long().flatten()
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets).backward()
    expected, of_pytorch = theirs.detach().numpy(), peers.tree(peer, of=lambda parameter: parameter.grad)

    @jax.jit
    def run(params):
        def loss(params, config):
            return GPT(config).apply({'params': params}, tokens_BT, targets_BT, method='token_losses').mean()

        scanned = dataclasses.replace(config, scan_layers=True)
        gradients = [jax.grad(loss)(params, config) for config in (config, scanned)]
        # In decoding: a prompt of 7 tokens, then the rest over the cache.
        model, order = GPT(config), jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        cache = model.init_cache(2, config.block_size)
        whole = model.apply({'params': params}, tokens_BT)
        first, cache = model.apply({'params': params}, tokens_BT[:, :7], jnp.array([7, 7]), cache, method='prefill')
        rest, _ = model.apply({'params': params}, tokens_BT[:, 7:], cache=cache, positions=order[:, 7:])
        return whole, first, rest, gradients

    whole, first, rest, gradients = run(params)
    error = max(np.abs(ours - expected[:, part]).max() for ours, part in ((whole, slice(None)), (rest, slice(7, None))))
    fidelity(f'logits: {name}', type(peer).__name__, max(error, np.abs(first - expected[:, 6]).max()), 1e-4)
    errors = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), gradients, [of_pytorch, of_pytorch])
    assert all(np.abs(gradient).max() > 1e-5 for gradient in jax.tree.leaves(of_pytorch))
    fidelity(f'gradients: {name}', type(peer).__name__, max(jax.tree.leaves(errors)), 1e-4)

    huggingface.save(tmp_path / 'back', config, params)
    assert huggingface.read_config(tmp_path / 'back') == config
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back')
    with torch.no_grad():
        error = np.abs(back(torch.from_numpy(tokens_BT).long()).logits.numpy() - expected).max()
    fidelity(f'logits of the export: {name}', type(peer).__name__, error, 1e-5)


@pytest.mark.parametrize('name', [*ACTIVATIONS, *SYNONYMS])
def test_an_activation_and_its_gradient_are_those_of_transformers(name):
    x = np.concatenate([np.linspace(-9, 9, 1000), [-300.0, 300.0]]).astype(
        np.float32
    )  # not at 0, where some have a kink
    peer = torch.tensor(x, requires_grad=True)
    theirs = transformers.activations.get_activation(name)(peer)
    theirs.sum().backward()
    ours, pull = jax.vjp(ACTIVATIONS[SYNONYMS.get(name, name)], jnp.asarray(x))
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(ours))[0], peer.grad, rtol=1e-5, atol=1e-5)
