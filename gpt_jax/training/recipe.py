"""How GPT-2 and GPT-3 were trained, every value with its source, and how an experiment's unset keys are filled.

A source begins with "paper" and the section, or with "assumed" and whose habit it is: what a paper does not tell.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpt_jax.config import FIELDS, LENGTHS, WEIGHTS_KEYS, RunConfig, as_dict, parse, read_record
from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import gpt2
from gpt_jax.errors import InputError
from gpt_jax.models import PRESETS, GPTConfig
from gpt_jax.models.config import ASSUMED_BAND_SIZE

if TYPE_CHECKING:
    from gpt_jax.checkpoints import PretrainedWeights


@dataclasses.dataclass(frozen=True)
class Value:
    """One value of a recipe, and where it is from."""

    value: Any
    source: str


GPT1 = 'assumed: unpublished for GPT-2, GPT-1 paper section 4.1'
GPT3 = 'paper: GPT-3, appendix B'
TABLE = 'paper: GPT-3, table 2.1'

GPT2_KEYS = {
    'model.attention_pattern': Value('dense', 'paper: GPT-2, section 2.3, as in GPT-1'),
    'model.dropout': Value(0.1, GPT1),
    'optimizer.learning_rate': Value(2.5e-4, f'{GPT1}; GPT-2 section 2.3 says it was tuned by hand for each size'),
    'optimizer.beta1': Value(0.9, "assumed: Adam's default, as in GPT-1's code"),
    'optimizer.beta2': Value(0.999, "assumed: Adam's default, as in GPT-1's code"),
    'optimizer.epsilon': Value(1e-8, "assumed: Adam's default, as in GPT-1's code"),
    'optimizer.weight_decay': Value(0.01, GPT1),
    'optimizer.clip_norm': Value(1.0, "assumed: GPT-1's code"),
    'schedule.warmup_steps': Value(2000, GPT1),
    'schedule.final_fraction': Value(0.0, f'{GPT1}: cosine to 0, over the whole run'),
    'train.batch_size': Value(512, 'paper: GPT-2, section 2.3'),
}

GPT3_KEYS = {
    'model.attention_pattern': Value('alternating', 'paper: GPT-3, section 2.1'),
    'model.dropout': Value(0.0, 'assumed: the paper states none'),
    'optimizer.beta1': Value(0.9, GPT3),
    'optimizer.beta2': Value(0.95, GPT3),
    'optimizer.epsilon': Value(1e-8, GPT3),
    'optimizer.weight_decay': Value(0.1, GPT3),
    'optimizer.clip_norm': Value(1.0, GPT3),
    'schedule.warmup_tokens': Value(375_000_000, GPT3),
    'schedule.decay_tokens': Value(260_000_000_000, GPT3),
    'schedule.final_fraction': Value(0.1, GPT3),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A row of GPT-3's table 2.1.

    Attributes:
      learning_rate: at its peak.
      batch_size: sequences of 2048 tokens (0.5M tokens = 256 of them, 1M = 512, 2M = 1024, 3.2M = 1600).
      ramp_tokens: over which the batch grows to its full size. Appendix B says "over the first 4-12 billion tokens of
        training, depending on the model size" and no more: which size has which is assumed here.
    """

    learning_rate: float
    batch_size: int
    ramp_tokens: int


GPT3_SIZES = {
    'gpt3-125m': Size(6.0e-4, 256, 4_000_000_000),
    'gpt3-350m': Size(3.0e-4, 256, 4_000_000_000),
    'gpt3-760m': Size(2.5e-4, 256, 4_000_000_000),
    'gpt3-1.3b': Size(2.0e-4, 512, 6_000_000_000),
    'gpt3-2.7b': Size(1.6e-4, 512, 6_000_000_000),
    'gpt3-6.7b': Size(1.2e-4, 1024, 8_000_000_000),
    'gpt3-13b': Size(1.0e-4, 1024, 8_000_000_000),
    'gpt3-175b': Size(0.6e-4, 1600, 12_000_000_000),
}

# Facts of a training that no key holds: they are printed, and training does not read them.
GPT2_FACTS = {
    'context': Value(1024, 'paper: GPT-2, section 2.3'),
    'training_tokens': Value(None, 'assumed: none; the paper tells neither steps nor epochs'),
    'batch_ramp': Value(None, 'assumed: none, the paper mentions none'),
}
GPT3_FACTS = {
    'context': Value(2048, 'paper: GPT-3, section 2.1'),
    'band_size': Value(ASSUMED_BAND_SIZE, "assumed: GPT-Neo's window, the paper gives none"),
    'training_tokens': Value(300_000_000_000, TABLE),
    'ramp_first_tokens': Value(32_000, GPT3),
}

