"""The TPU's fused attention, interpreted on CPU, against the whole matrix in NumPy; what rematerialisation keeps."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_reference import causal_attention, causal_attention_gradients, float64

from gpt_jax.models import GPT, GPTConfig
from gpt_jax.models.attention import splash_attention
from gpt_jax.parallel import MeshConfig, activate, batch_sharding, make_mesh, tree_shardings
from gpt_jax.planning.topology import quiet, topology_devices


def qkv_and_upstream(batch, heads, time, head_dim):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((batch, heads, time, head_dim)), np.float32) for _ in range(4))


@functools.partial(jax.jit, static_argnames='band')
def output_and_gradients(q, k, v, dy, documents=None, band=None):
    y, gradients = jax.vjp(lambda *qkv: splash_attention(*qkv, documents, 0.3, band, interpret=True), q, k, v)
    return y, gradients(dy)


def assert_equals_numpy(arrays, found, band, documents):
    y, gradients = found
    q, k, v, dy = float64(arrays)
    gradients_by_hand = causal_attention_gradients(q, k, v, dy, band, 0.3, documents)
    expected = (causal_attention(q, k, v, band, 0.3, documents), *gradients_by_hand)
    for one, other in zip((y, *gradients), expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(('band', 'has_documents'), [(None, False), (40, True)])
def test_output_and_gradients_equal_numpy(band, has_documents):
    arrays = qkv_and_upstream(1, 2, 256, 8)
    documents = jnp.asarray(np.repeat([[0, 1, 2]], [100, 60, 96], axis=1)) if has_documents else None
    assert_equals_numpy(arrays, output_and_gradients(*arrays, documents, band=band), band, documents)


def test_on_a_mesh_each_device_has_its_own_rows_and_heads():
    arrays = qkv_and_upstream(2, 2, 128, 8)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    with activate(mesh):
        found = jax.jit(lambda *a: output_and_gradients.__wrapped__(*a, None, None))(*arrays)
    assert_equals_numpy(arrays, found, None, None)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu, the TPU compiler: [tpu-aot]')
def test_the_tpu_compiler_takes_it_for_both_kinds_of_layers_and_names_spares_its_second_run():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), topology_devices('v5e:2x2'))
    config = GPTConfig(
        256, 256, n_layer=2, n_head=4, d_model=256, attention_pattern='alternating', band_size=64, scan_layers=True
    )
    model = GPT(dataclasses.replace(config, compute_dtype='bf16', remat='names'))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))['params']
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        tree_shardings(mesh, params, params),
    )
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh))

    def loss(params, tokens):
        return jnp.mean(model.apply({'params': params}, tokens, tokens, method='token_losses'))

    with quiet(), activate(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    kernels = re.findall(r'%splash_mha_(fwd|dq|dkv)\S* = ', text)
    assert {kind: kernels.count(kind) for kind in set(kernels)} == {'fwd': 2, 'dq': 2, 'dkv': 2}
