"""Training: from an experiment's configuration to a finished run."""

from typing import Any

from gpt_jax.config import RunConfig, prefer_overrides
from gpt_jax.training.recipe import recipe_values, resolve

__all__ = ['RunConfig', 'TrainResult', 'prefer_overrides', 'recipe_values', 'resolve', 'train']


def __getattr__(name: str) -> Any:
    # The trainer brings checkpoints, TensorBoard and plots, which a plan has no use for: they take seconds to import.
    if name in ('TrainResult', 'train'):
        from gpt_jax.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
