import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.data import document_positions
from gpt_jax.errors import InputError
from gpt_jax.parallel import MeshConfig, devices, make_mesh
from gpt_jax.parallel.devices import memory_of
from gpt_jax.training import resolve
from gpt_jax.training.recipe import model_config
from gpt_jax.training.step import CPU_OPTIONS, OVERFLOW, check_memory, compiler_options, make_eval_step


def numpy_losses(model, params, batch):
    """Cross-entropy of each target from the logits, in float64: [batch, time]."""
    logits = np.asarray(model.apply({'params': params}, batch['tokens']), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, np.asarray(batch['targets'])[..., None], -1)[..., 0]


def test_the_loss_is_the_mean_cross_entropy_before_the_step(lab):
    one = lab()
    expected = numpy_losses(one.model, one.state().params, one.batch()).mean()
    _, metrics = one.step(one.state(), one.batch())
    assert metrics['loss'].item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_norm_is_that_of_all_gradients_before_clipping(lab):
    one = lab()

    def mean_loss(params):
        logits = one.model.apply({'params': params}, one.batch()['tokens'])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), one.batch()['targets'][..., None], -1).mean()

    gradients = jax.tree.leaves(jax.jit(jax.grad(mean_loss))(one.state().params))
    expected = np.sqrt(sum((np.asarray(gradient, np.float64) ** 2).sum() for gradient in gradients))
    assert expected > 1.0  # the clip's bound
    _, metrics = one.step(one.state(), one.batch())
    assert metrics['grad_norm'].item() == pytest.approx(expected, rel=1e-4)


def test_four_micro_batches_are_one_large_batch(lab, assert_close):
    state, rows = lab(accumulation_steps=4).run(1)
    expected, expected_rows = lab().run(1)
    assert rows[0]['loss'] == pytest.approx(expected_rows[0]['loss'], rel=1e-6)
    assert rows[0]['grad_norm'] == pytest.approx(expected_rows[0]['grad_norm'], rel=1e-5)
    # Adam's first moment is the clipped gradient times 0.1: it shows what rounding does not turn over. The parameters
    # of a first step do, since Adam divides each gradient by its own size.
    assert_close(state.opt_state[1].mu, expected.opt_state[1].mu, atol=1e-6)


@pytest.mark.slow
def test_documents_of_a_batch_are_kept_apart_on_a_mesh_and_in_micro_batches(lab):
    one = lab(mesh=(2, 1, 2, 2), accumulation_steps=2)
    tokens, targets = (np.asarray(one.batch()[name]) for name in ('tokens', 'targets'))
    positions, documents = document_positions(tokens, end_of_text=int(tokens[0, 5]))
    assert documents.max() > 0
    batch = {'tokens': tokens, 'targets': targets, 'positions': positions, 'documents': documents}
    info = {'positions': positions, 'documents': documents}
    apply = jax.jit(lambda p, **info: one.model.apply({'params': p}, tokens, targets, **info, method='token_losses'))
    # Larger than a fresh model's, whose attention hardly tells tokens apart.
    state = one.state().replace(params=jax.tree.map(lambda array: 4 * array, one.state().params))
    params = jax.device_get(state.params)
    expected = apply(params, **info).mean().item()
    assert abs(expected - apply(params).mean().item()) > 1e-3  # the mask matters here
    weights = {'weights': np.ones(tokens.shape, np.float32)}
    evaluated = make_eval_step(one.model, one.mesh)(state.params, one.put(batch | weights))
    assert evaluated['loss'].item() / tokens.size == pytest.approx(expected, rel=1e-5)
    _, metrics = one.step(state, one.put(batch))
    assert metrics['loss'].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ('mesh', 'accumulation_steps'),
    [((8, 1, 1, 1), 1), ((1, 8, 1, 1), 1), ((2, 2, 1, 1), 2), ((1, 2, 2, 2), 1)],
    ids=['data', 'fsdp', 'data x fsdp, two micro-batches', 'fsdp x tensor x context'],
)
def test_many_devices_take_the_same_steps_as_one(lab, assert_close, mesh, accumulation_steps):
    state, rows = lab(mesh=mesh, accumulation_steps=accumulation_steps).run(3)
    expected, expected_rows = lab().run(3)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5)
    assert_close(state.opt_state[1].mu, expected.opt_state[1].mu, atol=1e-5)
    assert_close(state.params, expected.params, atol=2e-4)


