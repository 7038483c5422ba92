"""The corpora: where text comes from, and which of it is held out for validation.

python_docs       the running Python's documentation, 2-3 MB, on every machine (the default)
text              a UTF-8 text file, `data.path`; the first 90 % of its characters train
openwebtext_10k   10 000 documents of OpenWebText, 50 MB, from the Hugging Face hub
openwebtext       OpenWebText, 8 million documents, 40 GB, from the Hugging Face hub
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

from gpt_jax.data import python_docs
from gpt_jax.errors import InputError

SPLITS = ('train', 'validation')
TEXT_TRAIN_FRACTION = 0.9
PYTHON_DOCS_VALIDATION_FRACTION = 0.1
HUB_SCHEME = 1  # raise it whenever `_hub_documents` would give other text or other splits


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Named text in two splits.

    Attributes:
      name: as the user wrote it in `data.corpus`, or `text`.
      fingerprint: hex sha256 that stands for the text and its splits; the same text has the same one.
      read: split name -> a fresh iterator of its documents; use `documents`, which checks.
    """

    name: str
    fingerprint: str
    read: Callable[[str], Iterator[str]] = dataclasses.field(repr=False)

    def documents(self, split: str) -> Iterator[str]:
        """The documents of `split` ('train' or 'validation') from the first one; call again to start again.

        Raises InputError, while iterating, where the source cannot be read or the split is empty.
        """
        if split not in SPLITS:
            raise ValueError(f'split={split!r}: one of {SPLITS}')
        return self._documents(split)

    def _documents(self, split: str) -> Iterator[str]:
        empty = True
        for document in self.read(split):
            empty = False
            yield document
        if empty:
            raise InputError(
                f'the {split} split of {self.name} is empty: use a larger corpus, such as --config.data.path=FILE'
            )


@dataclasses.dataclass(frozen=True)
class HubCorpus:
    """Parquet files with one document a row, as `datasets.load_dataset('parquet', data_files=...)` takes them.

    Attributes:
      data_files: a path or `hf://` address, which may hold wildcards.
      validation_fraction: share of the documents, drawn by the hash of their text, that is held out.
      column: the column that holds the text.
    """

    data_files: str
    validation_fraction: float
    column: str = 'text'


# The hub's own conversion to parquet: both datasets are published as loading scripts, which datasets 4 refuses.
HUB = {
    'openwebtext_10k': HubCorpus(
        'hf://datasets/stas/openwebtext-10k@refs/convert/parquet/plain_text/train/*.parquet', 0.05
    ),
    'openwebtext': HubCorpus(
        'hf://datasets/Skylion007/openwebtext@refs/convert/parquet/plain_text/train/*.parquet', 0.005
    ),
}
NAMES = ('python_docs', 'text', *HUB)


def load(name: str, path: str | None = None) -> Corpus:
    """The corpus called `name`; with a `path`, the text file at `path`, whatever the name.

    Nothing is downloaded or parsed before its documents are asked for; a text file is read once for its fingerprint.

    Raises InputError on an unknown name and on a text file that is missing, empty or not UTF-8.
    """
    if name not in NAMES:
        raise InputError(f'data.corpus={name}: unknown; use one of {", ".join(NAMES)}')
    if path:
        return _text(pathlib.Path(path))
    if name == 'text':
        raise InputError('data.corpus=text needs a file: set --config.data.path=FILE')
    if name == 'python_docs':
        return Corpus(name, python_docs.fingerprint(), _python_documents)
    hub = HUB[name]
    fingerprint = hashlib.sha256(json.dumps([HUB_SCHEME, dataclasses.astuple(hub)]).encode()).hexdigest()
    return Corpus(name, fingerprint, lambda split: _hub_documents(name, hub, split))


def _held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation: by its text, so that copies of it never land in both splits."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return draw < fraction * 2**64


def _python_documents(split: str) -> Iterator[str]:
    for text in python_docs.documents():
        if _held_out(text, PYTHON_DOCS_VALIDATION_FRACTION) == (split == 'validation'):
            yield text


def _text(path: pathlib.Path) -> Corpus:
    text = _read_text(path)
    # The split point is part of what the fingerprint stands for.
    fingerprint = hashlib.sha256(f'text {TEXT_TRAIN_FRACTION} '.encode() + text.encode()).hexdigest()

    def read(split: str) -> Iterator[str]:
        # Read again instead of kept: a corpus may be larger than the memory that training can spare.
        text = _read_text(path)
        middle = int(len(text) * TEXT_TRAIN_FRACTION)
        part = text[:middle] if split == 'train' else text[middle:]
        if part:
            yield part

    return Corpus('text', fingerprint, read)


def _read_text(path: pathlib.Path) -> str:
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise InputError(f'data.path={path}: no such file; name an existing UTF-8 text file') from None
    except IsADirectoryError:
        raise InputError(f'data.path={path}: is a directory; name one UTF-8 text file') from None
    except OSError as error:
        raise InputError(f'data.path={path}: cannot be read ({error.strerror}); name a readable file') from None
    except UnicodeDecodeError as error:
        raise InputError(
            f'data.path={path}: not UTF-8 at byte {error.start}; convert it, e.g. with iconv -t UTF-8'
        ) from None
    if not text:
        raise InputError(f'data.path={path}: the file is empty; name one with text in it')
    return text


def _hub_documents(name: str, hub: HubCorpus, split: str) -> Iterator[str]:
    import datasets  # half a second, and only hub corpora need it

    try:
        table = datasets.load_dataset('parquet', data_files=hub.data_files, split='train').with_format('arrow')
    except Exception as error:
        # Everything that can go wrong here is the source's: the hub's client raises errors of httpx, of requests, of
        # its own and of the system, by version, without a common base.
        reason = next(iter(str(error).splitlines()), '')
        raise InputError(
            f'data.corpus={name}: cannot load {hub.data_files} ({type(error).__name__}: {reason}); connect to the '
            'hub, see that HF_HUB_OFFLINE is not set, or use a file of your own: --config.data.path=FILE'
        ) from error
    if hub.column not in table.column_names:
        raise InputError(
            f'data.corpus={name}: {hub.data_files} has no column {hub.column!r}, only {", ".join(table.column_names)}'
        )
    for rows in table.iter(batch_size=1000):
        for text in rows.column(hub.column).to_pylist():
            if text and _held_out(text, hub.validation_fraction) == (split == 'validation'):
                yield text
