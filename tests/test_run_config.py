"""The keys of an experiment: filled in, checked, recorded, compared; and what is derived from them."""

import dataclasses
import json
import math
import pathlib
import types

import ml_collections
import numpy as np
import pytest

from gpt_jax.config import (
    FIELDS,
    FORMAT,
    SECTIONS,
    WEIGHTS_KEYS,
    as_dict,
    as_record,
    base,
    differing_keys,
    help_text,
    parse,
    prefer_overrides,
    read_record,
)
from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig
from gpt_jax.training import resolve
from gpt_jax.training.recipe import model_config

# Records of runs as earlier versions wrote them: config-FORMAT-NAME.json, and keys-FORMAT.txt with their keys.
GOLDEN = pathlib.Path(__file__).parent / 'golden'

UNSET_LENGTHS = {f'train.{key}': None for key in ('steps', 'tokens', 'epochs')}


@pytest.fixture
def resolved(tiny_config):
    """A function: changed keys -> the resolved run."""
    return lambda changes=(): resolve(tiny_config(changes))


def test_unset_keys_come_from_the_recipe_and_set_ones_stay(resolved):
    run = resolved({'optimizer.beta2': 0.7})
    assert run.optimizer.beta2 == 0.7
    assert run.optimizer.weight_decay == 0.01  # GPT-1's
    assert resolved({'model.version': 'gpt3'}).optimizer.weight_decay == 0.1  # GPT-3's


def test_zero_and_false_are_set_and_not_unset(resolved):
    run = resolved({'optimizer.clip_norm': 0.0, 'schedule.final_fraction': 0.0, 'model.tie_embeddings': False})
    assert (run.optimizer.clip_norm, run.schedule.final_fraction, run.model.tie_embeddings) == (0.0, 0.0, False)
    assert resolved({'model.dropout': 0.0}).model.dropout == 0.0


def test_dropout_fills_the_four_rates_that_are_unset(resolved):
    model = resolved({'model.dropout': 0.2, 'model.mlp_dropout': 0.0}).model
    assert (model.embedding_dropout, model.attention_dropout, model.mlp_dropout, model.resid_dropout) == (
        0.2,
        0.2,
        0.0,
        0.2,
    )


def test_dimensions_come_from_the_preset_where_they_are_unset(resolved):
    dimensions = {f'model.{key}': None for key in ('n_layer', 'n_head', 'd_model')}
    model = resolved({'model.preset': 'gpt2-medium', 'model.block_size': 64, **dimensions}).model
    assert (model.block_size, model.n_layer, model.n_head, model.d_model) == (64, 24, 16, 1024)


@pytest.mark.parametrize('given', ['warmup_steps', 'warmup_epochs'])
def test_a_length_of_another_unit_replaces_that_of_the_recipe(resolved, given):
    unset = {f'schedule.warmup_{unit}': None for unit in ('steps', 'tokens', 'epochs')}
    run = resolved({'model.version': 'gpt3', **unit_of(unset, given)})
    assert run.schedule.warmup_tokens is None
    assert run.schedule.decay_tokens == 260_000_000_000  # another kind: the recipe's stays


def unit_of(unset, given):
    return unset | {f'schedule.{given}': 1.0 if given.endswith('epochs') else 1}


def test_a_length_on_the_command_line_replaces_that_of_the_config(tiny_config):
    config = tiny_config({**UNSET_LENGTHS, 'train.epochs': 3.0, 'schedule.decay_tokens': 100})
    config.train.tokens = 500  # as the flag has set it
    prefer_overrides(config, {'train.tokens': 500, 'optimizer.beta1': 0.5})
    run = resolve(config)
    assert (run.train.steps, run.train.tokens, run.train.epochs) == (None, 500, None)
    assert (run.schedule.warmup_steps, run.schedule.decay_tokens) == (2, 100)


