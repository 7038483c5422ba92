"""A directory that somebody else made may hold anything: what cannot be used is one line, before anything is made."""

import json
import os
import struct

import jax
import numpy as np
import pytest

from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig, huggingface

POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12\n'
NEO = {'model_type': 'gpt_neo', 'num_layers': 2, 'num_heads': 1, 'hidden_size': 2, 'max_position_embeddings': 2}


@pytest.fixture
def folder(tmp_path):
    config = GPTConfig(vocab_size=3, block_size=2, n_layer=1, n_head=1, d_model=2)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), huggingface.parameter_shapes(config))
    huggingface.save(tmp_path / 'hf', config, ones)
    return tmp_path / 'hf'


def message(folder, read=huggingface.load):
    with pytest.raises(InputError) as error:
        read(folder)
    assert str(error.value).isprintable()  # and so has no end of line
    assert len(str(error.value)) < 1000
    return str(error.value)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_VALUES = {
    'n_layer': [10**10, 2**63, 0, -1, 1.0, None, '1', [1]],
    'n_positions': [10**15, -5, {}],
    'n_embd': [2**40, 3.5],
    'n_head': [10**9],
    'vocab_size': [2**31, 10**400],
    'n_inner': [10**12, -1, True],
    'layer_norm_epsilon': [float('inf'), float('nan'), '1e-5', -1e-5, 0, 10**400, True],
    'resid_pdrop': [float('nan'), 1e308, -1, '0', None],
    'tie_word_embeddings': ['no', 0, None],
    'scale_attn_weights': [1, 'yes'],
    'activation_function': [None, 7, {}, 'x' * 10**6, '\ud800'],
    'model_type': ['\ud800\n', 'x' * 10**6, 7, {}, None],
    'add_cross_attention': [True, 'x' * 10**6],
}


@pytest.mark.parametrize(('key', 'value'), [(key, value) for key, values in BAD_VALUES.items() for value in values])
def test_a_value_that_cannot_be_is_named_with_its_file(folder, key, value):
    edit(folder / 'config.json', **{key: value})
    text = message(folder)
    assert str(folder / 'config.json') in text
    if isinstance(value, float) and not np.isfinite(value):
        assert 'is not JSON' in text
    assert message(folder, huggingface.read_config) == text


@pytest.mark.parametrize(
    'text', ['[' * 200_000, '{"a":' * 200_000, '{"n_layer": ' + '9' * 5000 + '}', '"gpt2"', '\x00']
)
@pytest.mark.parametrize('name', ['config.json', 'generation_config.json'])
def test_json_that_cannot_be_read_is_named(folder, name, text):
    (folder / name).write_text(text)
    assert str(folder / name) in message(folder, huggingface.read_token_ids)


@pytest.mark.parametrize(
    'types',
    [
        [[['global'], 10**10]],
        [[[], 10**18]],
        [[['global', 'local'], 10**10], [['global'], -(10**10)]],
        [[['global'], True], [['global'], 1]],
        [[['global'], 1.0]],
        ['gl'],
        {'global': 2},
        [[['global'], 2, 3]],
        [[None, 2]],
    ],
)
def test_orders_of_layers_are_counted_before_they_are_written_out(folder, types):
    (folder / 'config.json').write_text(json.dumps(NEO | {'attention_types': types}))
    assert 'config.json: attention_types=' in message(folder)


def test_as_many_layers_as_their_order_names_may_still_be_too_many(folder):
    document = NEO | {'attention_types': [[['global'], 10**10]], 'num_layers': 10**10}
    (folder / 'config.json').write_text(json.dumps(document))
    assert 'n_layer=10000000000 must be at most' in message(folder)


@pytest.mark.parametrize('key', huggingface.TOKEN_IDS)
@pytest.mark.parametrize('value', [2**31, -2, 1.0, True, '7', {}, [2**31], [[7]], [None]])
def test_a_token_id_that_is_none_is_named(folder, key, value):
    edit(folder / 'config.json', **{key: value})
    assert f'config.json: {key}=' in message(folder, huggingface.read_token_ids)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'generation_config.json'])
def test_a_pointer_of_git_lfs_is_called_that(folder, name):
    (folder / name).write_text(POINTER)
    read = huggingface.load if name == 'model.safetensors' else huggingface.read_token_ids
    assert message(folder, read) == f'{folder / name} is a Git LFS pointer, not the file itself; fetch it: git lfs pull'


@pytest.mark.parametrize('name', ['model.safetensors.index.json', 'a.safetensors'])
def test_so_is_one_among_several_files(folder, name):
    (folder / 'model.safetensors').rename(folder / 'a.safetensors')
    index = {'weight_map': {'transformer.wte.weight': 'a.safetensors'}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    (folder / name).write_text(POINTER)
    assert f'{name} is a Git LFS pointer' in message(folder)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'model.safetensors.index.json'])
@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda path: os.symlink('/dev/zero', path)])
def test_what_is_no_file_is_never_waited_for(folder, name, make):
    if name != 'config.json':
        (folder / 'model.safetensors').unlink()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert 'name a regular file' in message(folder)
    assert huggingface.is_directory(folder)


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({'x': '../../etc/passwd'}, 'lies outside of the directory'),
        ({'x': '/etc/passwd'}, 'lies outside of the directory'),
        ({'x': '..'}, '..'),
        ({'x': ''}, 'lies outside of the directory'),
        ({'x': 'a\nb'}, 'which is not there'),
        ({'x': 'a\x00b'}, 'which is not there'),
        ({'x': '\ud800'}, 'which is not there'),
        ({'x': 'y' * 10**5}, 'which is not there'),
        ({f'{n}': f'{n}.safetensors' for n in range(100_000)}, '0.safetensors, which is not there'),
        (['x'], 'is no index'),
        (None, 'is no index'),
    ],
)
def test_an_index_leads_nowhere_else(folder, files, expected):
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': files}))
    assert expected in message(folder)


def header(tensors):
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack('<Q', len(text)) + text


def tensor(shape, start, end, dtype='F32'):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}


@pytest.mark.parametrize(
    'content',
    [
        struct.pack('<Q', 2**62),
        struct.pack('<Q', 2**63) + b'{}',
        header(b'{'),
        header(b'[' * 10**5),
        header({'a': tensor([10**18], 0, 4 * 10**18)}),
        header({'a': tensor([2**40, 2**40], 0, 8)}) + bytes(8),
        header({'a': tensor([2], 0, 8), 'b': tensor([2], 4, 12)}) + bytes(12),
        header({'a': tensor([2], 8, 0)}) + bytes(8),
        header({'a': tensor([2], 0, 8, 'F1')}) + bytes(8),
        header({'a': tensor([2], 0, 8)}) + bytes(16),
        header({'a\n\ud800'.encode('unicode_escape').decode(): tensor([2], 0, 8)}) + bytes(8),
        header({'a\nb': tensor([2], 0, 8)}) + bytes(8),
        header({}),
    ],
    ids=range(13),
)
def test_a_header_that_lies_is_named(folder, content):
    (folder / 'model.safetensors').write_bytes(content)
    assert str(folder) in message(folder)


def test_sizes_are_held_against_the_tensors_before_anything_is_made(folder):
    # Of these sizes the parameters alone would take 2^45 bytes.
    edit(folder / 'config.json', n_embd=2**20, n_inner=2**20, n_layer=4, n_positions=2**22)
    assert 'has shape' in message(folder)