# Rows of table 2.1 that contradict themselves, since heads x head width must be d_model.
CORRECTIONS = {
    'gpt3-1.3b': (
        'Table 2.1 gives 24 heads of 128 at width 2048, but 24 x 128 = 3072: here 16 heads of 128, '
        'which makes the 1.3 billion parameters of its name.'
    ),
    'gpt3-13b': (
        'Table 2.1 gives width 5140 with 40 heads of 128, but 40 x 128 = 5120: here width 5120, '
        'which makes the 13 billion parameters of its name.'
    ),
}

# The suite's tiers, and a GPT-3 of no published size, take the values of the paper's row nearest in parameters.
SUITE_TIERS = {
    'gpt3-ada': 'gpt3-125m',
    'gpt3-babbage': 'gpt3-350m',
    'gpt3-curie': 'gpt3-2.7b',
    'gpt3-davinci': 'gpt3-175b',
}


def recipe_values(version: str, preset: str | None = None) -> dict[str, Value]:
    """The values of 'section.key' for `model.version` and, where one is named, `model.preset`.

    Raises:
      InputError: there is no such version, or the preset is of another.
    """
    if version == 'gpt2':
        return dict(GPT2_KEYS)
    size, row_source = _row(version, preset)
    return GPT3_KEYS | {
        'optimizer.learning_rate': Value(size.learning_rate, row_source),
        'train.batch_size': Value(size.batch_size, row_source),
    }


def facts(version: str, preset: str | None = None) -> dict[str, Value]:
    """What is known of the training besides the keys: `context`, `training_tokens`, `band_size`, the batch's ramp.

    Counts are in tokens; a value of None is not published. `gpt3` has its batch grow from `ramp_first_tokens` to the
    full one over `ramp_tokens`; a run does so with `schedule.batch_ramp_tokens`.

    Raises:
      InputError: as `recipe_values`.
    """
    if version == 'gpt2':
        return dict(GPT2_FACTS)
    size, _ = _row(version, preset)
    source = f'assumed: {GPT3.removeprefix("paper: ")} says 4 to 12 billion, "depending on the model size"'
    return GPT3_FACTS | {'ramp_tokens': Value(size.ramp_tokens, source)}


def provenance(settings: dict[str, dict[str, Any]]) -> dict[str, Value]:
    """Every value of the recipe as an experiment has it, and where it is from.

    Args:
      settings: section -> key -> value, filled in (`RunConfig` as dicts).

    Returns:
      'section.key' -> the experiment's value and a source: the recipe's, or "set by the config" with the recipe's
      value and source behind it, where the two differ.
    """
    model = settings['model']
    found = {}
    for name, recipe_value in recipe_values(model['version'], model['preset']).items():
        section, key = name.split('.')
        alike = next((keys for group, keys in LENGTHS.items() if group[0] == section and key in keys), (key,))
        given = next((other for other in alike if settings[section][other] is not None), key)
        value = settings[section][given]
        same = given == key and value == recipe_value.value
        differs = f'set by the config; {key}={_number(recipe_value.value)} ({recipe_value.source})'
        found[f'{section}.{given}'] = Value(value, recipe_value.source if same else differs)
    return found


def _number(value: Any) -> str:
    return f'{value:,}' if isinstance(value, int) else str(value)


def notes(preset: str | None) -> list[str]:
    """What a reader must be told of a published size: sentences."""
    found = [CORRECTIONS[preset]] if preset in CORRECTIONS else []
    if preset in SUITE_TIERS:
        found.append(
            f"A tier of the PyTorch suite, not a row of the paper's table: learning rate, batch and ramp are "
            f'those of {SUITE_TIERS[preset]}, the row nearest in parameters.'
        )
    return found


def _row(version: str, preset: str | None) -> tuple[Size, str]:
    """The row of GPT-3's table that a preset takes its values from, and the source to give for them."""
    if version != 'gpt3':
        raise InputError(f'model.version={version!r} must be gpt2 or gpt3')
    row = SUITE_TIERS.get(preset, preset) or 'gpt3-125m'
    if row not in GPT3_SIZES:
        raise InputError(f'model.preset={preset!r} is not a size of GPT-3, but model.version is gpt3; set them alike')
    return GPT3_SIZES[row], TABLE if row == preset else f'assumed: as {row} in {TABLE}'