def test_two_lengths_on_the_command_line_contradict_each_other(tiny_config):
    config = tiny_config({'train.tokens': 500})
    prefer_overrides(config, {'train.tokens': 500, 'train.steps': 6})
    with pytest.raises(InputError, match=r'train\.steps=6 and train\.tokens=500: only one'):
        resolve(config)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (UNSET_LENGTHS, 'the length of the run is unset: give one of train.steps, train.tokens, train.epochs'),
        ({'train.epochs': 1.0}, 'train.steps=6 and train.epochs=1.0: only one of them may be set'),
        ({'schedule.warmup_tokens': 9}, 'schedule.warmup_steps=2 and schedule.warmup_tokens=9: only one'),
        ({'schedule.decay_tokens': 9, 'schedule.decay_steps': 9}, 'schedule.decay_steps=9 and schedule.decay_tokens=9'),
        ({'train.steps': 0}, 'train.steps=0 must be at least 1 and at most 2147483646'),
        ({'schedule.warmup_steps': -1}, 'schedule.warmup_steps=-1 must be at least 0'),
        ({'train.batch_size': 0}, 'train.batch_size=0 must be at least 1'),
        ({'train.accumulation_steps': 0}, 'train.accumulation_steps=0 must be at least 1'),
        ({'train.accumulation_steps': 5}, 'train.batch_size=16 is not divisible by train.accumulation_steps=5'),
        ({'train.log_every_steps': 0}, 'train.log_every_steps=0 must be at least 1'),
        ({'eval.batch_size': 0}, 'eval.batch_size=0 must be at least 1'),
        ({'preview.max_new_tokens': 0}, 'preview.max_new_tokens=0 must be at least 1'),
        ({'preview.temperature': 0.0}, 'preview.temperature=0.0 must be above 0'),
        ({'preview.top_k': -1}, 'preview.top_k=-1 must be at least 0'),
        ({'checkpoint.keep_latest': 0}, 'checkpoint.keep_latest=0 must be at least 1'),
        ({'model.d_model': 33}, 'model.d_model=33 is not divisible by model.n_head=2'),
        ({'model.dropout': 1.0}, 'must be at least 0 and below 1'),
        ({'model.n_layer': None}, 'model.n_layer is unset: give it, or a model.preset'),
        ({'model.version': 'gpt4'}, "model.version='gpt4' must be one of gpt2, gpt3"),
        ({'model.preset': 'gpt2-tiny'}, "model.preset='gpt2-tiny' is not one of gpt2-small"),
        ({'model.version': 'gpt3', 'model.preset': 'gpt2-xl'}, "model.preset='gpt2-xl' is not a size of GPT-3"),
        ({'precision.compute': 'f16'}, "precision.compute='f16' must be one of f32, bf16, fp16"),
    ],
)
def test_an_experiment_that_cannot_be_is_named_in_one_line(resolved, changes, message):
    with pytest.raises(InputError) as error:
        resolved(changes)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


IMPOSSIBLE = {
    'optimizer.learning_rate': (0.0, -1.0, math.nan, math.inf, 1e39),
    'optimizer.beta1': (-0.1, 1.0, 1 - 1e-9),  # the last one is 1 in float32
    'optimizer.beta2': (-0.1, 1.0, 2.0),
    'optimizer.epsilon': (0.0, -1e-8, 1e-46),  # the last one is 0 in float32
    'optimizer.weight_decay': (-1.0,),
    'optimizer.clip_norm': (-1.0, math.nan),
    'schedule.warmup_epochs': (-1.0,),
    'schedule.decay_steps': (0, -5),
    'schedule.final_fraction': (2.0, -0.1),
    'train.epochs': (0.0, -1.0, math.inf),
    'train.steps': (0, 2**31 - 1, 10**30),
    'train.seed': (-1, 2**32, 2**64),
    'eval.every_steps': (-1,),
    'checkpoint.every_steps': (-500,),
    'checkpoint.keep_best': (-1,),
    'preview.every_steps': (-1,),
    'preview.max_new_tokens': (0, 10**12),
    'mesh.fsdp': (-2,),
    'model.n_layer': (0, 10**9),
    'model.d_model': (0, 2**40),
    'model.mlp_expansion': (0, 10**12),
    'model.layer_norm_epsilon': (0.0, -1e-5, math.nan),
    'model.attention_dropout': (-0.1, 1.0),
    'model.remat': ('some', ''),
    'data.path': ('',),
    'data.mixture': ('',),
    'data.corpus': ('',),
    'data.tokenizer': ('',),
    'data.cache_dir': ('',),
    'data.documents': ('line',),
    'data.num_workers': (0, 10**9),
    'data.validation_fraction': (0.0, 1.0, math.nan),
    'train.init_from': ('',),
    'checkpoint.restore_from': ('',),
    'checkpoint.restore_items': ('optimizer', ''),
}


