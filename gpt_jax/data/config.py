"""The section `data` of an experiment: what to train on, and how its text is read."""

import dataclasses
import pathlib

from gpt_jax.errors import InputError
from gpt_jax.files import cache_folder

CHOICES = {'documents': ('whole', 'file', 'block'), 'invalid_bytes': ('refuse', 'replace')}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on; configs/base.py describes every key.

    Attributes:
      corpus: a name of `gpt_jax.data.corpora.NAMES`, or `hub:REPO[@REVISION][:CONFIG]`.
      mixture: several corpora to use instead, 'NAME:WEIGHT,NAME:WEIGHT' (see `mixture.parse_mixture`).
      path: local files to use instead of `corpus`: .txt, .jsonl (also .gz, .zst) or .parquet; may hold wildcards.
      column: the column of parquet, or the key of JSON lines, that holds the text.
      documents: of plain text: 'whole' (one text, its last tenth held out), 'file', or 'block' (parted by blank lines).
      validation_fraction: share of the documents held out, by the hash of their text; None: the corpus's own.
      invalid_bytes: 'refuse' or 'replace' (by U+FFFD, counted) what is no UTF-8.
      streaming: whether a hub's files are read over the network, and not kept in its cache.
      tokenizer: 'bpe' (learned from the corpus), 'char', 'gpt2', or a directory with a GPT-2 vocabulary.
      vocab_size: tokens of a 'bpe' tokenizer, 257 or more; the others have their own size.
      num_workers: processes that prepare a large corpus; None: one for each core.
      mask_documents: whether tokens see their own document alone, and positions start again in each.
      cache_dir: where prepared data is kept; None is `data` in the user's cache folder.
    """

    corpus: str = 'python_docs'
    path: str | None = None
    mixture: str | None = None
    column: str = 'text'
    documents: str = 'whole'
    validation_fraction: float | None = None
    invalid_bytes: str = 'refuse'
    streaming: bool = False
    tokenizer: str = 'bpe'
    vocab_size: int = 4096
    num_workers: int | None = None
    mask_documents: bool = False
    cache_dir: str | None = None

    @property
    def cache(self) -> pathlib.Path:
        """The folder where prepared data is kept."""
        return pathlib.Path(self.cache_dir or cache_folder('data')).expanduser()

    def check(self) -> None:
        """Raises InputError on a value that is none of those above."""
        for key, values in CHOICES.items():
            if getattr(self, key) not in values:
                raise InputError(f'data.{key}={getattr(self, key)}: use {" or ".join(values)}')
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise InputError(f'data.validation_fraction={self.validation_fraction}: use more than 0 and less than 1')
        if self.num_workers is not None and self.num_workers < 1:
            raise InputError(f'data.num_workers={self.num_workers}: use 1 or more')