def resolve(config: Mapping[str, Any] | RunConfig, weights: 'PretrainedWeights | None' = None) -> RunConfig:
    """The experiment with its unset keys filled in, and checked: nothing is left to a recipe.

    From the preset, the weights that the run starts from, the recipe, and the defaults, in this order.

    Args:
      config: a ConfigDict of `gpt_jax.config.base`'s keys, nested dicts, or a RunConfig.
      weights: what `train.init_from` or `checkpoint.restore_from` names, where the caller has found it already.

    Raises:
      InputError: a key is missing, unknown, of another type or out of range, two keys contradict each other or the
        weights, or these cannot be found.
    """
    given = parse(config)
    if weights is None:
        weights = find_beginning(given)
    settings = as_dict(given)
    model = settings['model']
    if model['preset'] is not None:
        if model['preset'] not in PRESETS:
            raise InputError(f'model.preset={model["preset"]!r} is not one of {", ".join(PRESETS)}')
        for name in ('block_size', 'n_layer', 'n_head', 'd_model', 'attention_pattern'):
            if model[name] is None:
                model[name] = getattr(PRESETS[model['preset']], name)
    if weights is not None:
        _take_over(settings, weights)
    lengths_given = {group for group, names in LENGTHS.items() if any(settings[group[0]][n] is not None for n in names)}
    for full_name, value in recipe_values(model['version'], model['preset']).items():
        section, name = full_name.split('.')
        replaced = any(group in lengths_given and group[0] == section and name in LENGTHS[group] for group in LENGTHS)
        if settings[section][name] is None and not replaced:
            settings[section][name] = value.value
    for name in ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout'):
        if model[name] is None:
            model[name] = model['dropout']
    for section, name, field in FIELDS:
        if settings[section][name] is None:
            settings[section][name] = field.default
    for field in dataclasses.fields(GPTConfig):
        if field.default is not dataclasses.MISSING and model.get(field.name, 0) is None:
            # n_inner stands in place of mlp_expansion
            model[field.name] = None if field.name == 'mlp_expansion' and model['n_inner'] else field.default
    for name in ('block_size', 'n_layer', 'n_head', 'd_model'):
        if model[name] is None:
            raise InputError(f'model.{name} is unset: give it, or a model.preset')
    run = parse(settings)
    model_config(run, run.model.vocab_size or 1)
    run.check()
    return given if run == given else run


def find_beginning(
    given: RunConfig, recorded: Mapping[str, Any] | None = None, verify: bool = False
) -> 'PretrainedWeights | None':
    """What `train.init_from` or `checkpoint.restore_from` names; None where the experiment has neither.

    Args:
      given: the experiment, as `parse` makes it.
      recorded: the description of the checkpoint that the run goes on from, if it has one of its own: the other run is
        then needed no more, and `found` is None.
      verify: whether every byte of what `restore_from` names is held against its sha256, by all processes together.

    Raises:
      InputError: as `find_initial_weights`, or there is no run to go on from.
    """
    path = given.checkpoint.restore_from
    if path is None:
        path, weights = given.train.init_from, given.train.init_weights
        return None if path is None else find_initial_weights(path, recorded, weights)
    from gpt_jax import checkpoints  # as below

    try:
        if recorded is None:
            return checkpoints.find_run(path, verify)
        model = checkpoints.read_model_config(dict(recorded), 'the checkpoint of this run')
        return checkpoints.PretrainedWeights(path, None, model, Tokenizer.from_json(recorded['tokenizer']))
    except InputError as error:
        raise InputError(f'checkpoint.restore_from={path}: {error}') from None


def find_initial_weights(
    path: str, recorded: Mapping[str, Any] | None = None, weights: str = 'raw'
) -> 'PretrainedWeights':
    """The weights that `train.init_from` names, described by the run's own checkpoint where that began with them.

    Args:
      path: a workdir (its best step), a step folder or a Hugging Face directory.
      recorded: the description of the checkpoint that the run goes on from, if any; the weights themselves are then
        needed no more, and `found` is None.
      weights: 'raw' or 'ema', as `train.init_weights`.

    Raises:
      InputError: there is no such checkpoint, or it is damaged, of another architecture or without a tokenizer.
    """
    from gpt_jax import checkpoints  # orbax takes seconds to import, and most runs start from no weights

    record = (recorded or {}).get('init_from') or {}
    try:
        if record.get('path') != path:
            return checkpoints.find_weights(path, weights)
        model = checkpoints.read_model_config(recorded | record, 'the checkpoint of this run')
        return checkpoints.PretrainedWeights(path, None, model, Tokenizer.from_json(recorded['tokenizer']))
    except InputError as error:
        raise InputError(f'train.init_from={path}: {error}') from None


