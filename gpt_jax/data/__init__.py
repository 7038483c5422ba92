"""From a corpus to batches: text -> tokenizer -> token shards -> `{tokens, targets}` in numpy.

`prepare` makes the tokenizer and the shards once and keeps them in a cache; `Batches` reads them, each batch a pure
function of (seed, step).
"""

from gpt_jax.data.corpora import Corpus
from gpt_jax.data.loader import Batches, prefetch, validation_batches
from gpt_jax.data.pipeline import DataConfig, Prepared, prepare
from gpt_jax.data.shards import TokenShard, open_shard, write_shard
from gpt_jax.data.tokenizer import Tokenizer

__all__ = [
    'Batches',
    'Corpus',
    'DataConfig',
    'Prepared',
    'TokenShard',
    'Tokenizer',
    'open_shard',
    'prefetch',
    'prepare',
    'validation_batches',
    'write_shard',
]
