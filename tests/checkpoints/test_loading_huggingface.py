"""A Hugging Face directory named as a checkpoint."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

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
        # Nothing else is on a device, least of all a whole matrix.
        assert len({id(array) for array in jax.live_arrays()} - before) == len(jax.tree.leaves(loaded))
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
