"""GPT-2 and GPT-3 as linen modules: arrays in, arrays out."""

from gpt_jax.models import huggingface
from gpt_jax.models.config import PRESETS, GPTConfig, preset_config
from gpt_jax.models.gpt import (
    GPT,
    GPT2,
    GPT3,
    attention_kernels,
    parameter_shapes,
    preset,
    stack_layers,
    unstack_layers,
)
from gpt_jax.models.inspection import attention_maps, lens_logits, residual_streams

__all__ = [
    'GPT',
    'GPT2',
    'GPT3',
    'PRESETS',
    'GPTConfig',
    'attention_kernels',
    'attention_maps',
    'huggingface',
    'lens_logits',
    'parameter_shapes',
    'preset',
    'preset_config',
    'residual_streams',
    'stack_layers',
    'unstack_layers',
]
