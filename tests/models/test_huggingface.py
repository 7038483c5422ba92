"""Directories as transformers writes them, made here with safetensors alone; tests/parity has the real ones."""

import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig, huggingface

NEO = {'qkv_bias': False, 'attention_scale': 1.0}
RATES = {'embedding_dropout': 0.1, 'attention_dropout': 0.2, 'mlp_dropout': 0.3, 'resid_dropout': 0.3}


def random_params(config, seed=0):
    """Of every shape its own numbers; rows of padding are zero, as `load` makes them."""
    rng = np.random.default_rng(seed)
    shapes = huggingface.parameter_shapes(config)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    for table in {'wte', 'lm_head'} & params.keys():
        params[table][config.vocab_size :] = 0
    return params


@pytest.fixture
def folder(config, tmp_path):
    huggingface.save(tmp_path / 'hf', config, random_params(config))
    return tmp_path / 'hf'


def edit_config(folder, **changes):
    document = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(document | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')


def split(folder):
    """The weights in two files and an index, instead of one file."""
    tensors = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names = sorted(tensors)
    parts = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
    for file_name, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file_name)
    weight_map = {name: file_name for file_name, part in parts.items() for name in part}
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def message(folder):
    with pytest.raises(InputError) as error:
        huggingface.load(folder)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_the_shapes_are_those_of_the_model(config, fresh):
    shapes = huggingface.parameter_shapes(config)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, fresh)


def test_a_file_has_gpt2s_names_shapes_and_no_padding(config, folder):
    tensors, params = load_file(folder / 'model.safetensors'), random_params(config)
    assert tensors['transformer.wte.weight'].shape == (300, 32)
    assert 'lm_head.weight' not in tensors
    assert len(tensors) == 4 + 2 * 12
    qkv = params['blocks']['attention']['qkv']
    np.testing.assert_array_equal(tensors['transformer.h.1.attn.c_attn.weight'], qkv['kernel'][1].reshape(32, 96))
    np.testing.assert_array_equal(tensors['transformer.h.0.attn.c_attn.bias'], qkv['bias'][0].reshape(96))
    out, down = params['blocks']['attention']['out'], params['blocks']['mlp']['down']
    np.testing.assert_array_equal(tensors['transformer.h.1.attn.c_proj.weight'], out['kernel'][1].reshape(32, 32))
    np.testing.assert_array_equal(tensors['transformer.h.1.mlp.c_proj.weight'], down['kernel'][1])


def test_a_file_has_gpt_neos_names_and_transposed_matrices(config, tmp_path):
    neo = dataclasses.replace(config, **NEO)
    params = random_params(neo)
    huggingface.save(tmp_path / 'neo', neo, params)
    tensors = load_file(tmp_path / 'neo' / 'model.safetensors')
    kernel = params['blocks']['attention']['qkv']['kernel']
    for part, name in enumerate('qkv'):
        tensor = tensors[f'transformer.h.1.attn.attention.{name}_proj.weight']
        np.testing.assert_array_equal(tensor, kernel[1, :, part].reshape(32, 32).T)
    np.testing.assert_array_equal(
        tensors['transformer.h.0.mlp.c_fc.weight'], params['blocks']['mlp']['up']['kernel'][0].T
    )
    assert not any('c_attn' in name or name.endswith('q_proj.bias') for name in tensors)


configs = st.builds(
    GPTConfig,
    vocab_size=st.sampled_from([1, 100, 128, 129]),
    block_size=st.integers(1, 5),
    n_layer=st.integers(1, 5),
    n_head=st.sampled_from([1, 2]),
    d_model=st.sampled_from([2, 6]),
    mlp_expansion=st.integers(1, 4),
    n_inner=st.sampled_from([None, 5, 7]),
    activation=st.sampled_from(['gelu_new', 'gelu', 'relu', 'silu', 'tanh']),
    tie_embeddings=st.booleans(),
    layer_norm_epsilon=st.sampled_from([1e-5, 1e-3]),
    **{rate: st.sampled_from([0.0, 0.1, 0.25]) for rate in RATES},
)
attentions = st.one_of(
    st.sampled_from([{}, {'attention_scale': 1.0}, {'scale_attn_by_inverse_layer_idx': True}, NEO]),
    st.builds(lambda size: NEO | {'attention_pattern': 'alternating', 'band_size': size}, st.integers(1, 9)),
)


