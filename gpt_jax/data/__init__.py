"""From a corpus to batches: text -> tokenizer -> token shards -> `{tokens, targets}` in numpy.

`prepare` makes the tokenizer and the shards once and keeps them in a cache; `Batches` reads them, each batch a pure
function of (seed, step).
"""

from gpt_jax.config import DataConfig
from gpt_jax.data.batches import Batches, BatchSizes, TokenSource, ValidationBatches, document_positions, prefetch
from gpt_jax.data.corpus import Corpus
from gpt_jax.data.pipeline import Prepared, TrainingData, load_corpus, prepare
from gpt_jax.data.shards import ShardInfo, Tokens, read_header, write_shard
from gpt_jax.data.tokenizer import Tokenizer

__all__ = [
    'BatchSizes',
    'Batches',
    'Corpus',
    'DataConfig',
    'Prepared',
    'ShardInfo',
    'TokenSource',
    'Tokenizer',
    'Tokens',
    'TrainingData',
    'ValidationBatches',
    'document_positions',
    'load_corpus',
    'prefetch',
    'prepare',
    'read_header',
    'write_shard',
]