def test_parameters_and_moments_are_split_on_fsdp_and_stay_so(lab):
    split = lab(mesh=(1, 8, 1, 1))
    state, _ = split.step(split.state(), split.batch())
    kernel = state.params['blocks']['mlp']['up']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    for moment in (state.opt_state[1].mu, state.opt_state[1].nu):
        for leaf, parameter in zip(jax.tree.leaves(moment), jax.tree.leaves(state.params), strict=True):
            assert leaf.sharding == parameter.sharding


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_alone(lab):
    def loss(seed, step):
        one = lab(dropout=0.5, accumulation_steps=2, seed=seed)
        _, metrics = one.step(one.state().replace(step=jnp.asarray(step)), one.batch())
        return metrics['loss'].item()

    assert loss(seed=0, step=7) == loss(seed=0, step=7)
    assert len({loss(seed=0, step=7), loss(seed=0, step=8), loss(seed=1, step=7)}) == 3


def test_micro_batches_draw_masks_of_their_own(lab):
    one = lab(dropout=0.5, accumulation_steps=2)

    def loss(first, second):
        # One row in every place of the first micro-batch, another in every place of the second one.
        batch = jax.tree.map(lambda array: array[jnp.array([first, second] * 4)], one.batch())
        _, metrics = one.step(one.state(), batch)
        return metrics['loss'].item()

    # Under the same masks it would not matter which row goes first.
    assert loss(2, 5) != pytest.approx(loss(5, 2), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(('mesh', 'accumulation_steps'), [((1, 1, 1, 1), 2), ((8, 1, 1, 1), 1), ((2, 2, 1, 1), 2)])
def test_dropout_is_the_same_on_any_number_of_devices_and_micro_batches(lab, assert_close, mesh, accumulation_steps):
    state, rows = lab(mesh=mesh, accumulation_steps=accumulation_steps, dropout=0.3).run(2)
    expected_state, expected_rows = lab(dropout=0.3).run(2)
    assert rows[0]['loss'] == pytest.approx(expected_rows[0]['loss'], rel=1e-5)
    assert rows[0]['grad_norm'] == pytest.approx(expected_rows[0]['grad_norm'], rel=1e-4)
    assert_close(state.params, expected_state.params, rtol=1e-2, atol=1e-4)


def test_it_learns_one_batch_by_heart(lab):
    one = lab()
    state, batch = one.state(), one.batch()
    for _ in range(150):
        state, metrics = one.step(state, batch)
        if (loss := metrics['loss'].item()) < 0.1:
            return
    pytest.fail(f'loss {loss} after 150 steps')


def test_the_given_state_is_donated(lab):
    one = lab()
    state = one.state()
    one.step(state, one.batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


@pytest.mark.slow
@pytest.mark.parametrize(('precision', 'accumulation_steps'), [('bf16', 1), ('fp16', 2)])
def test_half_precision_is_close_to_f32(lab, precision, accumulation_steps):
    state, rows = lab(precision=precision, accumulation_steps=accumulation_steps).run(10)
    _, expected = lab().run(10)
    assert rows[0]['grad_norm'] == pytest.approx(expected[0]['grad_norm'], rel=0.02)
    for row, expected_row in zip(rows, expected, strict=True):
        assert row['loss'] == pytest.approx(expected_row['loss'], rel=0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


def test_only_fp16_has_a_loss_scale(lab):
    _, rows = lab(precision='fp16', accumulation_steps=2).run(1)
    plain = {'loss', 'grad_norm', 'learning_rate', 'skipped_steps', 'skipped_in_a_row', 'skip_reason'}
    assert set(rows[0]) == plain | {'loss_scale'}
    assert rows[0]['loss_scale'] > 1
    assert rows[0]['skipped_steps'] == 0
    _, rows = lab().run(1)
    assert set(rows[0]) == plain


def test_an_overflow_under_fp16_changes_nothing_but_the_scale(lab, assert_same_bits):
    one = lab(precision='fp16', accumulation_steps=2)
    scale = 2.0**120
    before, untouched = one.state(), one.state()
    huge = before.loss_scale.replace(scale=jnp.asarray(scale, jnp.float32))
    after, metrics = one.step(before.replace(loss_scale=huge), one.batch())
    assert_same_bits(after.params, untouched.params)
    assert_same_bits(after.opt_state, untouched.opt_state)
    assert metrics['loss_scale'].item() == after.loss_scale.scale.item() == scale / 4  # halved in each micro-batch
    assert metrics['skipped_steps'].item() == after.skipped.item() == 1
    assert (metrics['skip_reason'].item(), metrics['skipped_in_a_row'].item()) == (OVERFLOW, 0)  # no fault
    assert after.step.item() == 1
    # The search goes on until the gradients fit, and then it learns.
    for _ in range(100):
        after, metrics = one.step(after, one.batch())
        if np.isfinite(metrics['grad_norm'].item()):
            break
    assert after.skipped.item() == after.step.item() - 1
    assert not np.array_equal(after.params['wte'], untouched.params['wte'])


def test_the_evaluation_step_sums_over_weights_of_one(lab):
    one = lab(dropout=0.5)
    weights = np.zeros((8, 16), np.float32)
    weights[:3] = 1
    batch = one.batch() | one.put({'weights': weights})
    params = one.state().params
    result = make_eval_step(one.model, one.mesh)(params, batch)
    assert result['tokens'].item() == 48
    assert result['loss'].item() == pytest.approx(numpy_losses(one.model, params, batch)[:3].sum(), rel=1e-5)


def test_the_compiler_options_are_those_of_the_devices_of_the_mesh(lab):
    absent = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform='tpu')]))
    assert compiler_options(absent) is None
    assert compiler_options(lab().mesh) == compiler_options() == CPU_OPTIONS


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.d_model': 2**22, 'model.n_head': 1}, r'needs at least .* GiB on each device, .* parameters'),
        ({'train.batch_size': 10**8}, 'layers of width 32 on train.batch_size=100000000 sequences'),
        ({'eval.batch_size': 10**9}, 'on eval.batch_size=1000000000 sequences of 32 tokens'),
        ({'model.block_size': 10**9}, 'sequences of 1000000000 tokens'),
        ({'model.vocab_size': 2 * 10**9}, 'parameters with gradients and AdamW'),
    ],
)
def test_what_no_device_here_holds_is_refused_with_the_numbers(tiny_config, changes, message):
    run = resolve(tiny_config(changes))
    with pytest.raises(InputError, match=message):
        check_memory(run, model_config(run, 512), make_mesh(MeshConfig()))


def test_what_fits_is_not_refused(tiny_config):
    run = resolve(tiny_config({'train.accumulation_steps': 2}))
    check_memory(run, model_config(run, 512), make_mesh(MeshConfig()))


def test_memory_is_asked_of_the_devices_or_their_host():
    host = memory_of(jax.devices())
    assert 2**28 < host <= os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    gpu = types.SimpleNamespace(platform='gpu', device_kind='NVIDIA H200', memory_stats=lambda: {'bytes_limit': 12})
    assert memory_of([gpu, gpu]) == 24
    gpu.memory_stats = lambda: None
    assert memory_of([gpu, gpu]) == 2 * 141 * 10**9


def test_a_container_has_what_it_may_have(monkeypatch, tmp_path):
    (tmp_path / 'max').write_text('max\n')
    (tmp_path / 'limit').write_text(f'{2**30}\n')
    limits = [str(tmp_path / name) for name in ('max', 'none', 'limit')]
    monkeypatch.setattr(devices, 'CONTAINER_LIMITS', limits)
    assert memory_of(jax.devices()) == 2**30
