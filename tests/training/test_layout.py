"""The table of --print_sharding, held against a count by hand."""

import jax
import pytest
from jax.sharding import PartitionSpec

from gpt_jax.parallel import MeshConfig, make_mesh
from gpt_jax.training import resolve
from gpt_jax.training.layout import layout, render
from gpt_jax.training.recipe import planned_model

# Of tiny_config: 2 layers of width 32 with 2 heads, 32 tokens, 16 rows; characters, for which 256 ids stand.
WIDTH, MLP, VOCAB, F32 = 32, 128, 256, 4


@pytest.fixture(scope='module')
def found(tiny_config):
    changes = {'data.mask_documents': True, 'precision.compute': 'bf16', 'train.accumulation_steps': 2}
    changes['optimizer.ema_decay'] = 0.9
    run = resolve(tiny_config(changes | {'model.attention_dropout': 0.0}))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2), jax.devices())
    return layout(run, planned_model(run), mesh), mesh


def line(found, section, name):
    (one,) = (line for line in found[0][section] if line.name == name)
    return one


def test_parameters_are_split_over_fsdp_and_tensor(found):
    table = line(found, 'parameters', 'wte')
    assert (table.shape, table.partition) == ((VOCAB, WIDTH), 'tensor, fsdp')
    assert table.bytes_per_device == VOCAB * WIDTH * F32 / 4
    heads = line(found, 'parameters', 'blocks/attention/qkv/kernel')
    assert (heads.shape, heads.spec) == ((2, WIDTH, 3, 2, 16), PartitionSpec(None, 'fsdp', None, 'tensor', None))
    assert heads.bytes_per_device == 2 * WIDTH * 3 * WIDTH * F32 / 4
    norm = line(found, 'parameters', 'ln_f/scale')
    assert (norm.partition, norm.bytes_per_device) == ('-', WIDTH * F32)


def test_the_sums_are_those_of_the_model(found):
    matrices = VOCAB * WIDTH / 4 + 32 * WIDTH / 2 + 2 * (4 * WIDTH * WIDTH + 2 * WIDTH * MLP) / 4
    biases = 2 * (3 * WIDTH / 2 + MLP / 2)  # split over tensor
    whole = 2 * (4 * WIDTH + WIDTH + WIDTH) + 2 * WIDTH  # LayerNorms and the biases of what is added up
    parameters = F32 * (matrices + biases + whole)
    assert sum(line.bytes_per_device for line in found[0]['parameters']) == parameters
    moments = [line for line in found[0]['optimizer'] if '/mu/' in line.name or '/nu/' in line.name]
    assert sum(line.bytes_per_device for line in moments) == 2 * parameters
    average = [line for line in found[0]['optimizer'] if line.name.startswith('ema/')]
    assert sum(line.bytes_per_device for line in average) == parameters


def test_activations_are_those_of_a_micro_batch_by_their_logical_names(found):
    rows, time, bf16 = 8 / 2, 32 / 2, 2
    stream = line(found, 'activations', 'residual stream')
    assert (stream.shape, stream.partition) == ((8, 32, WIDTH), 'data+fsdp, context, -')
    assert stream.bytes_per_device == rows * time * WIDTH * bf16
    assert line(found, 'activations', 'inside of the MLP').bytes_per_device == rows * time * MLP / 2 * bf16
    query = line(found, 'activations', 'query, key and value, each')
    assert (query.partition, query.bytes_per_device) == ('data+fsdp, tensor, context, -', rows * time * 16 * bf16)
    # Of the loss each device makes its own part.
    logits = line(found, 'activations', 'logits, a chunk at a time')
    assert (logits.partition, logits.bytes_per_device) == ('data+fsdp, -, tensor', rows * time * VOCAB / 2 * F32)
    assert line(found, 'activations', 'documents, in attention').bytes_per_device == rows * 32 * 4


def test_the_text_names_the_mesh_and_adds_up(found):
    sections, mesh = found
    text = render(sections, mesh)
    assert text.startswith('8 cpu device(s): mesh.data=1, mesh.fsdp=2, mesh.tensor=2, mesh.context=2\n')
    counted = sum(line.bytes_per_device for part in ('parameters', 'optimizer', 'batch') for line in sections[part])
    assert f'batch: {counted:,} bytes on each device' in text
    assert [text.count(f'\n{name} ') for name in ('wte', 'step', 'targets of a micro-batch', 'residual stream')] == [
        1
    ] * 4
