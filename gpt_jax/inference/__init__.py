"""From a prompt to text."""

from gpt_jax.inference.beam import Beams, beam_search
from gpt_jax.inference.best_of import best_of_n
from gpt_jax.inference.contrastive import Contrastive, contrastive_search
from gpt_jax.inference.decode import generate, grow, sample_text, stream
from gpt_jax.inference.engine import Engine, Seen
from gpt_jax.inference.interactive import converse
from gpt_jax.inference.prompts import read_prompts
from gpt_jax.inference.request import Ending, Generation, Request, make_requests
from gpt_jax.inference.sampling import Sampling, word_ids
from gpt_jax.inference.speculative import Guessing, grow_by_guesses
from gpt_jax.inference.stop_strings import StopFilter, StopStrings
from gpt_jax.inference.strategy import STRATEGIES, Strategy, continuations, make_strategy
from gpt_jax.inference.text import TextStream, harmless, text_of
from gpt_jax.inference.writing import Writer

__all__ = [
    'STRATEGIES',
    'Beams',
    'Contrastive',
    'Ending',
    'Engine',
    'Generation',
    'Guessing',
    'Request',
    'Sampling',
    'Seen',
    'StopFilter',
    'StopStrings',
    'Strategy',
    'TextStream',
    'Writer',
    'beam_search',
    'best_of_n',
    'continuations',
    'contrastive_search',
    'converse',
    'generate',
    'grow',
    'grow_by_guesses',
    'harmless',
    'make_requests',
    'make_strategy',
    'read_prompts',
    'sample_text',
    'stream',
    'text_of',
    'word_ids',
]
