"""A Hugging Face directory named as a checkpoint."""

import dataclasses
import json
import resource

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from gpt_jax import checkpoints
from gpt_jax.data.tokenizer import Tokenizer, train_bpe, train_char
from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig, huggingface
from gpt_jax.parallel import MeshConfig, make_mesh, tree_shardings

CONFIG = GPTConfig(vocab_size=260, block_size=8, n_layer=2, n_head=2, d_model=16)
TOKENIZER = train_bpe(['a text'], 257)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    shapes = huggingface.parameter_shapes(CONFIG)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    params['wte'][260:] = 0
    return params


@pytest.fixture
def folder(tmp_path, params):
    huggingface.save(tmp_path / 'hf', CONFIG, params)
    TOKENIZER.save(tmp_path / 'hf' / 'tokenizer.json')
    return tmp_path / 'hf'


def test_it_is_resolved_without_a_step_and_without_a_workdir(folder):
    found = checkpoints.resolve(folder)
    assert found == checkpoints.Resolved(folder, 0, None)
    assert found.huggingface
    with pytest.raises(InputError, match='is a Hugging Face directory, which has no steps: leave --step out'):
        checkpoints.resolve(folder, step=3)


def test_it_is_loaded_with_the_description_that_a_checkpoint_has(folder, params):
    loaded = checkpoints.load(folder)
    assert GPTConfig(**loaded.meta['model']) == CONFIG
    assert Tokenizer.from_json(loaded.meta['tokenizer']).fingerprint == TOKENIZER.fingerprint
    assert loaded.meta['tokenizer_fingerprint'] == TOKENIZER.fingerprint
    assert (loaded.step, loaded.folder) == (0, folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))


def test_its_parameters_go_where_a_sharding_says(folder, params):
    mesh = jax.make_mesh((8,), ('x',))
    split, everywhere = NamedSharding(mesh, PartitionSpec('x')), NamedSharding(mesh, PartitionSpec())

    def shardings(abstract):
        return jax.tree.map(lambda leaf: split if leaf.shape[0] % 8 == 0 else everywhere, abstract)

    loaded = checkpoints.load(folder, sharding=shardings).params
    assert loaded['wte'].sharding == split
    assert loaded['blocks']['mlp']['up']['kernel'].sharding == everywhere
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert checkpoints.load(folder, sharding=everywhere).params['wte'].sharding == everywhere


def test_a_model_is_split_over_a_mesh_by_the_rules_of_training(folder, params, tmp_path):
    checkpoints.import_huggingface(folder, tmp_path / 'checkpoint')
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    for path in (folder, tmp_path / 'checkpoint'):
        before = {id(array) for array in jax.live_arrays()}
        loaded = checkpoints.load_model(path, mesh=mesh).params
        # Nothing else is on a device, least of all a whole matrix; but for the parts themselves, as arrays.
        leaves = {id(leaf) for leaf in jax.tree.leaves(loaded)}
        others = [array for array in jax.live_arrays() if id(array) not in before | leaves]
        assert max((array.size for array in others), default=0) <= loaded['wte'].size // 8
        assert len(others) <= 8 * len(leaves)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == tree_shardings(mesh, params, params)
        for name, leaf in (('wte', loaded['wte']), ('up', loaded['blocks']['mlp']['up']['kernel'])):
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}, name


def test_a_mesh_that_does_not_divide_a_model_is_refused(tmp_path):
    narrow = dataclasses.replace(CONFIG, d_model=4)
    shapes = huggingface.parameter_shapes(narrow)
    huggingface.save(tmp_path / 'narrow', narrow, jax.tree.map(lambda leaf: np.ones(leaf.shape, 'f'), shapes))
    TOKENIZER.save(tmp_path / 'narrow' / 'tokenizer.json')
    with pytest.raises(InputError, match=r'mesh.fsdp=8 does not divide a dimension of 4 in'):
        checkpoints.load_model(tmp_path / 'narrow', mesh=make_mesh(MeshConfig(data=1, fsdp=8)))