@pytest.mark.parametrize(('name', 'value'), [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_what_cannot_be_meant_is_refused_by_name_from_every_entrance(tiny_config, name, value):
    section, key = name.split('.')
    settings = tiny_config().to_dict()
    settings[section][key] = value
    cls = SECTIONS[section]
    for entrance in (
        lambda: parse(settings),
        lambda: parse(ml_collections.ConfigDict(settings)),
        lambda: cls(**settings[section]),
    ):
        with pytest.raises(InputError) as error:
            entrance()
        assert f'{name}={value!r} must be ' in str(error.value)


@pytest.mark.parametrize(
    ('section', 'name', 'field'), FIELDS, ids=lambda value: value if isinstance(value, str) else ''
)
def test_every_key_takes_the_ends_of_its_range_and_nothing_beyond(section, name, field):
    bounds, given = field.metadata['bounds'], SECTIONS[section]().__dict__
    is_whole = 'int' in str(field.type)

    def takes(value):
        try:
            return getattr(SECTIONS[section](**given | {name: value}), name) == value
        except InputError:
            return False

    def beyond(value, direction):
        return value + direction if is_whole else math.nextafter(value, direction * math.inf)

    for word, bound in bounds.items():
        outwards = -1 if word in ('least', 'above') else 1
        assert takes(bound) == (word in ('least', 'most'))
        assert not takes(beyond(bound, outwards))
        assert takes(beyond(bound, -outwards))
    if field.metadata['choices']:
        assert all(takes(choice) for choice in field.metadata['choices'])
        assert not takes('something else')
    assert field.default is None or takes(field.default)
    # A number without any bound is one that nobody thought of.
    assert bounds or not ({'int', 'float'} & set(str(field.type).replace('|', ' ').split()))


def test_a_number_of_more_digits_than_python_writes_is_one_line(tiny_config):
    settings = tiny_config().to_dict()
    settings['train']['steps'] = 10**5000
    with pytest.raises(
        InputError, match=r'train\.steps=a number of 16,610 bits must be a whole number that int64 holds'
    ):
        parse(settings)


def test_an_unknown_key_or_section_is_named(tiny_config):
    settings = tiny_config().to_dict()
    settings['train']['speed'] = 1
    with pytest.raises(InputError, match=r'^train\.speed is not a key of an experiment'):
        resolve(settings)
    settings = tiny_config().to_dict() | {'network': {}}
    with pytest.raises(InputError, match=r'^network is not a key of an experiment'):
        resolve(settings)


def test_a_missing_key_or_section_is_named(tiny_config):
    settings = tiny_config().to_dict()
    del settings['optimizer']['beta1']
    with pytest.raises(InputError, match=r'^optimizer\.beta1 is missing'):
        resolve(settings)
    settings = tiny_config().to_dict()
    del settings['mesh']
    with pytest.raises(InputError, match=r'^mesh is missing'):
        resolve(ml_collections.ConfigDict(settings))


def test_the_given_config_is_not_changed(tiny_config):
    config = tiny_config()
    before = config.to_dict()
    resolve(config)
    assert config.to_dict() == before


def test_the_vocabulary_is_the_tokenizers_unless_it_is_set(resolved):
    assert model_config(resolved(), 77).vocab_size == 77
    run = resolved({'model.vocab_size': 80})
    assert model_config(run, 77).vocab_size == 80
    with pytest.raises(InputError, match=r'model\.vocab_size=80 is smaller than the 81 tokens'):
        model_config(run, 81)


def test_the_models_config_takes_every_setting(resolved):
    changes = {'model.mlp_expansion': 3, 'model.tie_embeddings': False, 'model.scan_layers': True}
    config = model_config(resolved(changes | {'precision.compute': 'bf16', 'model.dropout': 0.3}), 50)
    assert (config.mlp_expansion, config.tie_embeddings, config.scan_layers) == (3, False, True)
    assert (config.compute_dtype, config.resid_dropout, config.n_layer) == ('bf16', 0.3, 2)


# Types, from every entrance

WRONG_TYPES = [
    ('train.steps', '6', "train.steps='6' must be a whole number"),
    ('train.steps', 6.0, 'train.steps=6.0 must be a whole number'),
    ('train.steps', True, 'train.steps=True must be a whole number'),
    ('train.seed', None, 'train.seed=None must be a whole number'),
    ('optimizer.learning_rate', '1e-3', "optimizer.learning_rate='1e-3' must be a number"),
    ('optimizer.learning_rate', float('nan'), 'optimizer.learning_rate=nan must be a number'),
    ('model.dropout', False, 'model.dropout=False must be a number'),
    ('model.tie_embeddings', 1, 'model.tie_embeddings=1 must be True or False'),
    ('data.path', 3, 'data.path=3 must be text'),
    ('mesh.fsdp', [2], r'mesh.fsdp=[2] must be a whole number'),
]


def refusal(call, *arguments, **settings):
    with pytest.raises(InputError) as error:
        call(*arguments, **settings)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(('name', 'value', 'message'), WRONG_TYPES)
def test_a_value_of_another_type_is_refused_from_every_entrance(tiny_config, resolved, name, value, message):
    section, key = name.split('.')
    settings = tiny_config().to_dict()
    settings[section][key] = value
    assert refusal(resolve, settings) == message
    assert refusal(resolve, ml_collections.ConfigDict(settings)) == message
    part = getattr(resolved(), section)
    assert refusal(dataclasses.replace, part, **{key: value}) == message
    record = as_record(resolved())
    record[section][key] = value
    assert refusal(read_record, record) == message


def test_whole_numbers_are_numbers_and_numpys_are_pythons(tiny_config):
    settings = tiny_config({'model.dropout': 0.0}).to_dict()
    settings['optimizer']['learning_rate'], settings['train']['batch_size'] = 1, np.int64(16)
    run = resolve(settings)
    assert (run.optimizer.learning_rate, type(run.optimizer.learning_rate)) == (1.0, float)
    assert (run.train.batch_size, type(run.train.batch_size)) == (16, int)


# Derived from the keys


def test_base_gives_every_key_its_default_and_leaves_the_rest_unset():
    config = base()
    for section, name, field in FIELDS:
        unset = field.default is None or field.metadata['unset']
        assert config[section][name] == (None if unset else field.default)
        assert len(field.metadata['doc']) > 5
    with pytest.raises(TypeError):
        config.train.steps = 'six'  # a placeholder knows its type


def test_the_help_of_keys_names_each_with_type_default_and_meaning():
    lines = help_text().splitlines()
    for section, name, _ in FIELDS:
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f'  --config.{section}.{name}  (')]
        assert lines[at + 1].strip()
    assert '  --config.train.accumulation_steps  (int, 1; may change on resume)' in lines
    assert '  --config.data.tokenizer  (str, unset)' in lines


