"""The published model sizes, by name."""

import dataclasses
from typing import Any

from gpt_jax.errors import InputError
from gpt_jax.models.config import GPTConfig
from gpt_jax.models.gpt import GPT

GPT2_VOCAB_SIZE = 50257


def _gpt2(n_layer: int, n_head: int, d_model: int) -> GPTConfig:
    return GPTConfig(GPT2_VOCAB_SIZE, block_size=1024, n_layer=n_layer, n_head=n_head, d_model=d_model)


def _gpt3(n_layer: int, n_head: int, d_model: int) -> GPTConfig:
    return GPTConfig(
        GPT2_VOCAB_SIZE,
        block_size=2048,
        n_layer=n_layer,
        n_head=n_head,
        d_model=d_model,
        attention_pattern='alternating',  # section 2.1; the width of the bands is assumed
    )


# Dropout is 0 here: it belongs to a training recipe, not to a size.
PRESETS: dict[str, GPTConfig] = {
    # "Language Models are Unsupervised Multitask Learners" (2019), table 2. The often quoted 117M and 345M are early
    # miscounts; `num_parameters` gives 124M and 355M.
    'gpt2-small': _gpt2(12, 12, 768),
    'gpt2-medium': _gpt2(24, 16, 1024),
    'gpt2-large': _gpt2(36, 20, 1280),
    'gpt2-xl': _gpt2(48, 25, 1600),
    # "Language Models are Few-Shot Learners" (2020), table 2.1.
    'gpt3-125m': _gpt3(12, 12, 768),
    'gpt3-350m': _gpt3(24, 16, 1024),
    'gpt3-760m': _gpt3(24, 16, 1536),
    # The table says 24 heads of 128 at width 2048, which contradicts itself (24 x 128 = 3072): 16 heads of 128 here.
    'gpt3-1.3b': _gpt3(24, 16, 2048),
    'gpt3-2.7b': _gpt3(32, 32, 2560),
    'gpt3-6.7b': _gpt3(32, 32, 4096),
    # The table says width 5140 with 40 heads of 128, which contradicts itself (40 x 128 = 5120): width 5120 here.
    'gpt3-13b': _gpt3(40, 40, 5120),
    'gpt3-175b': _gpt3(96, 96, 12288),
    # The four tiers of the PyTorch suite that gpt_jax follows. Its table calls the first three 350M, 1.3B and 6.7B; at
    # these dimensions they have 125M, 356M and 2.5B parameters.
    'gpt3-ada': _gpt3(12, 12, 768),
    'gpt3-babbage': _gpt3(24, 16, 1024),
    'gpt3-curie': _gpt3(48, 32, 2048),
    'gpt3-davinci': _gpt3(96, 96, 12288),
}


def preset_config(name: str, **changes: Any) -> GPTConfig:
    """The configuration called `name`, with `changes` to its fields.

    Raises:
      InputError: there is no such preset.
    """
    if name not in PRESETS:
        raise InputError(f'model.preset={name!r} is not one of {", ".join(PRESETS)}')
    return dataclasses.replace(PRESETS[name], **changes)


def preset(name: str, **changes: Any) -> GPT:
    """The model called `name` ('gpt2-small', 'gpt3-175b', ...), with `changes` to its configuration."""
    return GPT(preset_config(name, **changes))