@settings(max_examples=40, deadline=None)
@given(configs, attentions)
def test_what_is_saved_is_loaded_again(tmp_path_factory, config, attention):
    config = dataclasses.replace(config, **attention)
    folder, params = tmp_path_factory.mktemp('saved') / 'hf', random_params(config)
    huggingface.save(folder, config, params)
    loaded, again = huggingface.load(folder)
    if config.n_layer == 1:  # a single layer is dense, whatever pattern it begins
        config = dataclasses.replace(config, attention_pattern='dense', band_size=loaded.band_size)
    assert loaded == config
    assert_same(again, params)


@pytest.mark.parametrize(('dtype', 'numpy_dtype'), [('bf16', ml_dtypes.bfloat16), ('fp16', np.float16)])
def test_narrow_tensors_become_float32_of_the_same_value(config, tmp_path, dtype, numpy_dtype):
    params = random_params(config)
    huggingface.save(tmp_path / 'hf', config, params, dtype=dtype)
    assert {a.dtype for a in load_file(tmp_path / 'hf' / 'model.safetensors').values()} == {np.dtype(numpy_dtype)}
    assert_same(
        huggingface.load(tmp_path / 'hf')[1], jax.tree.map(lambda a: a.astype(numpy_dtype).astype(np.float32), params)
    )


def test_names_without_the_prefix_masks_and_several_files_make_no_difference(config, folder):
    def as_the_first_files_were(tensors):
        for name in list(tensors):
            tensors[name.removeprefix('transformer.')] = tensors.pop(name)
        for layer in range(2):
            tensors[f'h.{layer}.attn.bias'] = np.tril(np.ones((1, 1, 24, 24), np.uint8))
            tensors[f'h.{layer}.attn.masked_bias'] = np.full((), -1e4, np.float32)

    edit_tensors(folder, as_the_first_files_were)
    split(folder)
    assert_same(huggingface.load(folder)[1], random_params(config))


def renamed(change):
    def edit(tensors):
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return edit


def both(tensors):
    tensors['lm_head.weight'] = tensors['transformer.wte.weight']


TIED = {
    'both names of the table': both,
    "the head's name alone": lambda t: t.update({'lm_head.weight': t.pop('transformer.wte.weight')}),
    'no prefix': renamed(lambda name: name.removeprefix('transformer.')),
    'a wrapper': renamed(lambda name: f'model.{name}'),
    'a wrapper in a wrapper': renamed(lambda name: f'module._orig_mod.{name}'),
    'a wrapper around both names': lambda t: (both(t), renamed(lambda name: f'module.{name}')(t)),
    "a wrapper around the head's name alone": lambda t: (
        t.update({'lm_head.weight': t.pop('transformer.wte.weight')}),
        renamed(lambda name: f'module.{name}')(t),
    ),
    'a wrapper around the model without its head': lambda t: (
        renamed(lambda name: f'model.{name}')(t),
        t.update({'lm_head.weight': t['model.transformer.wte.weight']}),
    ),
}


@pytest.mark.parametrize('change', TIED.values(), ids=TIED)
def test_a_tied_table_may_stand_under_either_name_and_all_under_any_prefix(config, folder, change):
    edit_tensors(folder, change)
    assert_same(huggingface.load(folder)[1], random_params(config))