def test_imported_it_is_a_checkpoint_of_the_same_content(folder, params, tmp_path):
    checkpoints.import_huggingface(folder, tmp_path / 'new')
    found = checkpoints.resolve(tmp_path / 'new')
    assert found == checkpoints.Resolved(tmp_path / 'new', 0, None)
    assert not found.huggingface
    loaded, direct = checkpoints.load(tmp_path / 'new'), checkpoints.load(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert {key: loaded.meta[key] for key in direct.meta} == direct.meta
    assert loaded.meta['val_loss'] is None
    assert loaded.meta['versions']['jax'] == jax.__version__


def test_a_tokenizer_is_needed(folder):
    (folder / 'tokenizer.json').unlink()
    with pytest.raises(InputError, match=r'has no tokenizer; put tokenizer.json there, or vocab.json with merges.txt'):
        checkpoints.load(folder)
    (folder / 'vocab.json').write_text('{}')
    with pytest.raises(InputError, match='has no tokenizer'):
        checkpoints.load(folder)


def test_gpt2s_own_vocabulary_files_will_do(folder):
    model = json.loads(TOKENIZER.to_json())['model']
    (folder / 'tokenizer.json').unlink()
    (folder / 'vocab.json').write_text(json.dumps(model['vocab']))
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    tokenizer = Tokenizer.from_json(checkpoints.load(folder).meta['tokenizer'])
    assert tokenizer.encode('a text') == TOKENIZER.encode('a text')


def test_a_damaged_tokenizer_is_named(folder):
    (folder / 'tokenizer.json').write_text('{}')
    with pytest.raises(InputError, match=f'^{folder}/tokenizer.json: not a tokenizer.json'):
        checkpoints.load(folder)


def test_a_tokenizer_that_is_too_large_for_the_model_is_named(folder):
    train_char([''.join(map(chr, range(0x4E00, 0x4E00 + 300)))]).save(folder / 'tokenizer.json')
    with pytest.raises(InputError, match=r'the tokenizer has 302 tokens and vocab_size=260 in config.json'):
        checkpoints.load(folder)


def test_a_banded_gpt3_is_not_exported(folder, params, tmp_path):
    banded = dataclasses.replace(CONFIG, attention_pattern='alternating')
    meta = {'model': dataclasses.asdict(banded), 'tokenizer': TOKENIZER.to_json()}
    with checkpoints.Checkpoints(tmp_path / 'run' / 'checkpoints') as saved:
        saved.save(1, params, None, meta)
    with pytest.raises(InputError, match=r"attention_pattern='alternating' with model.qkv_bias=True, as GPT-3 has it"):
        checkpoints.export_huggingface(tmp_path / 'run', tmp_path / 'out')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf', 'run']


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named_by_every_door(folder, params, tmp_path, value):
    meta = checkpoints.read_meta(checkpoints.resolve(folder))
    params['blocks']['attention']['out']['bias'][1, 15] = value
    with checkpoints.Checkpoints(tmp_path / 'run' / 'checkpoints') as saved:
        saved.save(1, params, None, meta)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    for load in (
        checkpoints.load,
        lambda path: checkpoints.load_model(path, mesh=mesh),
        lambda path: checkpoints.export_huggingface(path, tmp_path / 'out'),
    ):
        with pytest.raises(InputError, match=r'/1: blocks/attention/out/bias has values that are NaN or infinite'):
            load(tmp_path / 'run')
    tensors = load_file(folder / 'model.safetensors')
    tensors['transformer.h.1.attn.c_proj.bias'][15] = value
    save_file(tensors, folder / 'model.safetensors')
    for load in (checkpoints.load, lambda path: checkpoints.import_huggingface(path, tmp_path / 'out')):
        with pytest.raises(InputError, match=r'transformer.h.1.attn.c_proj.bias has values that are NaN or infinite'):
            load(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf', 'run']


@pytest.mark.parametrize(
    ('ids', 'used'),
    [
        ({}, (TOKENIZER.end_of_text,)),
        ({'eos_token_id': 200, 'bos_token_id': 201, 'pad_token_id': 202}, (200,)),
        ({'eos_token_id': [200, 7, 200]}, (200, 7)),
        ({'eos_token_id': [50256, 9]}, (9,)),
        ({'eos_token_id': 50256, 'pad_token_id': -1}, (TOKENIZER.end_of_text,)),
    ],
)
def test_the_ids_that_end_a_text_go_there_and_back(folder, tmp_path, ids, used):
    document = json.loads((folder / 'config.json').read_text())
    document = {key: value for key, value in document.items() if not key.endswith('_token_id')}
    (folder / 'config.json').write_text(json.dumps(document))
    (folder / 'generation_config.json').write_text(json.dumps(ids))
    checkpoints.import_huggingface(folder, tmp_path / 'checkpoint')
    checkpoints.export_huggingface(tmp_path / 'checkpoint', tmp_path / 'back')
    for path in (folder, tmp_path / 'checkpoint', tmp_path / 'back'):
        assert checkpoints.load_model(path).eos_token_ids == used
    end = TOKENIZER.end_of_text
    expected = {'bos_token_id': end, 'eos_token_id': end, 'pad_token_id': end} | ids
    assert json.loads((tmp_path / 'back' / 'generation_config.json').read_text()) == expected
    of_config = json.loads((tmp_path / 'back' / 'config.json').read_text())
    assert [of_config[key] for key in ('bos_token_id', 'eos_token_id')] == [
        expected['bos_token_id'],
        expected['eos_token_id'],
    ]


# Anything in any file: it loads, or is one line.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**18, 10**400, 'gpt_neo', [[['global'], 10**10]]])
    | st.integers()
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ADDED = {'content': '<x>', 'lstrip': False, 'normalized': False, 'rstrip': False, 'single_word': False, 'special': True}
OF_TOKENS = {
    'tokenizer_config.json': {
        'added_tokens_decoder': {'257': ADDED},
        'eos_token': '<x>',
        'extra_special_tokens': ['<y>'],
    },
    'special_tokens_map.json': {'bos_token': ADDED | {'content': '<y>'}, 'additional_special_tokens': ['<x>']},
    'added_tokens.json': {'<x>': 257, '<z>': 258},
    'generation_config.json': {'eos_token_id': [1, 2], 'pad_token_id': 3},
}


def places(document, at=()):
    """The way to every value of a document."""
    yield at
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield from places(value, (*at, key)) if isinstance(value, dict | list) else [(*at, key)]


def put(document, at, value):
    if not at:
        return value
    inner = document
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return document


@pytest.fixture(scope='module', params=['GPT-2', "GPT-Neo, with GPT-2's vocabulary files"])
def small(request, tmp_path_factory):
    """The files of a directory of a few kilobytes."""
    config = GPTConfig(vocab_size=260, block_size=4, n_layer=2, n_head=1, d_model=2)
    folder = tmp_path_factory.mktemp('small') / 'hf'
    if request.param != 'GPT-2':
        alternating = {'attention_pattern': 'alternating', 'band_size': 3}
        config = dataclasses.replace(config, qkv_bias=False, attention_scale=1.0, **alternating)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, 'f'), huggingface.parameter_shapes(config))
    huggingface.save(folder, config, ones)
    if request.param == 'GPT-2':
        TOKENIZER.save(folder / 'tokenizer.json')
    else:
        (folder / 'vocab.json').write_text(json.dumps(json.loads(TOKENIZER.to_json())['model']['vocab']))
        (folder / 'merges.txt').write_text('#version: 0.2\n')
    for name, document in OF_TOKENS.items():
        (folder / name).write_text(json.dumps(document))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_that_it_loads_or_is_one_line(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        model = checkpoints.load_model(folder)
        model.tokenizer.decode(model.tokenizer.encode('a text, 12 é中'))
        said = ' '
    except InputError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 2000


@pytest.mark.parametrize('examples', [40, pytest.param(300, marks=pytest.mark.slow)])
def test_any_value_in_place_of_any_other_loads_or_is_one_line(small, tmp_path, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(sorted(name for name in small if name.endswith('.json'))), st.data(), JSON)
    def change(name, data, value):
        document = json.loads(small[name])
        # The bytes of a vocabulary are all alike: few of them are enough.
        ways = [way for way in places(document) if len(way) < 3 or way[1] != 'vocab'][:100]
        document = put(document, data.draw(st.sampled_from(ways)), value)
        check_that_it_loads_or_is_one_line(tmp_path / 'hf', small | {name: json.dumps(document).encode()})

    change()


@pytest.mark.parametrize('examples', [40, pytest.param(300, marks=pytest.mark.slow)])
def test_any_damage_to_any_file_loads_or_is_one_line(small, tmp_path, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(sorted(small)), st.integers(0, 3000), st.binary(min_size=1, max_size=8), st.integers(0, 8))
    def change(name, at, put_in, cut_out):
        data, at = small[name], at % len(small[name])
        check_that_it_loads_or_is_one_line(tmp_path / 'hf', small | {name: data[:at] + put_in + data[at + cut_out :]})

    change()


@pytest.mark.parametrize('way', ['in', 'out'])
def test_a_full_disk_leaves_nothing_of_what_was_to_be_made(tiny_gpt2, tmp_path, way, capfd):
    """A limit of a file's size stands for a full disk."""
    checkpoints.import_huggingface(tiny_gpt2, tmp_path / 'checkpoint')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    convert, source = (
        (checkpoints.import_huggingface, tiny_gpt2)
        if way == 'in'
        else (checkpoints.export_huggingface, tmp_path / 'checkpoint')
    )
    capfd.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        with pytest.raises(InputError, match=r'new cannot be written \(File too large\); free some space') as error:
            convert(source, tmp_path / 'new')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '\n' not in str(error.value)
    assert capfd.readouterr().err == ''
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint']
