"""Ten steps of training on every mix of the four axes: the losses of one device, and what devices send each other."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import tempfile

import jax
import numpy as np
import optax
import pytest

from gpt_jax.config import MeshConfig, OptimizerConfig
from gpt_jax.data import document_positions
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import global_batch, make_mesh
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.step import abstract_state, init_state, make_train_step

# Sizes that tell what an array is by its shape alone; every axis can have eight devices.
BATCH, TIME, WIDTH, HEADS, HEAD, MLP, VOCAB = 16, 32, 40, 8, 5, 160, 640
DENSE = GPTConfig(600, TIME, n_layer=2, n_head=HEADS, d_model=WIDTH, scan_layers=True, resid_dropout=0.1)
MODELS = {
    'dense': DENSE,
    # A band that reaches over three devices where time is split over eight.
    'alternating': dataclasses.replace(
        DENSE, attention_pattern='alternating', band_size=10, remat='names', embedding_dropout=0.1
    ),
    'untied': dataclasses.replace(
        DENSE, n_layer=1, tie_embeddings=False, remat='full', scale_attn_by_inverse_layer_idx=True, mlp_dropout=0.1
    ),
    'attention dropout': dataclasses.replace(DENSE, n_layer=1, scan_layers=False, attention_dropout=0.1),
}
# Larger steps would turn the rounding of another order of sums into more than 1e-5 of the loss.
OPTIMIZER = OptimizerConfig(3e-3, 0.9, 0.95, 1e-8, 0.1, 1.0)
STEPS = 10
DATA, FSDP, TENSOR, CONTEXT = (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8)
COLLECTIVES = 'all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute'


@functools.cache
def batches(documents):
    """Of all steps, as numpy arrays."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS):
        # The next token follows from the one before, most often: there is something to learn.
        rows = np.cumsum(rng.choice((3, 5), (BATCH, TIME + 1), p=(0.9, 0.1)), axis=1) % 50
        batch = {'tokens': rows[:, :-1].astype(np.int32), 'targets': rows[:, 1:].astype(np.int32)}
        if documents:
            batch |= zip(('positions', 'documents'), document_positions(batch['tokens'], end_of_text=7), strict=True)
        found.append(batch)
    return found


@functools.cache
def first_state(name):
    """On the host, so that no mesh compiles an initialisation of its own."""
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    return jax.device_get(init_state(GPT(MODELS[name]), make_optimizer(OPTIMIZER, optax.constant_schedule(1e-2)), mesh))


@contextlib.contextmanager
def standard_error():
    """A list with what the process writes there during the block, compilers in C++ as well."""
    said, kept = [], os.dup(2)
    with tempfile.TemporaryFile('w+') as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read())


@functools.cache
def trained(name, sizes=(1, 1, 1, 1), documents=False, accumulation_steps=1):
    """Loss of each step on a mesh of (data, fsdp, tensor, context), the program, and what its compiler had to say."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    schedule, model = optax.constant_schedule(OPTIMIZER.learning_rate), GPT(MODELS[name])
    optimizer = make_optimizer(OPTIMIZER, schedule)
    state = jax.tree.map(
        lambda array, leaf: jax.device_put(array, leaf.sharding),
        first_state(name),
        abstract_state(model, optimizer, mesh),
    )

    def on_mesh(batch):
        rows = lambda start, stop: {name: array[start:stop] for name, array in batch.items()}  # noqa: E731
        return global_batch(rows, (BATCH, TIME), mesh)

    step, losses = make_train_step(model, optimizer, schedule, mesh, accumulation_steps), []
    with standard_error() as said:
        step = step.lower(state, on_mesh(batches(documents)[0])).compile()
    for batch in batches(documents):
        state, metrics = step(state, on_mesh(batch))
        losses.append(metrics['loss'].item())
    return losses, step.as_text(), said[0]


def collectives(program):
    """(kind, shapes, whether it is in a layer's loop) of every collective of a program."""
    found, name = [], None
    for line in program.splitlines():
        if header := re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line):
            name = header.group(1)
        elif match := re.match(rf'\s+(?:ROOT )?%\S+ = (.*?) ({COLLECTIVES})(?:-start)?\(', line):
            shapes = [tuple(map(int, filter(None, s.split(',')))) for s in re.findall(r'\w+\[([\d,]*)\]', match[1])]
            found.append((match[2], shapes, '/while/' in line.partition('op_name=')[2], name))
    return found


def gathered(program):
    """The shape of everything that is gathered, and how often the program says so."""
    return collections.Counter(shapes[0] for kind, shapes, *_ in collectives(program) if kind == 'all-gather')