def test_an_untied_head_under_a_wrapper_is_read(config, tmp_path):
    untied = dataclasses.replace(config, tie_embeddings=False)
    huggingface.save(tmp_path / 'hf', untied, random_params(untied))
    edit_tensors(tmp_path / 'hf', renamed(lambda name: f'model.{name}'))
    assert_same(huggingface.load(tmp_path / 'hf')[1], random_params(untied))


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named_when_read_and_when_written(config, folder, tmp_path, value):
    def damage(tensors):
        tensors['transformer.h.1.mlp.c_fc.weight'][3, 5] = value

    edit_tensors(folder, damage)
    assert 'model.safetensors: transformer.h.1.mlp.c_fc.weight has values that are NaN or infinite' in message(folder)
    params = random_params(config)
    params['blocks']['mlp']['up']['kernel'][1, 3, 5] = value
    with pytest.raises(InputError, match=r'^blocks/mlp/up/kernel has values that are NaN or infinite'):
        huggingface.save(tmp_path / 'new', config, params)
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    ('of_config', 'of_generation', 'expected'),
    [
        ({}, None, {}),
        ({'eos_token_id': 7}, None, {'eos_token_id': 7}),
        ({'eos_token_id': [7, 8]}, {}, {'eos_token_id': [7, 8]}),
        ({'eos_token_id': 7}, {'eos_token_id': [9, 50256]}, {'eos_token_id': [9, 50256]}),
        ({'bos_token_id': 1, 'pad_token_id': 2}, {'pad_token_id': -1}, {'bos_token_id': 1, 'pad_token_id': -1}),
        ({'eos_token_id': 7}, {'eos_token_id': None, 'temperature': 0.7}, {'eos_token_id': 7}),
    ],
)
def test_token_ids_are_read_and_generation_config_wins(folder, of_config, of_generation, expected):
    edit_config(folder, **of_config)
    if of_generation is not None:
        (folder / 'generation_config.json').write_text(json.dumps(of_generation))
    assert huggingface.read_token_ids(folder) == expected


def test_keys_that_config_json_leaves_out_have_the_values_of_transformers(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    rates = dict.fromkeys(RATES, 0.1)
    assert huggingface.read_config(tmp_path) == GPTConfig(50257, 1024, 12, 12, 768, **rates)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(f'transformer.{old}')})


def replace(name, array):
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (rename('ln_f.bias', 'transformer.ln_f.beta'), r'transformer.ln_f.beta is no tensor of the model'),
        (lambda t: t.pop('transformer.h.1.ln_2.weight'), r'transformer.h.1.ln_2.weight is missing'),
        (rename('wpe.weight', 'wpe.weight'), r'wpe.weight is no tensor of the model'),
        (replace('transformer.h.2.ln_1.bias', np.zeros(32, np.float32)), r'transformer.h.2.ln_1.bias is no tensor'),
        (
            replace('transformer.wpe.weight', np.zeros((25, 32), np.float32)),
            r'transformer.wpe.weight has shape \[25, 32\] and config.json asks for \[24, 32\]',
        ),
        (replace('transformer.ln_f.bias', np.zeros(32, np.int32)), r'transformer.ln_f.bias is of type I32; only F32'),
        (replace('transformer.ln_f.bias', np.zeros(32)), r'transformer.ln_f.bias is of type F64; only F32'),
        (replace('lm_head.weight', np.zeros((300, 32), np.float32)), r'lm_head.weight differs from wte.weight'),
        (replace('lm_head.weight', np.zeros((2, 32), np.float32)), r'lm_head.weight differs from wte.weight'),
    ],
)
def test_every_tensor_is_accounted_for(folder, change, expected):
    edit_tensors(folder, change)
    assert re.search(f'{re.escape(str(folder))}/model.safetensors: {expected}', message(folder))


