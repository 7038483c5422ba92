"""From a prompt to text."""

from gpt_jax.inference.beam import Beams
from gpt_jax.inference.contrastive import Contrastive
from gpt_jax.inference.engine import STEPS_AT_A_TIME, Engine
from gpt_jax.inference.generate import (
    BestOf,
    Generation,
    Request,
    SamplingBatch,
    StoppingCriteria,
    Strategy,
    check_settings,
    generate,
    make_requests,
    sample_text,
    stream,
)
from gpt_jax.inference.sampling import Sampling, word_ids
from gpt_jax.inference.speculative import Speculative
from gpt_jax.inference.text import (
    StopFilter,
    StopStrings,
    TextStream,
    Writer,
    check_prompt,
    harmless,
    prompt_loop,
    read_prompts,
    read_standard_input,
    remarks,
    text_of,
)

__all__ = [
    'STEPS_AT_A_TIME',
    'Beams',
    'BestOf',
    'Contrastive',
    'Engine',
    'Generation',
    'Request',
    'Sampling',
    'SamplingBatch',
    'Speculative',
    'StopFilter',
    'StopStrings',
    'StoppingCriteria',
    'Strategy',
    'TextStream',
    'Writer',
    'check_prompt',
    'check_settings',
    'generate',
    'harmless',
    'make_requests',
    'prompt_loop',
    'read_prompts',
    'read_standard_input',
    'remarks',
    'sample_text',
    'stream',
    'text_of',
    'word_ids',
]