def test_what_weights_bring_along_is_the_architecture_and_the_rest_is_the_runs_own():
    own = {f'{kind}_dropout' for kind in ('embedding', 'attention', 'mlp', 'resid')}
    own |= {'remat', 'scan_layers', 'compute_dtype'}
    assert {field.name for field in dataclasses.fields(GPTConfig)} == {*WEIGHTS_KEYS, *own}


# Records of runs, and resuming


def test_what_differs_is_named_with_both_values_and_what_may_differ_is_not(resolved):
    old = as_record(resolved())
    new = resolved({'optimizer.beta1': 0.5, 'train.steps': 99, 'mesh.fsdp': 2, 'preview.prompt': 'x'})
    assert differing_keys(old, new) == ['optimizer.beta1: 0.9 -> 0.5']
    assert differing_keys(old, resolved()) == []


def test_only_what_changes_no_function_may_differ_on_resume():
    allowed = {f'{section}.{name}' for section, name, field in FIELDS if field.metadata['resume']}
    sections = ('mesh', 'preview', 'checkpoint', 'eval')
    expected = {f'{section}.{name}' for section, name, _ in FIELDS if section in sections}
    expected |= {'train.log_every_steps', 'train.accumulation_steps', 'train.steps', 'train.tokens', 'train.epochs'}
    expected |= {'model.remat', 'model.scan_layers'}
    # What guards a run, or is kept beside it, may begin when the need shows.
    expected |= {'train.max_skipped_in_a_row', 'train.spike_window_steps', 'optimizer.ema_decay'}
    expected |= {'train.spike_loss_deviations', 'train.spike_grad_norm_deviations'}
    expected |= {'train.norms_every_steps', 'train.trackers', 'train.hang_seconds', 'train.ends_when_hung'}
    expected |= {'data.path', 'data.streaming', 'data.num_workers', 'data.cache_dir'}
    expected -= {'checkpoint.restore_from', 'checkpoint.restore_items'}  # another one makes another run
    assert allowed == expected


