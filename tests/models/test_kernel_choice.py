"""Which attention kernel runs where, and which form a product of few rows takes: by the devices compiled for."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.models import attention_kernels, preset_config
from gpt_jax.models.attention import choose_kernel
from gpt_jax.models.layers import matmul_transposed
from gpt_jax.parallel import MeshConfig, activate, make_mesh, target_device


def gpu(capability, platform='gpu'):
    """A device as jax describes it; CUDA's compute capability, or the name that ROCm has there."""
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


T4, A100, ADA, H100, B200 = gpu('7.5'), gpu('8.0'), gpu('8.9'), gpu('9.0'), gpu('10.0')
MI300, CPU, TPU = gpu('gfx942'), types.SimpleNamespace(platform='cpu'), types.SimpleNamespace(platform='tpu')


@pytest.mark.parametrize(
    ('device', 'head_dim', 'kernel'),
    [
        (T4, 64, 'blockwise'),
        (A100, 64, 'cudnn'),
        (A100, 128, 'cudnn'),
        (A100, 136, 'blockwise'),
        (ADA, 256, 'blockwise'),
        (H100, 136, 'cudnn'),
        (H100, 256, 'cudnn'),
        (H100, 264, 'blockwise'),
        (H100, 60, 'blockwise'),
        (B200, 256, 'cudnn'),
        (gpu('9.0', platform='cuda'), 64, 'cudnn'),
        (MI300, 64, 'blockwise'),
        (gpu(None), 64, 'blockwise'),
        (CPU, 64, 'blockwise'),
        (TPU, 64, 'blockwise'),
    ],
)
def test_cudnn_is_taken_where_it_has_the_case(device, head_dim, kernel):
    assert choose_kernel(device, jnp.bfloat16, head_dim) == kernel


@pytest.mark.parametrize(('dtype', 'kernel'), [('float16', 'cudnn'), ('bfloat16', 'cudnn'), ('float32', 'blockwise')])
def test_cudnn_takes_types_of_16_bits(dtype, kernel):
    assert choose_kernel(H100, jnp.dtype(dtype), 64) == kernel


@pytest.mark.parametrize(
    ('changes', 'kernel'),
    [
        ({}, 'splash'),
        ({'band': 8, 'documents': True}, 'splash'),
        ({'dtype': 'float32', 'head_dim': 80, 'time': 2048}, 'splash'),
        ({'device': CPU}, 'blockwise'),
        ({'dtype': 'float16'}, 'blockwise'),
        ({'head_dim': 264}, 'blockwise'),
        ({'time': 1000}, 'blockwise'),
        ({'time': None, 'band': 8}, 'banded'),
        ({'divides': False}, 'blockwise'),
        ({'dropout': True}, 'full'),
    ],
)
def test_splash_is_taken_on_a_tpu_where_it_has_the_case(changes, kernel):
    case = {'device': TPU, 'dtype': 'bfloat16', 'head_dim': 64, 'time': 1024} | changes
    device, dtype, head_dim = (case.pop(name) for name in ('device', 'dtype', 'head_dim'))
    assert choose_kernel(device, jnp.dtype(dtype), head_dim, **case) == kernel


@pytest.mark.parametrize('device', [H100, CPU])
def test_dropout_makes_all_probabilities_and_documents_go_block_by_block(device):
    assert choose_kernel(device, jnp.bfloat16, 64, dropout=True, documents=True, band=8) == 'full'
    assert choose_kernel(device, jnp.bfloat16, 64, documents=True) == 'blockwise'
    assert choose_kernel(device, jnp.bfloat16, 64, documents=True, band=8) == 'banded'
    assert choose_kernel(device, jnp.bfloat16, 64, band=8) == ('cudnn' if device is H100 else 'banded')


@pytest.mark.parametrize('device', [H100, TPU])
def test_time_that_is_split_goes_round_a_ring_or_to_neighbours(device):
    choose = functools.partial(choose_kernel, device, jnp.bfloat16, 64, time_is_split=True)
    assert (choose(), choose(documents=True)) == ('ring', 'ring')
    assert (choose(band=8), choose(band=8, documents=True)) == ('ring_banded', 'ring_banded')
    assert choose(dropout=True) == 'full'
    assert attention_kernels(preset_config('gpt3-125m'), device, time_is_split=True) == ['ring', 'ring_banded']


@pytest.mark.parametrize(
    ('device', 'changes', 'documents', 'kernels'),
    [
        (H100, {}, False, ['cudnn']),
        (H100, {}, True, ['blockwise', 'banded']),
        (H100, {'compute_dtype': 'f32'}, False, ['blockwise', 'banded']),
        (H100, {'attention_dropout': 0.1}, False, ['full']),
        (CPU, {}, False, ['blockwise', 'banded']),
        (CPU, {'band_size': 1024}, False, ['blockwise']),
        (TPU, {}, True, ['splash']),
        (TPU, {'block_size': 1000}, False, ['blockwise', 'banded']),
        (T4, {'attention_pattern': 'dense'}, False, ['blockwise']),
    ],
)
def test_the_kernels_of_a_model_are_named_once_each(device, changes, documents, kernels):
    config = preset_config('gpt3-125m', **({'block_size': 1024, 'compute_dtype': 'bf16'} | changes))
    assert attention_kernels(config, device, documents) == kernels


def test_the_target_is_a_device_of_the_active_mesh():
    assert target_device() == jax.devices()[0]
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[4:6])
    with activate(mesh):
        assert target_device() == jax.devices()[4]


@pytest.mark.parametrize(('device', 'is_stacked'), [(CPU, True), (H100, False)])
def test_products_of_few_rows_take_the_form_of_the_device_compiled_for(monkeypatch, device, is_stacked):
    monkeypatch.setattr('gpt_jax.models.layers.target_device', lambda: device)
    # A function of its own: jax would take the trace of another test.
    jaxpr = jax.make_jaxpr(functools.partial(matmul_transposed, dtype=None))(jnp.ones((1, 8)), jnp.ones((5, 8)))
    (product,) = (equation for equation in jaxpr.eqns if equation.primitive.name == 'dot_general')
    assert any(operand.aval.ndim == 3 for operand in product.invars) == is_stacked
