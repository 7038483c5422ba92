"""Losses and gradients on several devices: those of one device, with one reduction of the table's gradient."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from gpt_jax.models import GPT, GPTConfig, losses
from gpt_jax.parallel import MeshConfig, activate, batch_sharding, make_mesh, replicated, tree_shardings

# 640 rows of the table: no other dimension is one of 640, 320 and 160.
CONFIG = GPTConfig(vocab_size=600, block_size=16, n_layer=1, n_head=4, d_model=32)
ROWS = 640
COLLECTIVES = 'all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute'


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, 'cpu', 2 * 2 * ROWS)


def value_and_grad(config):
    def loss(params, tokens):
        return GPT(config).apply({'params': params}, tokens, tokens[:, ::-1], method='token_losses').mean()

    return jax.value_and_grad(loss)


@functools.cache
def one_device(tie_embeddings):
    """Parameters that are not those of `init`, tokens, and the loss and its gradients."""
    config, rng = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings), np.random.default_rng(0)
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)
    tokens = rng.integers(0, 600, (8, 16), np.int32)
    return params, tokens, quick.jit(value_and_grad(config))(params, tokens)


def on_mesh(sizes, tie_embeddings, rows=8):
    """The program for a mesh, and its loss and gradients."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings)
    params, tokens, _ = one_device(tie_embeddings)
    mesh = make_mesh(MeshConfig(**({'data': 1} | sizes)), jax.devices()[: math.prod(sizes.values())])
    shardings = tree_shardings(mesh, params, params)
    batch = batch_sharding(mesh) if rows == 8 else replicated(mesh)

    def step(params, tokens):
        with activate(mesh):
            return value_and_grad(config)(params, tokens)

    jitted = quick.jit(step, in_shardings=(shardings, batch), out_shardings=(replicated(mesh), shardings))
    program = jitted.lower(params, tokens[:rows]).compile()
    return program.as_text(), program(jax.device_put(params, shardings), jax.device_put(tokens[:rows], batch))


def computations(text):
    """The lines of every computation of a program, by its name."""
    found, name = {}, None
    for line in text.splitlines():
        if header := re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line):
            name = header.group(1)
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def inside_loops(text):
    """Lines of the bodies of all loops, and of what they call."""
    parts = computations(text)
    waiting = re.findall(r'body=%?([\w.\-]+)', text)
    assert waiting
    seen = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            for line in parts[name]:
                waiting += re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)', line)
    return [line for name in seen for line in parts[name]]


def collectives(lines):
    """(kind, [shape, ...]) of each collective operation."""
    for line in lines:
        if match := re.match(rf'\s+(?:ROOT )?%\S+ = (.*?) ({COLLECTIVES})(?:-start)?\(', line):
            shapes = re.findall(r'\w+\[([\d,]*)\]', match.group(1))
            yield match.group(2), [tuple(int(size) for size in shape.split(',') if size) for shape in shapes]


MESHES = [
    {'data': 2},
    {'fsdp': 4},
    {'data': 2, 'fsdp': 4},
    {'tensor': 4},
    {'fsdp': 2, 'tensor': 4},
    {'data': 2, 'tensor': 2, 'context': 2},
]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', MESHES, ids=lambda sizes: '_'.join(f'{axis}{size}' for axis, size in sizes.items()))
def test_a_tied_tables_gradient_is_reduced_once_after_the_chunks_and_no_logits_are_sent(sizes, capfd):
    text, (value, gradients) = on_mesh(sizes, tie_embeddings=True)
    _, _, (expected, expected_gradients) = one_device(True)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), gradients, expected_gradients)

    assert not list(collectives(inside_loops(text)))
    rows, width = ROWS // sizes.get('tensor', 1), CONFIG.d_model // sizes.get('fsdp', 1)
    sent = [(kind, shape) for kind, shapes in collectives(text.splitlines()) for shape in shapes]
    reduced = [kind for kind, shape in sent if shape == (rows, width) and kind in ('all-reduce', 'reduce-scatter')]
    scattered, summed = 'fsdp' in sizes, 'data' in sizes or 'context' in sizes
    assert sorted(reduced) == ['all-reduce'] * summed + ['reduce-scatter'] * scattered
    # Besides that the table is gathered, once; nothing else that is sent is as long as the vocabulary.
    others = [(kind, shape) for kind, shape in sent if {ROWS, rows} & set(shape) and kind not in reduced]
    assert others == [('all-gather', (rows, CONFIG.d_model))] * scattered
    assert 'rematerialization' not in capfd.readouterr().err  # XLA's: "Involuntary full rematerialization"


def test_an_untied_heads_gradient_is_that_of_one_device():
    text, (value, gradients) = on_mesh({'fsdp': 2, 'tensor': 2}, tie_embeddings=False)
    _, _, (expected, expected_gradients) = one_device(False)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), gradients, expected_gradients)
    assert not list(collectives(inside_loops(text)))


def test_rows_that_the_mesh_does_not_divide_are_left_to_the_compiler():
    params, tokens, _ = one_device(True)
    expected = quick.jit(value_and_grad(CONFIG))(params, tokens[:3])
    _, found = on_mesh({'data': 2, 'fsdp': 2}, tie_embeddings=True, rows=3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
