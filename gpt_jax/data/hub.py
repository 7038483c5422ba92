"""Corpora on the Hugging Face hub: parquet files of a dataset, at one commit.

They are downloaded into the hub's cache, or read over the network (`data.streaming`), a share of the row groups at a
time. `datasets.load_dataset` would keep a second copy of all text, as Arrow, and cannot divide a file over workers.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpt_jax.config import DataConfig
from gpt_jax.data import corpus as corpora
from gpt_jax.data import layout
from gpt_jax.data.corpus import SPLITS, Corpus, Decoder, Part, Passage, split_of
from gpt_jax.data.rows import parquet_rows
from gpt_jax.data.wikitext import articles
from gpt_jax.errors import InputError

ANSWER_SECONDS = 4.0
FRACTION = 0.005  # of the documents, where a dataset has no validation split of its own
CONVERTED = 'refs/convert/parquet'  # where the hub keeps its own conversion of datasets in other formats
ADDRESS = re.compile(r'hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<config>[^:@]+))?')


@dataclasses.dataclass(frozen=True)
class HubCorpus(Corpus):
    """A dataset of the hub. A part is share `start` of `stop` of a file; where documents are restored, a whole split.

    Attributes:
      name: as the user wrote it, for folders and messages.
      repo: owner and name.
      revision: a branch, tag or commit, as asked for; None: main.
      config: one of several that the dataset may have.
      column: that holds the text.
      fraction: share of the documents held out; None: the dataset's own validation split, or FRACTION.
      restores: whether rows are lines of articles, as in WikiText.
      replaces: whether invalid UTF-8 is replaced.
      streaming: whether files are read over the network.
      commit: what the revision stands for; '' until `resolve`.
      files: (split, path, bytes) of the files at that commit.
    """

    name: str
    repo: str
    revision: str | None = None
    config: str | None = None
    column: str = 'text'
    fraction: float | None = None
    restores: bool = False
    replaces: bool = False
    streaming: bool = False
    commit: str = ''
    files: tuple[tuple[str, str, int], ...] = ()

    @property
    def key(self) -> str:
        """Of what was asked for."""
        return _digest([self.repo, self.revision, *self._reading])

    @property
    def fingerprint(self) -> str:
        """Of the text at the commit; '' until that is known."""
        return _digest([self.repo, self.commit, *self._reading]) if self.commit else ''

    @property
    def split_rule(self) -> str:
        """What is held out."""
        if self._own_validation:
            return "the dataset's own validation split"
        return f'{self._fraction} of the documents, by the hash of their text; copies are in the same split'

    def resolve(self, recorded: Mapping[str, Any] | None = None) -> 'HubCorpus':
        """Asks the hub for the commit and its files, or takes those that `source` recorded.

        Raises InputError within seconds where the hub does not answer, and where it has no such dataset in parquet.
        """
        if recorded is not None:
            files = tuple((split, path, size) for split, path, size in recorded['files'])
            return dataclasses.replace(self, commit=recorded['commit'], files=files)
        commit, sizes, found = self._ask(self.revision)
        if not found.get('train') and self.revision is None:
            commit, sizes, found = self._ask(CONVERTED)
            if any('/partial-' in path for path in found.get('train', ())):
                raise InputError(
                    f'data.corpus={self.name}: {self.repo} is not in parquet, and the hub has converted its first 5 GB '
                    f'alone; to train on these, name hub:{self.repo}@{CONVERTED}'
                )
        if not found.get('train'):
            raise InputError(f'data.corpus={self.name}: {self._where} has no parquet files to train on')
        files = tuple((split, path, sizes[path]) for split in SPLITS for path in found.get(split, ()))
        return dataclasses.replace(self, commit=commit, files=files)

    def source(self) -> dict[str, Any]:
        """Dataset, commit and files."""
        return {
            'hub': self.repo,
            'revision': self.revision,
            'commit': self.commit,
            'config': self.config,
            'files': [list(file) for file in self.files],
        }

    def decoder(self) -> Decoder:
        """As `data.invalid_bytes` says."""
        return Decoder(self.replaces)

    def parts(self) -> Sequence[Part]:
        """Shares of the files, by their size."""
        parts = []
        for split, path, size in self._read_files:
            shares = -(-size // corpora.PART_BYTES) or 1
            split = split if self._own_validation else ''
            parts += [Part(path, share, shares, split, size=size // shares) for share in range(shares)]
        if not self.restores:
            return parts
        present = [split for split in SPLITS if any(part.split == split for part in parts)] or ['']
        sizes = {split: sum(part.size for part in parts if part.split == split) for split in present}
        return [Part('', split=split, size=sizes[split]) for split in present]

    def fetch(self, part: Part) -> None:
        """Downloads the part's files into the hub's cache, unless they are there or are streamed."""
        if not self.streaming:
            for path in self._paths(part):
                self._cached(path)

    def read(self, part: Part, decoder: Decoder) -> Iterator[Passage]:
        """The passages of a part."""
        share = (0, 1) if self.restores else (part.start, part.stop)
        texts = (text for path in self._paths(part) for text in self._rows(path, share, decoder))
        for text in articles(texts) if self.restores else texts:
            if text:
                yield Passage(part.split or split_of(text, self._fraction), text)

    @property
    def _reading(self) -> list[Any]:
        return [self.config, self.column, self.fraction, self.restores, self.replaces]

    @property
    def _fraction(self) -> float:
        return FRACTION if self.fraction is None else self.fraction

    @property
    def _own_validation(self) -> bool:
        return self.fraction is None and any(split == 'validation' for split, _, _ in self.files)

    @property
    def _read_files(self) -> list[tuple[str, str, int]]:
        return [file for file in self.files if self._own_validation or file[0] == 'train']

    @property
    def _where(self) -> str:
        return f'hub:{self.repo}' + (f'@{self.revision}' if self.revision else '')

    def _paths(self, part: Part) -> list[str]:
        if not self.restores:
            return [part.file]
        return [path for split, path, _ in self._read_files if part.split in ('', split)]

    def _ask(self, revision: str | None) -> tuple[str, dict[str, int], dict[str, list[str]]]:
        """Commit, file -> bytes, and split -> files of a revision."""
        with self._asking():
            import huggingface_hub

            info = huggingface_hub.HfApi().dataset_info(
                self.repo, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS
            )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        card = info.card_data.to_dict() if info.card_data else {}
        found = layout.splits(list(sizes), card.get('configs') or (), self.config, f'data.corpus={self.name}')
        return info.sha, sizes, found

    def _cached(self, path: str) -> pathlib.Path:
        with self._asking():
            import huggingface_hub

            found = huggingface_hub.hf_hub_download(self.repo, path, repo_type='dataset', revision=self.commit)
        return pathlib.Path(found)

    def _rows(self, path: str, share: tuple[int, int], decoder: Decoder) -> Iterator[str]:
        where = f'{self._where}/{path}'
        if not self.streaming:
            # The row of a blank line is empty, and ends an article's heading.
            yield from parquet_rows(self._cached(path), where, self.column, share, decoder, blank=self.restores)
            return
        with self._asking():
            import huggingface_hub

            with huggingface_hub.HfFileSystem().open(f'datasets/{self.repo}@{self.commit}/{path}', 'rb') as file:
                yield from parquet_rows(file, where, self.column, share, decoder, blank=self.restores)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns whatever the hub's client raises into one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            # Everything that can go wrong here is the source's: the client raises errors of httpx, of requests, of its
            # own and of the system, by version, without a common base.
            reason = next(iter(str(error).splitlines()), '')
            raise InputError(
                f'data.corpus={self.name}: cannot read {self._where} ({type(error).__name__}: {reason}); connect to '
                'the hub, see that HF_HUB_OFFLINE is not set, or use files that are here: --config.data.path='
                "'DIR/*.parquet'; data that were prepared before need no hub: --config.data.cache_dir=DIR"
            ) from error


# What the names stand for; a key of the config file wins over what is said here.
NAMED = {
    # 10 000 documents of OpenWebText, 50 MB; published as a loading script, so read from the hub's conversion.
    'openwebtext_10k': ('hub:stas/openwebtext-10k@refs/convert/parquet:plain_text', {'fraction': 0.05}),
    # 103 million words of Wikipedia, 540 MB, line by line; with a validation split of its own.
    'wikitext_103': ('hub:Salesforce/wikitext:wikitext-103-raw-v1', {'restores': True}),
    # OpenWebText, 8 million documents, 40 GB.
    'openwebtext': ('hub:Skylion007/openwebtext', {'fraction': 0.0005}),
    # 10 billion tokens of FineWeb-Edu, 27 GB of parquet.
    'fineweb_edu_10b': ('hub:HuggingFaceFW/fineweb-edu:sample-10BT', {'fraction': 0.0005}),
}


def load(config: DataConfig) -> HubCorpus:
    """The dataset that `data.corpus` names; nothing is asked of the hub yet. Raises InputError on a bad address."""
    address, settings = NAMED.get(config.corpus, (config.corpus, {}))
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(f'data.corpus={config.corpus}: write hub:OWNER/NAME[@REVISION][:CONFIG]')
    if config.validation_fraction is not None:
        settings = {**settings, 'fraction': config.validation_fraction}
    return HubCorpus(
        re.sub(r'[^\w.]+', '-', config.corpus),
        **match.groupdict(),
        column=config.column,
        replaces=config.invalid_bytes == 'replace',
        streaming=config.streaming,
        **settings,
    )


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
