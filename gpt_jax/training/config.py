"""An experiment as frozen dataclasses: what a ConfigDict becomes once, at the edge."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from gpt_jax.data import DataConfig
from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig
from gpt_jax.parallel import MeshConfig
from gpt_jax.training.init_from import Source
from gpt_jax.training.recipe import LENGTHS, fill

# On resume these may differ: where and how often things happen, and how long the run is. Nothing here changes a step.
RESUMABLE = (
    'mesh.',
    'preview.',
    'checkpoint.',
    'eval.every_steps',
    'train.log_every_steps',
    'train.steps',
    'train.tokens',
    'train.epochs',
    'data.streaming',
    'data.num_workers',
    'data.cache_dir',
)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Section `model`: see configs/base.py, which describes every key of every section here."""

    version: str
    preset: str | None
    vocab_size: int | None
    block_size: int
    n_layer: int
    n_head: int
    d_model: int
    mlp_expansion: int
    dropout: float
    embedding_dropout: float
    attention_dropout: float
    mlp_dropout: float
    resid_dropout: float
    attention_pattern: str
    band_size: int
    qkv_bias: bool
    attention_scale: float | None
    tie_embeddings: bool
    layer_norm_epsilon: float
    remat: str
    scan_layers: bool


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Section `optimizer`."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Section `schedule`."""

    warmup_steps: int | None
    warmup_tokens: int | None
    warmup_epochs: float | None
    decay_steps: int | None
    decay_tokens: int | None
    decay_epochs: float | None
    final_fraction: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Section `train`."""

    init_from: str | None
    steps: int | None
    tokens: int | None
    epochs: float | None
    batch_size: int
    accumulation_steps: int
    seed: int
    log_every_steps: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Section `eval`."""

    every_steps: int
    batch_size: int | None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Section `checkpoint`."""

    every_steps: int
    keep_latest: int
    keep_best: int


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Section `precision`."""

    compute: str


@dataclasses.dataclass(frozen=True)
class PreviewConfig:
    """Section `preview`."""

    every_steps: int
    prompt: str
    max_new_tokens: int
    temperature: float
    top_k: int


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole experiment, resolved: nothing is left to a recipe."""

    model: ModelSettings
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    precision: PrecisionConfig
    preview: PreviewConfig

    @classmethod
    def resolve(cls, config: 'Mapping[str, Any] | RunConfig', recorded: Mapping[str, Any] | None = None) -> Self:
        """Fills the unset keys of a ConfigDict (or nested dict, or a RunConfig) from its recipe, and checks it.

        With `train.init_from` the architecture is that of the source, which is read here (see `Source.find`, which
        takes `recorded`).

        Raises:
          InputError: a key is missing, unknown or out of range, two keys contradict each other, or
            one the source.
        """
        if isinstance(config, RunConfig):
            return config
        config = config.to_dict() if hasattr(config, 'to_dict') else config
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        _check_keys('', config, types)
        for section, section_type in types.items():
            _check_keys(f'{section}.', config[section], {f.name: f for f in dataclasses.fields(section_type)})
        path = config['train']['init_from']
        settings = fill(config, None if path is None else Source.find(path, recorded))
        for section, key in (('model', k) for k in ('block_size', 'n_layer', 'n_head', 'd_model')):
            if settings[section][key] is None:
                raise InputError(f'{section}.{key} is unset: give it, or a model.preset')
        run = cls(**{section: types[section](**values) for section, values in settings.items()})
        run._check()
        return run

    def _check(self) -> None:
        self.model_config(self.model.vocab_size or 1)
        positive = {
            'train': ('batch_size', 'accumulation_steps', 'log_every_steps'),
            'checkpoint': ('keep_latest',),
            'preview': ('max_new_tokens',),
        }
        for section, keys in positive.items():
            for key in keys:
                if getattr(getattr(self, section), key) < 1:
                    raise InputError(f'{section}.{key}={getattr(getattr(self, section), key)} must be at least 1')
        for (section, name), keys in LENGTHS.items():
            values = {key: getattr(getattr(self, section), key) for key in keys}
            given = [f'{section}.{key}={value}' for key, value in values.items() if value is not None]
            if len(given) > 1:
                raise InputError(f'{" and ".join(given)}: only one of them may be set')
            if not given and name == 'length':
                raise InputError('the length of the run is unset: give one of train.steps, train.tokens, train.epochs')
            if any(value < (0 if name == 'warmup' else 1e-9) for value in values.values() if value is not None):
                raise InputError(f'{given[0]} must be positive')
        if self.train.batch_size % self.train.accumulation_steps:
            raise InputError(
                f'train.batch_size={self.train.batch_size} is not divisible by '
                f'train.accumulation_steps={self.train.accumulation_steps}'
            )
        if self.eval.batch_size is not None and self.eval.batch_size < 1:
            raise InputError(f'eval.batch_size={self.eval.batch_size} must be at least 1')
        # The sampler would say so as well, but only at the first preview, hours of training later.
        if not self.preview.temperature > 0:
            raise InputError(f'preview.temperature={self.preview.temperature} must be above 0')
        if self.preview.top_k < 0:
            raise InputError(f'preview.top_k={self.preview.top_k} must be at least 1, or 0 for all tokens')

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The architecture, for a tokenizer of `vocab_size` tokens.

        Raises:
          InputError: an architecture that cannot be, or `model.vocab_size` is too small for the tokenizer.
        """
        settings = dataclasses.asdict(self.model)
        for key in ('version', 'preset', 'dropout'):
            del settings[key]
        if settings['vocab_size'] is None:
            settings['vocab_size'] = vocab_size
        if settings['vocab_size'] < vocab_size:
            raise InputError(
                f'model.vocab_size={settings["vocab_size"]} is smaller than the {vocab_size} tokens of the tokenizer; '
                'leave it unset'
            )
        return GPTConfig(**settings, compute_dtype=self.precision.compute)


def as_dict(run: RunConfig) -> dict[str, dict[str, Any]]:
    """The experiment as nested dicts, section -> key -> value, as config.json holds it."""
    return dataclasses.asdict(run)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'section.key: old -> new' for every key that differs between two dicts of `as_dict` and may not on resume."""
    names = {f'{section}.{key}' for config in (old, new) for section, values in config.items() for key in values}
    lines = []
    for name in sorted(names):
        section, key = name.split('.')
        before, after = old.get(section, {}).get(key), new.get(section, {}).get(key)
        if before != after and not name.startswith(RESUMABLE):
            lines.append(f'{name}: {before} -> {after}')
    return lines


def prefer_overrides(config: Any, overrides: Mapping[str, Any]) -> None:
    """Unsets, in a ConfigDict, the keys that a command-line override of another of their kind replaces.

    `--config.train.steps=10` on a config that gives `train.epochs` means ten steps, not a contradiction.
    """
    for (section, _), keys in LENGTHS.items():
        given = [key for key in keys if overrides.get(f'{section}.{key}') is not None]
        if given:
            for key in keys:
                if key not in given:
                    config[section][key] = None


def _check_keys(prefix: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            raise InputError(f'{prefix}{key} is not a key of an experiment; configs/base.py lists them all')
    for key in known:
        if key not in given:
            raise InputError(f'{prefix}{key} is missing; start from configs/base.py, which gives every key')
