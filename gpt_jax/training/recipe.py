"""How GPT-2 and GPT-3 were trained: the values that fill an experiment's unset keys, each with its source.

What a paper does not tell is marked "assumed", with whose habit it is.
"""

import dataclasses
from typing import Any

from gpt_jax.errors import InputError
from gpt_jax.models import PRESETS

# Keys of which one stands for the others: setting one in a config or on the command line replaces the recipe's.
LENGTHS = {
    ('train', 'length'): ('steps', 'tokens', 'epochs'),
    ('schedule', 'warmup'): ('warmup_steps', 'warmup_tokens', 'warmup_epochs'),
    ('schedule', 'decay'): ('decay_steps', 'decay_tokens', 'decay_epochs'),
}


@dataclasses.dataclass(frozen=True)
class Value:
    """A recipe's value of one key, and where it is from."""

    value: Any
    source: str


_GPT1 = 'assumed: unpublished for GPT-2, GPT-1 paper section 4.1'
_GPT3 = 'paper: GPT-3, appendix B'
_TABLE = 'paper: GPT-3, table 2.1'

_GPT2_RECIPE = {
    'model.attention_pattern': Value('dense', 'paper: GPT-2, section 2.3, as in GPT-1'),
    'model.dropout': Value(0.1, _GPT1),
    'optimizer.learning_rate': Value(2.5e-4, f'{_GPT1}; GPT-2 section 2.3 says it was tuned by hand for each size'),
    'optimizer.beta1': Value(0.9, "assumed: Adam's default, as in GPT-1's code"),
    'optimizer.beta2': Value(0.999, "assumed: Adam's default, as in GPT-1's code"),
    'optimizer.epsilon': Value(1e-8, "assumed: Adam's default, as in GPT-1's code"),
    'optimizer.weight_decay': Value(0.01, _GPT1),
    'optimizer.clip_norm': Value(1.0, "assumed: GPT-1's code"),
    'schedule.warmup_steps': Value(2000, _GPT1),
    'schedule.final_fraction': Value(0.0, f'{_GPT1}: cosine to 0, over the whole run'),
    'train.batch_size': Value(512, 'paper: GPT-2, section 2.3'),
}

_GPT3_RECIPE = {
    'model.attention_pattern': Value('alternating', 'paper: GPT-3, section 2.1'),
    'model.dropout': Value(0.0, 'assumed: the paper states none'),
    'optimizer.beta1': Value(0.9, _GPT3),
    'optimizer.beta2': Value(0.95, _GPT3),
    'optimizer.epsilon': Value(1e-8, _GPT3),
    'optimizer.weight_decay': Value(0.1, _GPT3),
    'optimizer.clip_norm': Value(1.0, _GPT3),
    'schedule.warmup_tokens': Value(375_000_000, _GPT3),
    'schedule.decay_tokens': Value(260_000_000_000, _GPT3),
    'schedule.final_fraction': Value(0.1, _GPT3),
}

# Learning rate, and batch in sequences of 2048 tokens (0.5M tokens = 256 of them, 1M = 512, 2M = 1024, 3.2M = 1600).
_GPT3_SIZES = {
    'gpt3-125m': (6.0e-4, 256),
    'gpt3-350m': (3.0e-4, 256),
    'gpt3-760m': (2.5e-4, 256),
    'gpt3-1.3b': (2.0e-4, 512),
    'gpt3-2.7b': (1.6e-4, 512),
    'gpt3-6.7b': (1.2e-4, 1024),
    'gpt3-13b': (1.0e-4, 1024),
    'gpt3-175b': (0.6e-4, 1600),
}

# The suite's tiers, and a GPT-3 of no published size, take the values of the paper's row nearest in parameters.
_SUITE_TIERS = {
    'gpt3-ada': 'gpt3-125m',
    'gpt3-babbage': 'gpt3-350m',
    'gpt3-curie': 'gpt3-2.7b',
    'gpt3-davinci': 'gpt3-175b',
}


def recipe(version: str, preset: str | None = None) -> dict[str, Value]:
    """The values of 'section.key' for `model.version` and, where one is named, `model.preset`.

    Raises:
      InputError: there is no such version, or the preset is of another.
    """
    if version == 'gpt2':
        values = dict(_GPT2_RECIPE)
    elif version == 'gpt3':
        row = _SUITE_TIERS.get(preset, preset) or 'gpt3-125m'
        if row not in _GPT3_SIZES:
            raise InputError(
                f'model.preset={preset!r} is not a size of GPT-3, but model.version is gpt3; set them alike'
            )
        learning_rate, batch_size = _GPT3_SIZES[row]
        source = _TABLE if row == preset else f'assumed: as {row} in {_TABLE}'
        values = _GPT3_RECIPE | {
            'optimizer.learning_rate': Value(learning_rate, source),
            'train.batch_size': Value(batch_size, source),
        }
    else:
        raise InputError(f'model.version={version!r} must be gpt2 or gpt3')
    return values


def fill(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`settings` (section -> key -> value, None where unset) with its unset keys filled in from preset and recipe.

    Raises:
      InputError: the model has neither preset nor dimensions, or version or preset is unknown.
    """
    settings = {section: dict(values) for section, values in settings.items()}
    model = settings['model']
    if model['preset'] is not None:
        if model['preset'] not in PRESETS:
            raise InputError(f'model.preset={model["preset"]!r} is not one of {", ".join(PRESETS)}')
        for key in ('block_size', 'n_layer', 'n_head', 'd_model', 'attention_pattern'):
            if model[key] is None:
                model[key] = getattr(PRESETS[model['preset']], key)
    given = {group for group in LENGTHS if any(settings[group[0]][key] is not None for key in LENGTHS[group])}
    for name, value in recipe(model['version'], model['preset']).items():
        section, key = name.split('.')
        replaced = any(group in given and group[0] == section and key in keys for group, keys in LENGTHS.items())
        if settings[section][key] is None and not replaced:
            settings[section][key] = value.value
    for key in ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout'):
        if model[key] is None:
            model[key] = model['dropout']
    return settings
