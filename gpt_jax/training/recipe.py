"""How GPT-2 and GPT-3 were trained: the values that fill an experiment's unset keys, and the facts beside them."""

import dataclasses
from typing import Any

from gpt_jax.data import DataConfig
from gpt_jax.errors import InputError
from gpt_jax.models import PRESETS, GPTConfig
from gpt_jax.training.init_from import Source
from gpt_jax.training.recipe_values import (
    CORRECTIONS,
    GPT2_FACTS,
    GPT2_KEYS,
    GPT3,
    GPT3_FACTS,
    GPT3_KEYS,
    GPT3_SIZES,
    SUITE_TIERS,
    TABLE,
    Size,
    Value,
)

# Keys of which one stands for the others: setting one in a config or on the command line replaces the recipe's.
LENGTHS = {
    ('train', 'length'): ('steps', 'tokens', 'epochs'),
    ('schedule', 'warmup'): ('warmup_steps', 'warmup_tokens', 'warmup_epochs'),
    ('schedule', 'decay'): ('decay_steps', 'decay_tokens', 'decay_epochs'),
}


def recipe(version: str, preset: str | None = None) -> dict[str, Value]:
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
    full one over `ramp_tokens`: data to read, training does not do it.

    Raises:
      InputError: as `recipe`.
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
    for name, recipe_value in recipe(model['version'], model['preset']).items():
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


def fill(settings: dict[str, dict[str, Any]], source: Source | None = None) -> dict[str, dict[str, Any]]:
    """`settings` (section -> key -> value, None where unset) with its unset keys filled in.

    From the preset, the source of the weights, the recipe, and the defaults of GPTConfig and DataConfig, in this order.

    Raises:
      InputError: version or preset is unknown, or a key contradicts the source.
    """
    settings = {section: dict(values) for section, values in settings.items()}
    model = settings['model']
    if model['preset'] is not None:
        if model['preset'] not in PRESETS:
            raise InputError(f'model.preset={model["preset"]!r} is not one of {", ".join(PRESETS)}')
        for key in ('block_size', 'n_layer', 'n_head', 'd_model', 'attention_pattern'):
            if model[key] is None:
                model[key] = getattr(PRESETS[model['preset']], key)
    if source is not None:
        source.fill(settings)
    given = {group for group in LENGTHS if any(settings[group[0]][key] is not None for key in LENGTHS[group])}
    for name, value in recipe(model['version'], model['preset']).items():
        section, key = name.split('.')
        replaced = any(group in given and group[0] == section and key in keys for group, keys in LENGTHS.items())
        if settings[section][key] is None and not replaced:
            settings[section][key] = value.value
    for key in ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout'):
        if model[key] is None:
            model[key] = model['dropout']
    for section, described in (('model', GPTConfig), ('data', DataConfig)):
        for field in dataclasses.fields(described):
            if field.default is not dataclasses.MISSING and settings[section].get(field.name, 0) is None:
                settings[section][field.name] = field.default
    return settings
