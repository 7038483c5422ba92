"""From a corpus to batches: text -> tokenizer -> token shards -> `{tokens, targets}` in numpy.

`prepare` makes the tokenizer and the shards once and keeps them in a cache; `Batches` reads them, each batch a pure
function of (seed, step).
"""

from gpt_jax.config import DataConfig
from gpt_jax.data.corpus import Corpus
from gpt_jax.data.documents import document_places
from gpt_jax.data.loader import Batches, prefetch, validation_batches
from gpt_jax.data.pipeline import Prepared, TrainingData, load_corpus, prepare
from gpt_jax.data.shards import ShardInfo, Tokens, read_header, write_shard
from gpt_jax.data.tokenizer import Tokenizer

__all__ = [
    'Batches',
    'Corpus',
    'DataConfig',
    'Prepared',
    'ShardInfo',
    'Tokenizer',
    'Tokens',
    'TrainingData',
    'document_places',
    'load_corpus',
    'prefetch',
    'prepare',
    'read_header',
    'validation_batches',
    'write_shard',
]