def test_an_untied_head_that_is_not_there_is_missing(folder):
    edit_config(folder, tie_word_embeddings=False)
    assert 'lm_head.weight is missing' in message(folder)


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'model_type': ['gpt2']}, "model_type=['gpt2'] cannot be read"),
        ({'n_inner': 0.5}, 'n_inner=0.5 must be a whole number'),
        ({'model_type': 'llama'}, "model_type='llama' cannot be read; gpt2 (GPT-2) and gpt_neo (GPT-Neo) can"),
        ({'activation_function': 'prelu'}, 'activation_function="prelu" has no counterpart here'),
        ({'activation_function': ['relu']}, 'activation_function=["relu"] has no counterpart here'),
        ({'scale_attn_by_inverse_layer_idx': 1}, 'scale_attn_by_inverse_layer_idx=1 must be true or false'),
        ({'rotary_dim': 8}, 'rotary_dim=8 has no counterpart here'),
        ({'add_cross_attention': True}, 'add_cross_attention=true has no counterpart'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config={"bits": 4} has no counterpart'),
        ({'n_inner': 0}, 'n_inner=0 must be a whole number of at least 1'),
        ({'n_inner': 10**9 + 1}, 'n_inner=1000000001 must be at most'),
        ({'n_layer': '2'}, 'n_layer="2" must be a whole number'),
        ({'n_layer': True}, 'n_layer=true must be a whole number'),
        ({'n_head': 5}, 'is not divisible by model.n_head=5'),
        ({'attn_pdrop': None}, 'attn_pdrop=null must be a number'),
        ({'attn_pdrop': 1.5}, 'model.attention_dropout=1.5'),
        ({'mlp_pdrop': 'x'}, 'mlp_pdrop="x" must be a number'),
        ({'scale_attn_weights': 'no'}, 'scale_attn_weights="no" must be true or false'),
    ],
)
def test_what_config_json_asks_for_and_cannot_be_had_is_named(folder, changes, expected):
    edit_config(folder, **changes)
    text = message(folder)
    assert text.startswith(f'{folder}/config.json: ')
    assert expected in text


@pytest.mark.parametrize(
    ('types', 'expected'),
    [
        ([[['local', 'global'], 1]], 'has no counterpart here'),
        ([[['local'], 2]], 'has no counterpart here'),
        ([[['global', 'local'], 2]], 'does not name global or local for each of num_layers=2'),
        ([[['global', 'sparse'], 1]], 'does not name global or local'),
        ('global', 'does not name global or local'),
        ([[['global'], -1]], 'does not name global or local'),
        (7, 'does not name global or local'),
    ],
)
def test_other_orders_of_gpt_neos_layers_are_refused(config, tmp_path, types, expected):
    neo = dataclasses.replace(config, **NEO)
    huggingface.save(tmp_path / 'neo', neo, random_params(neo))
    edit_config(tmp_path / 'neo', attention_types=types)
    assert f'attention_types={json.dumps(types)} {expected}' in message(tmp_path / 'neo')


