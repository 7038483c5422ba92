"""The corpora: where text comes from, and which of it is held out for validation.

python_docs                     the running Python's documentation, 2-3 MB, on every machine (the default)
openwebtext_10k                 10 000 documents of OpenWebText, 50 MB, from the Hugging Face hub
wikitext_103                    articles of Wikipedia, 540 MB, from the hub
openwebtext                     OpenWebText, 8 million documents, 40 GB, from the hub
fineweb_edu_10b                 10 billion tokens of FineWeb-Edu, 27 GB of parquet, from the hub
hub:REPO[@REVISION][:CONFIG]    any dataset of the hub that is in parquet
text                            local files, `data.path`
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from gpt_jax.config import DataConfig
from gpt_jax.data import hub, local, python_docs
from gpt_jax.data.corpus import Corpus, Decoder, Part, Passage, split_of
from gpt_jax.errors import InputError

PYTHON_DOCS_FRACTION = 0.1
NAMES = ('python_docs', 'text', *hub.NAMED)


@dataclasses.dataclass(frozen=True)
class PythonDocs(Corpus):
    """The embedded corpus, in one part."""

    fraction: float = PYTHON_DOCS_FRACTION
    name: str = 'python_docs'

    @property
    def key(self) -> str:
        """The fingerprint."""
        return self.fingerprint

    @property
    def fingerprint(self) -> str:
        """Of the running Python, and what is held out."""
        return hashlib.sha256(f'{python_docs.fingerprint()} {self.fraction}'.encode()).hexdigest()

    @property
    def split_rule(self) -> str:
        """What is held out."""
        return f'{self.fraction} of the documents, by the hash of their text; copies are in the same split'

    def parts(self) -> Sequence[Part]:
        """One: it is small."""
        return [Part()]

    def read(self, part: Part, decoder: Decoder) -> Iterator[Passage]:
        """Every document."""
        for text in python_docs.documents():
            yield Passage(split_of(text, self.fraction), text)

    def source(self) -> dict[str, Any]:
        """The library's folder and Python's version."""
        return python_docs.source()


def load(config: DataConfig) -> Corpus:
    """The corpus that `config` names; with a `path`, the files there, whatever the name.

    Nothing is downloaded or parsed before its documents are asked for; local files are read once for their fingerprint.

    Raises InputError on an unknown name and on local files that are missing, empty or cannot be read.
    """
    name = config.corpus
    if name not in NAMES and not name.startswith('hub:'):
        raise InputError(f'data.corpus={name}: unknown; use one of {", ".join(NAMES)} or hub:OWNER/NAME')
    if config.path:
        return local.load(config)
    if name == 'text':
        raise InputError('data.corpus=text needs a file: set --config.data.path=FILE')
    if name != 'python_docs':
        return hub.load(config)
    return PythonDocs(config.validation_fraction or PYTHON_DOCS_FRACTION)