def test_a_record_goes_through_json_and_comes_back_the_same(resolved):
    run = resolved({'model.version': 'gpt3'})
    assert read_record(json.loads(json.dumps(as_record(run)))) == run


@pytest.mark.parametrize('path', sorted(GOLDEN.glob('config-*.json')), ids=lambda path: path.stem)
def test_a_record_of_an_earlier_version_is_read_and_its_run_may_go_on(path):
    record = json.loads(path.read_text(encoding='utf-8'))
    run = read_record(record)
    for section, name, field in FIELDS:
        record[section].setdefault(name, field.default)  # a key that was added since
    assert as_dict(run) == record
    # The same experiment, resolved by today's code, differs in nothing.
    weights = Weights(record['train']['init_from'], model_config(run, 1)) if record['train']['init_from'] else None
    assert differing_keys(record, resolve(as_dict(run), weights)) == []


@dataclasses.dataclass
class Weights:
    """What `resolve` is told of weights."""

    path: str
    model: GPTConfig

    @property
    def tokenizer(self):
        return types.SimpleNamespace(kind='char')


@pytest.mark.parametrize('number', range(len(FIELDS)), ids=lambda number: '.'.join(FIELDS[number][:2]))
def test_a_key_that_a_record_lacks_has_its_default(resolved, number):
    """So that a key added later, whose default means what was before it, lets every earlier run resume."""
    section, name, field = FIELDS[number]
    run = resolved()
    record = as_dict(run)
    del record[section][name]
    value = getattr(getattr(run, section), name)
    same = value == field.default or field.metadata['resume']
    assert differing_keys(record, run) == ([] if same else [f'{section}.{name}: {field.default} -> {value}'])


def test_a_record_of_a_newer_version_or_with_an_unknown_key_is_refused_in_one_line(resolved):
    record = as_record(resolved())
    message = refusal(differing_keys, record | {'format': FORMAT + 1}, resolved(), 'runs/x/config.json')
    assert message.startswith(f'runs/x/config.json was written by a newer gpt_jax (format {FORMAT + 1} ')
    assert message.endswith('update gpt_jax')
    message = refusal(read_record, record | {'train': record['train'] | {'speed': 1}})
    assert 'train.speed is not a key' in message
    assert 'network is no section' in refusal(read_record, record | {'network': {}})


def test_every_change_of_the_keys_has_a_number_of_its_own():
    """A key that is added, renamed or removed takes another FORMAT, and its list of keys beside this test."""
    names = [f'{section}.{name}' for section, name, _ in FIELDS]
    assert (GOLDEN / f'keys-{FORMAT}.txt').read_text(encoding='utf-8').split() == names


def test_a_run_is_frozen(resolved):
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved().train.steps = 1