@pytest.mark.parametrize('content', ['', '{', '[]', 'null', b'\xff'])
def test_a_config_that_is_no_json_object_is_named(folder, content):
    (folder / 'config.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message(folder).startswith(f'{folder}/config.json is no')


def test_a_missing_config_is_named(folder):
    (folder / 'config.json').unlink()
    assert message(folder).startswith(f'{folder}/config.json cannot be read (No such file or directory)')


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9))
def test_a_truncated_file_is_named(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp('cut') / 'hf'
    config = GPTConfig(vocab_size=3, block_size=2, n_layer=1, n_head=1, d_model=2)
    huggingface.save(folder, config, random_params(config))
    whole = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(whole[: cut % len(whole)])
    assert message(folder).startswith(f'{folder}/model.safetensors: is no whole safetensors file')


def test_weights_that_are_not_there_are_named(folder):
    (folder / 'model.safetensors').unlink()
    assert 'has neither model.safetensors nor model.safetensors.index.json' in message(folder)


def test_pickles_are_refused_unread(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(b'no pickle at all')
    text = message(folder)
    assert text.startswith(f'{folder}/pytorch_model.bin is a pickle, which is never read')
    assert 'save_pretrained' in text


def change_map(change):
    def edit(folder):
        path = folder / 'model.safetensors.index.json'
        document = json.loads(path.read_text())
        change(document['weight_map'])
        path.write_text(json.dumps(document))

    return edit


@pytest.mark.parametrize(
    ('break_it', 'expected'),
    [
        (lambda f: (f / 'b.safetensors').unlink(), 'index.json lists b.safetensors, which is not there'),
        (change_map(lambda m: m.pop('transformer.wpe.weight')), 'wpe.weight, which model.safetensors.index.json lists'),
        (change_map(lambda m: m.update(extra='a.safetensors')), 'lists extra in a.safetensors, which does not hold it'),
        (change_map(lambda m: m.update(extra='../a.safetensors')), "'../a.safetensors' lies outside of the directory"),
        (change_map(lambda m: m.update(extra=7)), 'is no index of safetensors files'),
        (lambda f: (f / 'model.safetensors.index.json').write_text('{}'), 'is no index of safetensors files'),
        (lambda f: (f / 'a.safetensors').write_bytes(b''), 'a.safetensors: is no whole safetensors file'),
    ],
)
def test_an_index_that_does_not_agree_with_its_files_is_named(folder, break_it, expected):
    split(folder)
    break_it(folder)
    assert expected in message(folder)


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'attention_pattern': 'alternating'}, "model.attention_pattern='alternating' with model.qkv_bias=True"),
        ({'attention_scale': 0.5}, 'model.attention_scale=0.5 has no counterpart'),
        ({'qkv_bias': False}, 'model.qkv_bias=False with model.attention_scale=None has no counterpart'),
        (NEO | {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True has no counterpart'),
    ],
)
def test_what_has_no_counterpart_is_not_saved(config, tmp_path, changes, expected):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(InputError, match=re.escape(expected)):
        huggingface.save(tmp_path / 'hf', config, random_params(config))
    assert list(tmp_path.iterdir()) == []


def test_the_usual_scale_written_out_is_the_usual_scale(config, tmp_path):
    written = dataclasses.replace(config, attention_scale=8**-0.5)
    huggingface.save(tmp_path / 'hf', written, random_params(config))
    assert huggingface.read_config(tmp_path / 'hf') == config


def test_values_that_float16_cannot_hold_are_refused(config, tmp_path):
    params = random_params(config)
    params['wpe'][0, 0] = 1e6
    with pytest.raises(InputError, match='dtype=fp16 cannot hold the values of wpe; use bf16 or f32'):
        huggingface.save(tmp_path / 'hf', config, params, dtype='fp16')
    with pytest.raises(InputError, match="dtype='f64' must be one of f32, bf16, fp16"):
        huggingface.save(tmp_path / 'hf', config, params, dtype='f64')
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_config_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r'wpe has shape \(24, 32\), the config needs \(25, 32\)'):
        huggingface.save(tmp_path / 'hf', dataclasses.replace(config, block_size=25), random_params(config))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_left_as_it_is(config, folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match='exists already; name a new folder'):
        huggingface.save(folder, config, random_params(config, seed=1))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_that_fails_leaves_nothing(config, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('gpt_jax.models.huggingface.save_file', full)
    with pytest.raises(OSError, match='No space left'):
        huggingface.save(tmp_path / 'hf', config, random_params(config))
    assert list(tmp_path.iterdir()) == []


def test_place_takes_every_parameter_once(config, folder):
    placed = {}
    _, tree = huggingface.load(folder, lambda path, array: placed.setdefault(path, array).shape)
    assert tree['blocks']['mlp']['up'] == {'kernel': (2, 32, 128), 'bias': (2, 128)}
    assert len(placed) == len(jax.tree.leaves(huggingface.parameter_shapes(config)))
    assert all(type(array) is np.ndarray for array in placed.values())


def test_a_directory_is_known_by_its_files(folder, tmp_path):
    assert huggingface.is_directory(folder)
    assert not huggingface.is_directory(tmp_path)
    (tmp_path / 'config.json').write_text('{"model": {}, "data": {}}')  # a workdir's
    assert not huggingface.is_directory(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
    assert huggingface.is_directory(tmp_path)
