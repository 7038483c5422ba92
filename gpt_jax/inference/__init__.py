"""From a prompt to text."""

from gpt_jax.inference.decode import generate, sample_text, stream
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.request import Ending, Generation, Request, make_requests
from gpt_jax.inference.sampling import Sampling, word_ids
from gpt_jax.inference.stop_strings import StopFilter, StopStrings

__all__ = [
    'Ending',
    'Engine',
    'Generation',
    'Request',
    'Sampling',
    'StopFilter',
    'StopStrings',
    'generate',
    'make_requests',
    'sample_text',
    'stream',
    'word_ids',
]
