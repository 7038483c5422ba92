"""From a prompt to text."""

from gpt_jax.inference.decode import generate, sample_text, stream
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.request import Ending, Generation, Request, Sampling, make_requests

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
