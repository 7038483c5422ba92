"""GPT-2 and GPT-3 as linen modules: arrays in, arrays out."""

from gpt_jax.models import huggingface
from gpt_jax.models.config import GPTConfig
from gpt_jax.models.depth import stack_layers, unstack_layers
from gpt_jax.models.gpt import GPT, GPT2, GPT3
from gpt_jax.models.inspection import attention_maps, lens_logits, residual_streams
from gpt_jax.models.presets import PRESETS, preset, preset_config

__all__ = [
    'GPT',
    'GPT2',
    'GPT3',
    'PRESETS',
    'GPTConfig',
    'attention_maps',
    'huggingface',
    'lens_logits',
    'preset',
    'preset_config',
    'residual_streams',
    'stack_layers',
    'unstack_layers',
]
