"""From a prompt to text."""

from gpt_jax.inference.decode import generate, sample_text, stream
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.request import Ending, Generation, Request, make_requests
from gpt_jax.inference.sampling import Sampling

__all__ = [
    'Ending',
    'Engine',
    'Generation',
    'Request',
    'Sampling',
    'generate',
    'make_requests',
    'sample_text',
    'stream',
]
