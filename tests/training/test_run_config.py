import dataclasses

import ml_collections
import pytest

from gpt_jax.errors import InputError
from gpt_jax.training import RunConfig, prefer_overrides
from gpt_jax.training.config import RESUMABLE, as_dict, differing_keys

UNSET_LENGTHS = {f'train.{key}': None for key in ('steps', 'tokens', 'epochs')}


@pytest.fixture
def resolve(tiny_config):
    """A function: changed keys -> the resolved run."""
    return lambda changes=(): RunConfig.resolve(tiny_config(changes))


def test_unset_keys_come_from_the_recipe_and_set_ones_stay(resolve):
    run = resolve({'optimizer.beta2': 0.7})
    assert run.optimizer.beta2 == 0.7
    assert run.optimizer.weight_decay == 0.01  # GPT-1's
    assert resolve({'model.version': 'gpt3'}).optimizer.weight_decay == 0.1  # GPT-3's


def test_zero_and_false_are_set_and_not_unset(resolve):
    run = resolve({'optimizer.clip_norm': 0.0, 'schedule.final_fraction': 0.0, 'model.tie_embeddings': False})
    assert (run.optimizer.clip_norm, run.schedule.final_fraction, run.model.tie_embeddings) == (0.0, 0.0, False)
    assert resolve({'model.dropout': 0.0}).model.dropout == 0.0


def test_dropout_fills_the_four_rates_that_are_unset(resolve):
    model = resolve({'model.dropout': 0.2, 'model.mlp_dropout': 0.0}).model
    assert (model.embedding_dropout, model.attention_dropout, model.mlp_dropout, model.resid_dropout) == (
        0.2,
        0.2,
        0.0,
        0.2,
    )


def test_dimensions_come_from_the_preset_where_they_are_unset(resolve):
    dimensions = {f'model.{key}': None for key in ('n_layer', 'n_head', 'd_model')}
    model = resolve({'model.preset': 'gpt2-medium', 'model.block_size': 64, **dimensions}).model
    assert (model.block_size, model.n_layer, model.n_head, model.d_model) == (64, 24, 16, 1024)


@pytest.mark.parametrize('given', ['warmup_steps', 'warmup_epochs'])
def test_a_length_of_another_unit_replaces_that_of_the_recipe(resolve, given):
    unset = {f'schedule.warmup_{unit}': None for unit in ('steps', 'tokens', 'epochs')}
    run = resolve({'model.version': 'gpt3', **unit_of(unset, given)})
    assert run.schedule.warmup_tokens is None
    assert run.schedule.decay_tokens == 260_000_000_000  # another kind: the recipe's stays


def unit_of(unset, given):
    return unset | {f'schedule.{given}': 1.0 if given.endswith('epochs') else 1}


def test_a_length_on_the_command_line_replaces_that_of_the_config(tiny_config):
    config = tiny_config({**UNSET_LENGTHS, 'train.epochs': 3.0, 'schedule.decay_tokens': 100})
    config.train.tokens = 500  # as the flag has set it
    prefer_overrides(config, {'train.tokens': 500, 'optimizer.beta1': 0.5})
    run = RunConfig.resolve(config)
    assert (run.train.steps, run.train.tokens, run.train.epochs) == (None, 500, None)
    assert (run.schedule.warmup_steps, run.schedule.decay_tokens) == (2, 100)


