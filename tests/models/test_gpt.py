"""The whole model: against NumPy, by gradient, in both forms of its layers, and under dropout."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from numpy_reference import block, cross_entropy, float64, gpt_logits, mlp

from gpt_jax.errors import InputError
from gpt_jax.models import GPT, GPT2, GPT3, GPTConfig, stack_layers, unstack_layers
from gpt_jax.models.gpt import MLP, Block, TokenInfo

RATES = ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout')


def names(tree):
    return [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in jax.tree.leaves_with_path(tree)]


# Against NumPy.


def test_logits_equal_a_whole_model_in_numpy(logits, params, tokens):
    assert (logits.shape, logits.dtype) == ((2, 20, 300), jnp.float32)
    np.testing.assert_allclose(logits, gpt_logits(params, tokens, 300), rtol=1e-4, atol=1e-4)


def test_an_untied_model_equals_numpy_with_its_own_head(untied, untied_params, tokens, forward):
    logits = forward(untied)(untied_params, tokens)
    np.testing.assert_allclose(logits, gpt_logits(untied_params, tokens, 300), rtol=1e-4, atol=1e-4)


def test_the_padding_of_the_vocabulary_is_invisible(config, params, tokens, logits, forward):
    np.testing.assert_allclose(np.exp(float64(jax.nn.log_softmax(logits))).sum(axis=-1), 1, atol=1e-5)
    loud = params | {'wte': params['wte'].at[300:].set(1e3)}
    np.testing.assert_array_equal(forward(config)(loud, tokens), logits)


def test_explicit_positions_choose_the_rows_of_the_position_table(config, params, tokens):
    shift = 4
    positions = jnp.broadcast_to(jnp.arange(shift, 24), (2, 20))
    logits = quick.jit(lambda p: GPT(config).apply({'params': p}, tokens, positions=positions))(params)
    moved = params | {'wpe': params['wpe'][shift:]}
    np.testing.assert_allclose(logits, gpt_logits(moved, tokens, 300), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('module', 'reference'), [(MLP, mlp), (Block, block)])
def test_a_part_equals_numpy_keeps_the_shape_and_passes_gradients(config, params, module, reference):
    layer = jax.tree.map(lambda array: array[0], params['blocks'])
    layer = layer['mlp'] if module is MLP else layer
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 32), np.float32))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 32), np.float32))

    def summed(layer, x):
        of_block = (0,) if module is Block else ()
        y = module(config).apply({'params': layer}, x, TokenInfo.of(x[..., 0]), *of_block)
        y = y[0] if module is Block else y
        return jnp.sum(weights * y), y

    gradients, y_BTD = quick.jit(jax.grad(summed, argnums=(0, 1), has_aux=True))(layer, x_BTD)
    assert y_BTD.shape == x_BTD.shape
    np.testing.assert_allclose(y_BTD, reference(float64(x_BTD), float64(layer)), rtol=1e-4, atol=1e-4)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient) != 0).mean() > 0.9


# By gradient.


def test_no_logit_depends_on_a_later_token_and_each_on_all_earlier_ones(config, params, tokens):
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(300, np.float32))

    def scores(wpe):
        # A row of `wpe` is added to one token's embedding and to nothing else.
        return GPT(config).apply({'params': params | {'wpe': wpe}}, tokens[:1])[0] @ weights

    jacobian = np.abs(quick.jit(jax.jacrev(scores))(params['wpe'])).max(axis=-1)
    later = np.triu(np.ones((20, 24), bool), 1)
    assert (jacobian[later] == 0).all()
    assert (jacobian[~later] > 1e-6).all()


def test_every_parameter_gets_a_gradient_and_only_rows_that_are_never_used_get_none(gradients):
    assert set(names(gradients)) == {
        'wte', 'wpe', 'ln_f/scale', 'ln_f/bias',
        *(f'blocks/{ln}/{leaf}' for ln in ('ln_1', 'ln_2') for leaf in ('scale', 'bias')),
        *(f'blocks/attention/{dense}/{leaf}' for dense in ('qkv', 'out') for leaf in ('kernel', 'bias')),
        *(f'blocks/mlp/{dense}/{leaf}' for dense in ('up', 'down') for leaf in ('kernel', 'bias')),
    }  # fmt: skip
    for path, gradient in jax.tree.leaves_with_path(gradients['blocks']):
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all(), path
        assert all((layer != 0).mean() > 0.6 for layer in gradient), path
    for gradient in (gradients['ln_f']['scale'], gradients['ln_f']['bias']):
        assert (np.asarray(gradient) != 0).all()
    for table, used in (('wte', 300), ('wpe', 20)):
        gradient = np.asarray(gradients[table])
        assert np.isfinite(gradient).all()
        assert (gradient[:used] != 0).any(axis=-1).all(), table
        np.testing.assert_array_equal(gradient[used:], 0, err_msg=table)


def test_gradients_equal_finite_differences_of_the_model_in_numpy(params, tokens, targets, gradients):
    def mean_loss(leaves):
        tree = jax.tree.unflatten(jax.tree.structure(params), leaves)
        return cross_entropy(gpt_logits(tree, tokens, 300), targets).mean()

    leaves, slopes, step = jax.tree.leaves(float64(params)), jax.tree.leaves(float64(gradients)), 1e-6
    rng = np.random.default_rng(0)
    for index, (name, slope) in enumerate(zip(names(params), slopes, strict=True)):
        direction = rng.standard_normal(slope.shape)
        high, low = (
            mean_loss([*leaves[:index], leaves[index] + sign * step * direction, *leaves[index + 1 :]])
            for sign in (1, -1)
        )
        np.testing.assert_allclose(np.sum(slope * direction), (high - low) / (2 * step), rtol=1e-3, err_msg=name)


def test_a_key_bias_shifts_all_scores_of_a_query_alike_and_so_has_no_gradient(gradients):
    bias_LCNK = np.abs(np.asarray(gradients['blocks']['attention']['qkv']['bias']))
    query, key, value = bias_LCNK.max(axis=(0, 2, 3))
    assert key < 1e-4 * min(query, value)


# Tied and untied heads.


def test_a_tied_table_is_the_embedding_and_the_head(config, params, tokens, logits, forward):
    unused = next(token for token in range(300) if token not in np.asarray(tokens))
    changed = forward(config)(params | {'wte': params['wte'].at[unused].add(1.0)}, tokens)
    others = np.arange(300) != unused
    # As the head: the token's own logit moves, and no other. As the embedding: all move where the token is read.
    assert (changed[..., unused] != logits[..., unused]).all()
    np.testing.assert_array_equal(changed[..., others], logits[..., others])
    used = tokens[0, 5]
    changed = forward(config)(params | {'wte': params['wte'].at[used].add(1.0)}, tokens)
    assert (changed[0, 5] != logits[0, 5]).mean() > 0.9


def test_an_untied_model_has_a_head_of_its_own_and_counts_it(config, untied, tokens):
    tree = jax.eval_shape(GPT(untied).init, jax.random.key(0), tokens)['params']
    assert tree['lm_head'].shape == (384, 32)
    assert untied.num_parameters - config.num_parameters == 300 * 32


# Initialisation.


def test_initialisation_has_the_deviations_of_gpt2():
    config = GPTConfig(vocab_size=1000, block_size=200, n_layer=3, n_head=4, d_model=64, tie_embeddings=False)
    fresh = quick.jit(GPT(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    residual = 0.02 / math.sqrt(2 * config.n_layer)
    deviations = {'wte': 0.02, 'wpe': 0.02, 'lm_head': 0.02}
    for path, array in jax.tree.leaves_with_path(fresh):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if name.endswith('bias'):
            assert (np.asarray(array) == 0).all(), name
        elif name.endswith('scale'):
            assert (np.asarray(array) == 1).all(), name
        else:
            expected = residual if name.endswith(('out/kernel', 'down/kernel')) else deviations.get(name, 0.02)
            parts = array if name.startswith('blocks') else [array]
            for part in parts:
                assert abs(np.std(part) / expected - 1) < 0.05, name
                assert abs(np.mean(part)) < 0.05 * expected, name
            for first in range(len(parts)):
                for second in range(first):
                    correlation = np.corrcoef(np.ravel(parts[first]), np.ravel(parts[second]))[0, 1]
                    assert abs(correlation) < 0.1, name
    assert abs(np.corrcoef(np.ravel(fresh['wte']), np.ravel(fresh['lm_head']))[0, 1]) < 0.1


def test_initialisation_follows_its_rng_and_not_the_tokens(config, fresh, tokens):
    init = quick.jit(GPT(config).init)
    again, other = init(jax.random.key(0), tokens)['params'], init(jax.random.key(1), tokens)['params']
    jax.tree.map(np.testing.assert_array_equal, again, fresh)
    for name in ('wte', 'wpe'):
        assert (np.asarray(other[name]) != np.asarray(fresh[name])).mean() > 0.99
    kernel = ('blocks', 'attention', 'qkv', 'kernel')
    assert (functools.reduce(dict.get, kernel, other) != functools.reduce(dict.get, kernel, fresh)).mean() > 0.99


# Scanned and unrolled layers.


def test_scanned_and_unrolled_layers_are_one_function_in_one_tree(
    config, fresh, params, tokens, targets, logits, gradients, forward
):
    scanned = GPT(dataclasses.replace(config, scan_layers=True))
    made = quick.jit(scanned.init)(jax.random.key(0), tokens)['params']
    jax.tree.map(np.testing.assert_array_equal, made, fresh)
    np.testing.assert_allclose(forward(scanned.config)(params, tokens), logits, atol=1e-5)

    def mean_loss(p):
        return scanned.apply({'params': p}, tokens, targets, method='token_losses').mean()

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, quick.jit(jax.grad(mean_loss))(params), gradients)
    for model in (scanned, GPT(config)):
        jaxpr = str(jax.make_jaxpr(lambda model=model: model.apply({'params': params}, tokens))())
        assert ('scan[' in jaxpr) == model.config.scan_layers


def test_scanned_and_unrolled_layers_drop_the_same_elements(config, params, tokens, logits, forward):
    config = dataclasses.replace(config, **dict.fromkeys(RATES, 0.3))
    scanned = dataclasses.replace(config, scan_layers=True)
    unrolled = forward(config)(params, tokens, jax.random.key(3))
    np.testing.assert_allclose(forward(scanned)(params, tokens, jax.random.key(3)), unrolled, atol=1e-5)
    assert np.abs(unrolled - logits).max() > 0.1


@pytest.mark.parametrize('scan_layers', [False, True])
def test_apply_takes_unstacked_layers(config, params, tokens, logits, scan_layers, forward):
    config = dataclasses.replace(config, scan_layers=scan_layers)
    np.testing.assert_allclose(forward(config)(unstack_layers(params), tokens), logits, atol=1e-5)


def test_unstacking_gives_each_layer_its_slice_and_stacking_undoes_it(params):
    unstacked = unstack_layers(params)
    assert len(unstacked['blocks']) == 2
    for index, layer in enumerate(unstacked['blocks']):
        np.testing.assert_array_equal(layer['mlp']['up']['kernel'], params['blocks']['mlp']['up']['kernel'][index])
    restored = stack_layers(unstacked)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)


# Precision, input, factories.


@pytest.mark.parametrize(('compute_dtype', 'atol'), [('bf16', 0.06), ('fp16', 0.01)])
def test_half_precision_is_close_and_leaves_parameters_logits_and_losses_float32(
    config, fresh, params, tokens, targets, logits, token_losses, compute_dtype, atol
):
    model = GPT(dataclasses.replace(config, compute_dtype=compute_dtype))
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype('float32')}

    @quick.jit
    def both(p):
        losses = model.apply({'params': p}, tokens, targets, method='token_losses')
        return model.apply({'params': p}, tokens), losses

    half, losses = both(params)
    assert (half.dtype, losses.dtype) == (jnp.float32, jnp.float32)
    assert 0 < np.abs(half - logits).max() < atol * np.abs(logits).max()
    np.testing.assert_allclose(losses, token_losses(params), atol=atol * np.abs(logits).max())


@pytest.mark.parametrize('method', ['__call__', 'token_losses'])
def test_an_input_longer_than_the_model_is_refused_with_both_numbers(config, params, method):
    long = jnp.zeros((1, 25), jnp.int32)
    inputs = (long,) if method == '__call__' else (long, long)
    with pytest.raises(InputError, match=r'25 tokens.*block_size=24') as caught:
        GPT(config).apply({'params': params}, *inputs, method=method)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('factory', 'pattern'), [(GPT2, 'dense'), (GPT3, 'alternating')])
def test_a_factory_takes_the_names_of_the_suite(factory, pattern):
    sizes = {'vocab_size': 300, 'block_size': 24, 'n_layer': 2, 'n_head': 4, 'd_model': 32}
    plain = factory(**sizes)
    assert isinstance(plain, GPT)
    assert plain.config == GPTConfig(**sizes, attention_pattern=pattern)
    assert factory(*sizes.values()).config == plain.config
    one_rate = factory(**sizes, dropout=0.1).config
    assert [getattr(one_rate, rate) for rate in RATES] == [0.1] * 4
    changed = factory(**sizes, dropout=0.1, resid_dropout=0.2, mlp_expansion=3).config
    assert [getattr(changed, rate) for rate in RATES] == [0.1, 0.1, 0.1, 0.2]
    assert changed.mlp_expansion == 3


def test_factories_are_checked_as_configs_are():
    with pytest.raises(InputError, match=r'model\.embedding_dropout=1\.5'):
        GPT2(300, 24, 2, 4, 32, dropout=1.5)