def check(name, sizes, **settings):
    """Losses are those of one device; nothing is rematerialised against our will; weights alone are gathered."""
    data, fsdp, tensor, context = sizes
    losses, program, said = trained(name, sizes, **settings)
    expected, _, _ = trained(name, **settings)
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    assert losses[-1] < losses[0] - 0.3
    assert 'rematerialization' not in said  # XLA's: "Involuntary full rematerialization"
    rows = BATCH // data // fsdp // settings.get('accumulation_steps', 1)
    weights = (
        {
            (VOCAB // tensor, WIDTH),
            (TIME, WIDTH),
            (WIDTH, 3 * WIDTH),
            (WIDTH, 3, HEADS // tensor, HEAD),
            (WIDTH // tensor, WIDTH),
            (WIDTH, MLP // tensor),
            (MLP // tensor, WIDTH),
        }
        if fsdp > 1
        else set()
    )
    if context > 1:
        weights |= {(TIME // context, WIDTH), (TIME, WIDTH // fsdp)}  # of the positions, and their gradient
        weights |= {(rows, TIME)} if settings.get('documents') else set()  # which documents tokens are of
        if MODELS[name].attention_dropout:
            weights |= {(rows, HEADS // tensor, TIME, HEAD), (1, TIME)}  # keys and values, and the order of time
    assert set(gathered(program)) <= weights
    assert not any(kind == 'all-to-all' for kind, *_ in collectives(program))


@pytest.mark.slow
def test_data_alone_adds_up_gradients_and_sends_nothing_else():
    check('dense', DATA)
    found = collectives(trained('dense', DATA)[1])
    assert {kind for kind, *_ in found} == {'all-reduce'}
    assert not [shape for _, shapes, *_ in found for shape in shapes if shape[:2] == (BATCH // 8, TIME)]
    assert sum(in_loop for _, _, in_loop, _ in found) == 1  # all gradients of a layer together


@pytest.mark.slow
def test_fsdp_gathers_each_matrix_for_each_direction():
    check('dense', FSDP)
    program = trained('dense', FSDP)[1]
    matrices = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, MLP), (MLP, WIDTH)]
    assert gathered(program) == dict.fromkeys(matrices, 2) | {(VOCAB, WIDTH): 1, (TIME, WIDTH): 1}
    counts = collections.Counter(kind for kind, *_ in collectives(program))
    assert counts['reduce-scatter'] == 2  # of the two tables
    # The CPU's compiler sums a layer's gradients whole and then cuts them; those of others scatter them.
    assert sum(in_loop for kind, _, in_loop, _ in collectives(program) if kind == 'all-reduce') == 1


def activations(program, rows, time):
    """Kinds and places of the collectives of [rows, time, width]."""
    return collections.Counter(
        (kind, 'layer' if in_loop else 'ends')
        for kind, shapes, in_loop, _ in collectives(program)
        if (rows, time, WIDTH) in shapes
    )


@pytest.mark.slow
def test_tensor_adds_up_activations_twice_in_each_direction_of_a_layer():
    check('dense', TENSOR)
    program = trained('dense', TENSOR)[1]
    # Shoeybi et al. 2019, "Megatron-LM", section 3; at the ends the embedding and the loss.
    assert activations(program, BATCH, TIME) == {('all-reduce', 'layer'): 4, ('all-reduce', 'ends'): 2}
    assert {kind for kind, *_ in collectives(program)} == {'all-reduce'}


def test_fsdp_and_tensor_together_do_what_each_does_alone():
    sizes = (1, 4, 2, 1)
    # With documents: positions that the compiler looks up by itself make it gather activations.
    check('dense', sizes, documents=True)
    program = trained('dense', sizes, documents=True)[1]
    assert activations(program, BATCH // 4, TIME) == {('all-reduce', 'layer'): 4, ('all-reduce', 'ends'): 2}
    matrices = [(WIDTH, 3, HEADS // 2, HEAD), (WIDTH // 2, WIDTH), (WIDTH, MLP // 2), (MLP // 2, WIDTH)]
    assert gathered(program) == dict.fromkeys(matrices, 2) | {(VOCAB // 2, WIDTH): 1, (TIME, WIDTH): 1}


def test_context_sends_keys_and_values_round_a_ring():
    check('dense', CONTEXT)
    found = collectives(trained('dense', CONTEXT)[1])
    half = (BATCH, HEADS, TIME // 16, HEAD)
    sent = collections.Counter(shapes[0] for kind, shapes, *_ in found if kind == 'collective-permute')
    assert sent == {
        (3, *half): 4,  # queries, keys and values to where they are worked on, and their gradients back
        half: 4,  # the output back, and its gradient there
        (BATCH, HEADS, TIME // 16, 1): 2,
        # Keys and values, in both directions; their gradients and the last hop of these. Once before the loop over the
        # stops of the ring, in which each is sent on, and once after it.
        (2, 2, *half): 2 + 1 + 4,
    }
    assert gathered(trained('dense', CONTEXT)[1]) == {(TIME, WIDTH): 1}


@pytest.mark.slow
def test_fsdp_tensor_and_context_together_with_bands_and_documents():
    check('alternating', (1, 2, 2, 2), documents=True)


QUICK = [DATA, FSDP, TENSOR, CONTEXT, (1, 4, 2, 1), (1, 2, 2, 2)]
MIXES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8 and sizes not in QUICK]
MIXES += [(1, 1, 1, 2), (2, 1, 1, 2), (1, 2, 2, 1)]  # of 2 and of 4 devices
SETTINGS = [
    ('attention dropout', {}),
    ('alternating', {'accumulation_steps': 2}),
    ('untied', {'documents': True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('sizes', 'name', 'settings'),
    [(sizes, *SETTINGS[index % 3]) for index, sizes in enumerate(MIXES)],
    ids=lambda value: value if isinstance(value, str) else '_'.join(map(str, value)),
)
def test_every_other_mix_has_the_losses_of_one_device(sizes, name, settings):
    check(name, sizes, **settings)


@pytest.mark.slow
def test_bands_over_eight_devices_and_documents_that_cross_them():
    check('alternating', CONTEXT, documents=True)