def _take_over(settings: dict[str, dict[str, Any]], weights: 'PretrainedWeights') -> None:
    """Sets the unset keys of the architecture, and `data.tokenizer`, to what the weights have.

    Raises InputError, naming every key that is set to something else with both values. A `block_size` below that of the
    weights is none of them: the position table is cut then. The state of a run (`checkpoint.restore_from`) fits no
    other, and its `data.tokenizer` is whatever key has the same tokenizer.
    """
    source = settings['checkpoint']['restore_from']
    model, data = settings['model'], settings['data']
    if weights.model.d_mlp in (model['n_inner'], weights.model.d_model * (model['mlp_expansion'] or 0)):
        model['n_inner'] = model['mlp_expansion'] = None  # the same width, described in whichever way
    ours = {f'model.{name}': model[name] for name in WEIGHTS_KEYS} | {'data.tokenizer': data['tokenizer']}
    theirs = {f'model.{name}': getattr(weights.model, name) for name in WEIGHTS_KEYS}
    theirs['data.tokenizer'] = weights.tokenizer.kind
    longest, shorter = weights.model.block_size, ''
    if source is None:
        shorter = f' (a model.block_size below {longest} is possible)'
        if (model['block_size'] or longest) < longest:
            del theirs['model.block_size']
    elif _names_tokenizer(data['tokenizer'], weights):
        del theirs['data.tokenizer']
    conflicts = [
        f'{name}={ours[name]} and there {value}'
        for name, value in theirs.items()
        if ours[name] is not None and ours[name] != value
    ]
    if conflicts:
        preset = '' if model['preset'] is None else f'; model.preset={model["preset"]} sets some of them'
        key = 'train.init_from' if source is None else 'checkpoint.restore_from'
        raise InputError(
            f'{key}={weights.path} is of another kind than this config: here {", here ".join(conflicts)}'
            f'{preset}; leave these keys unset{shorter}, or start from another checkpoint'
        )
    for full_name, value in theirs.items():
        section, name = full_name.split('.')
        settings[section][name] = value


def _names_tokenizer(key: str | None, weights: 'PretrainedWeights') -> bool:
    """Whether `data.tokenizer` stands for the tokenizer of a run: the run's own key, or a folder that holds the same.

    Raises:
      InputError: that folder has none that can be read.
    """
    if key is None:
        return False
    if weights.meta is None:  # it was compared when the run began
        return True
    if key in ('bpe', 'char', 'gpt2'):
        return key == read_record(weights.meta['config'], f'checkpoint.restore_from={weights.path}').data.tokenizer
    return gpt2(key).fingerprint == weights.tokenizer.fingerprint


def model_config(run: RunConfig, vocab_size: int) -> GPTConfig:
    """The architecture of a run, for a tokenizer of `vocab_size` tokens.

    Raises:
      InputError: an architecture that cannot be, or `model.vocab_size` is too small for the tokenizer.
    """
    settings = as_dict(run)['model']
    for name in ('version', 'preset', 'dropout'):
        del settings[name]
    if settings['vocab_size'] is None:
        settings['vocab_size'] = vocab_size
    if settings['vocab_size'] < vocab_size:
        raise InputError(
            f'model.vocab_size={settings["vocab_size"]} is smaller than the {vocab_size} tokens of the tokenizer; '
            'leave it unset'
        )
    return GPTConfig(**settings, compute_dtype=run.precision.compute)


def planned_model(run: RunConfig) -> GPTConfig:
    """The architecture before the data are known: where these decide on the vocabulary, what the config asks for.

    A run trains a tokenizer of at most `data.vocab_size` tokens, or takes GPT-2's. Only the data tell how many
    characters there are: 256 stand for them.
    """
    sizes = {'bpe': run.data.vocab_size, 'char': 256}
    gpt2 = PRESETS['gpt2-small'].vocab_size
    return model_config(run, run.model.vocab_size or sizes.get(run.data.tokenizer, gpt2))
