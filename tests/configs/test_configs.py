"""Every shipped experiment loads, resolves, and describes a run that could be started."""

import ast
import importlib
import pathlib
import re

import jax
import pytest

from gpt_jax.config import FIELDS, as_dict
from gpt_jax.models import GPT, PRESETS
from gpt_jax.parallel import MeshConfig, make_mesh
from gpt_jax.training import resolve
from gpt_jax.training.optimizer import lengths, make_optimizer, make_schedule
from gpt_jax.training.recipe import model_config
from gpt_jax.training.step import abstract_state

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'configs'
GPT3_SIZES = ('125m', '350m', '760m', '1.3b', '2.7b', '6.7b', '13b', '175b', 'ada', 'babbage', 'curie', 'davinci')
DELTAS = sorted(path.stem for path in FOLDER.glob('*.py') if path.stem not in ('__init__', 'base'))
EXPERIMENTS = [(name, ()) for name in DELTAS] + [('gpt3', (size,)) for size in GPT3_SIZES]


def load(name, *arguments):
    return importlib.import_module(f'configs.{name}').get_config(*arguments)


def keys(config):
    return {f'{section}.{key}' for section, values in config.to_dict().items() for key in values}


def test_every_key_of_base_is_a_field_of_the_dataclasses_and_every_field_a_key():
    assert keys(load('base')) == {f'{section}.{name}' for section, name, _ in FIELDS}


def test_base_alone_says_what_is_missing():
    with pytest.raises(ValueError, match=r'model\.block_size is unset'):
        resolve(load('base'))


@pytest.mark.parametrize(('name', 'arguments'), EXPERIMENTS, ids=lambda value: ''.join(value) or 'default')
def test_an_experiment_is_a_small_change_of_base_that_makes_a_run(name, arguments, tiny_gpt2):
    config = load(name, *arguments)
    assert keys(config) == keys(load('base'))
    if config.train.init_from is not None:  # weights that the reader has, and a test has not
        config.train.init_from = str(tiny_gpt2)
    run = resolve(config)
    # What the data room finds out from the corpus: stands for a vocabulary, and for the windows of an epoch.
    vocab_size = {'gpt2': 50257, 'char': 65, 'bpe': run.data.vocab_size}[run.data.tokenizer]
    resolved = lengths(run, windows_per_epoch=50_000)
    assert 0 <= resolved.warmup < resolved.decay
    assert resolved.total > 0
    model = GPT(model_config(run, run.model.vocab_size or vocab_size))
    schedule = make_schedule(run, resolved)
    # Every published size can be split over eight devices, of which no memory is taken.
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), devices=jax.devices())
    state = abstract_state(model, make_optimizer(run.optimizer, schedule), mesh)
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * run.model.d_model
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == model.config.num_parameters + padding
    kernel = state.params['blocks']['mlp']['up']['kernel']
    assert kernel.sharding.shard_shape(kernel.shape)[1] == run.model.d_model // 8


@pytest.mark.parametrize(
    ('name', 'preset'),
    [*((f'gpt2_{size}', f'gpt2-{size}') for size in ('small', 'medium', 'large', 'xl')), *(
        (f'gpt3:{size}', f'gpt3-{size}') for size in GPT3_SIZES
    )],
)  # fmt: skip
def test_a_published_size_is_that_of_its_preset(name, preset):
    name, _, argument = name.partition(':')
    model = resolve(load(name, *filter(None, [argument]))).model
    expected = PRESETS[preset]
    for key in ('block_size', 'n_layer', 'n_head', 'd_model'):
        assert getattr(model, key) == getattr(expected, key)


def test_the_sizes_of_gpt3_are_all_of_the_presets():
    assert {f'gpt3-{size}' for size in GPT3_SIZES} == {name for name in PRESETS if name.startswith('gpt3-')}
    assert importlib.import_module('configs.gpt3').SIZES == GPT3_SIZES
    with pytest.raises(ValueError, match='there is no size'):
        load('gpt3', '4b')


def test_an_experiment_resolves_to_the_same_from_a_dict_and_from_itself():
    config = load('smoke')
    run = resolve(config)
    assert resolve(config.to_dict()) == run
    assert resolve(run) is run
    assert resolve(as_dict(run)) == run


@pytest.mark.parametrize('name', DELTAS)
def test_a_docstring_gives_the_command(name):
    docstring = ast.get_docstring(ast.parse((FOLDER / f'{name}.py').read_text(encoding='utf-8')))
    assert re.search(rf'python -m gpt_jax\.main --config=configs/{name}\.py', docstring)


def test_keys_are_words_with_their_unit():
    assert [key for key in keys(load('base')) if not re.fullmatch(r'[a-z]+\.[a-z]+[0-9]?(_[a-z]+)*', key)] == []
