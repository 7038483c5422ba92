"""Training: from an experiment's configuration to a finished run."""

from gpt_jax.training.config import RunConfig, prefer_overrides
from gpt_jax.training.loop import TrainResult, train
from gpt_jax.training.recipe import recipe

__all__ = ['RunConfig', 'TrainResult', 'prefer_overrides', 'recipe', 'train']