def test_two_lengths_on_the_command_line_contradict_each_other(tiny_config):
    config = tiny_config({'train.tokens': 500})
    prefer_overrides(config, {'train.tokens': 500, 'train.steps': 6})
    with pytest.raises(InputError, match=r'train\.steps=6 and train\.tokens=500: only one'):
        RunConfig.resolve(config)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (UNSET_LENGTHS, 'the length of the run is unset: give one of train.steps, train.tokens, train.epochs'),
        ({'train.epochs': 1.0}, 'train.steps=6 and train.epochs=1.0: only one of them may be set'),
        ({'schedule.warmup_tokens': 9}, 'schedule.warmup_steps=2 and schedule.warmup_tokens=9: only one'),
        ({'schedule.decay_tokens': 9, 'schedule.decay_steps': 9}, 'schedule.decay_steps=9 and schedule.decay_tokens=9'),
        ({'train.steps': 0}, 'train.steps=0 must be positive'),
        ({'schedule.warmup_steps': -1}, 'schedule.warmup_steps=-1 must be positive'),
        ({'train.batch_size': 0}, 'train.batch_size=0 must be at least 1'),
        ({'train.accumulation_steps': 0}, 'train.accumulation_steps=0 must be at least 1'),
        ({'train.accumulation_steps': 5}, 'train.batch_size=16 is not divisible by train.accumulation_steps=5'),
        ({'train.log_every_steps': 0}, 'train.log_every_steps=0 must be at least 1'),
        ({'eval.batch_size': 0}, 'eval.batch_size=0 must be at least 1'),
        ({'preview.max_new_tokens': 0}, 'preview.max_new_tokens=0 must be at least 1'),
        ({'preview.temperature': 0.0}, 'preview.temperature=0.0 must be above 0'),
        ({'preview.top_k': -1}, 'preview.top_k=-1 must be at least 1, or 0 for all tokens'),
        ({'checkpoint.keep_latest': 0}, 'checkpoint.keep_latest=0 must be at least 1'),
        ({'model.d_model': 33}, 'model.d_model=33 is not divisible by model.n_head=2'),
        ({'model.dropout': 1.0}, 'must be at least 0 and below 1'),
        ({'model.n_layer': None}, 'model.n_layer is unset: give it, or a model.preset'),
        ({'model.version': 'gpt4'}, "model.version='gpt4' must be gpt2 or gpt3"),
        ({'model.preset': 'gpt2-tiny'}, "model.preset='gpt2-tiny' is not one of gpt2-small"),
        ({'model.version': 'gpt3', 'model.preset': 'gpt2-xl'}, "model.preset='gpt2-xl' is not a size of GPT-3"),
        ({'precision.compute': 'f16'}, "precision.compute='f16' must be one of f32, bf16, fp16"),
    ],
)
def test_an_experiment_that_cannot_be_is_named_in_one_line(resolve, changes, message):
    with pytest.raises(InputError) as error:
        resolve(changes)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_an_unknown_key_or_section_is_named(tiny_config):
    settings = tiny_config().to_dict()
    settings['train']['speed'] = 1
    with pytest.raises(InputError, match=r'^train\.speed is not a key of an experiment'):
        RunConfig.resolve(settings)
    settings = tiny_config().to_dict() | {'network': {}}
    with pytest.raises(InputError, match=r'^network is not a key of an experiment'):
        RunConfig.resolve(settings)


def test_a_missing_key_or_section_is_named(tiny_config):
    settings = tiny_config().to_dict()
    del settings['optimizer']['beta1']
    with pytest.raises(InputError, match=r'^optimizer\.beta1 is missing'):
        RunConfig.resolve(settings)
    settings = tiny_config().to_dict()
    del settings['mesh']
    with pytest.raises(InputError, match=r'^mesh is missing'):
        RunConfig.resolve(ml_collections.ConfigDict(settings))


def test_the_given_config_is_not_changed(tiny_config):
    config = tiny_config()
    before = config.to_dict()
    RunConfig.resolve(config)
    assert config.to_dict() == before


def test_the_vocabulary_is_the_tokenizers_unless_it_is_set(resolve):
    assert resolve().model_config(77).vocab_size == 77
    run = resolve({'model.vocab_size': 80})
    assert run.model_config(77).vocab_size == 80
    with pytest.raises(InputError, match=r'model\.vocab_size=80 is smaller than the 81 tokens'):
        run.model_config(81)


def test_the_models_config_takes_every_setting(resolve):
    changes = {'model.mlp_expansion': 3, 'model.tie_embeddings': False, 'model.scan_layers': True}
    config = resolve(changes | {'precision.compute': 'bf16', 'model.dropout': 0.3}).model_config(50)
    assert (config.mlp_expansion, config.tie_embeddings, config.scan_layers) == (3, False, True)
    assert (config.compute_dtype, config.resid_dropout, config.n_layer) == ('bf16', 0.3, 2)


def test_what_differs_is_named_with_both_values_and_what_may_differ_is_not(resolve):
    old = as_dict(resolve())
    new = as_dict(resolve({'optimizer.beta1': 0.5, 'train.steps': 99, 'mesh.fsdp': 2, 'preview.prompt': 'x'}))
    assert differing_keys(old, new) == ['optimizer.beta1: 0.9 -> 0.5']
    assert differing_keys(old, old) == []


def test_a_key_that_one_of_them_lacks_differs(resolve):
    old, new = as_dict(resolve()), as_dict(resolve())
    del old['train']['seed']
    del new['data']['tokenizer']
    assert differing_keys(old, new) == ['data.tokenizer: char -> None', 'train.seed: None -> 0']


def test_only_what_changes_no_step_may_differ_on_resume(resolve):
    run = as_dict(resolve())
    allowed = {f'{s}.{k}' for s, values in run.items() for k in values if f'{s}.{k}'.startswith(RESUMABLE)}
    sections = ('mesh', 'preview', 'checkpoint')
    expected = {f'{section}.{key}' for section in sections for key in run[section]}
    expected |= {'eval.every_steps', 'train.log_every_steps', 'train.steps', 'train.tokens', 'train.epochs'}
    assert allowed == expected | {'data.streaming', 'data.num_workers', 'data.cache_dir'}


def test_a_run_is_frozen(resolve):
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().train.steps = 1
