"""What is known of how GPT-2 and GPT-3 were trained: every value with its source, and nothing else.

A source begins with "paper" and the section, or with "assumed" and whose habit it is: what a paper does not tell.
"""

import dataclasses
from typing import Any

from gpt_jax.models.config import ASSUMED_BAND_SIZE


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
