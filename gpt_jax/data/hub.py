"""Corpora on the Hugging Face hub, at one commit, in every format that `datasets` reads: parquet, JSON, CSV, text, ...

`datasets` finds out which files are which split, and reads them. It always streams here: from the hub
(`data.streaming`), or from the files that `huggingface_hub` has downloaded into its cache. Without streaming it would
write all text a second time, as Arrow files.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpt_jax.config import DataConfig
from gpt_jax.data import corpus as corpora
from gpt_jax.data.corpus import SPLITS, Corpus, Decoder, Part, Passage, by_hash, split_of, split_stretches
from gpt_jax.data.formats import check_text_type, text_bytes
from gpt_jax.data.tokenizer import up_to
from gpt_jax.errors import InputError, first_line

ANSWER_SECONDS = 4.0
FRACTION = 0.005  # of the documents, where a dataset has no validation split of its own
BATCH_ROWS = 64  # read at a time: a row is a document, which may be long
LOOK_CHARACTERS = 2**22  # of plain text, that are looked at for markers
CONVERTED = 'refs/convert/parquet'  # the hub's own conversion: CONFIG/SPLIT/0000.parquet, without a card
ADDRESS = re.compile(r'hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<config>[^:@]+))?')
# What datasets call our splits; of their others ('test') nothing is read.
SPLIT_NAMES = {'train': ('train',), 'validation': ('validation', 'valid', 'val', 'dev')}
SPLIT_WORDS = {*SPLIT_NAMES['train'], *SPLIT_NAMES['validation'], 'test', 'testing', 'eval'}  # in the names of folders


@dataclasses.dataclass(frozen=True)
class HubCorpus(Corpus):
    """A dataset of the hub. A part is share `start` of `stop` of a file; where articles are restored, a whole split.

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
      separator: that stands between the documents of plain text; '': a line is one.
      commit: what the revision stands for; '' until `resolve`.
      files: (split, path, bytes) of the files at that commit.
      format: the `datasets` loader of the files, such as 'parquet', 'json' or 'csv'.
      options: that the dataset's card sets for this loader, such as `sep` of 'csv'.
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
    separator: str = ''
    commit: str = ''
    files: tuple[tuple[str, str, int], ...] = ()
    format: str = 'parquet'
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        return by_hash(self._fraction)

    def resolve(self, recorded: Mapping[str, Any] | None = None) -> 'HubCorpus':
        """Asks the hub for the commit and its files, or takes those that `source` recorded.

        Raises InputError within seconds where the hub does not answer, and where it has no such dataset to train on.
        """
        if recorded is not None:
            files = tuple((split, path, size) for split, path, size in recorded['files'])
            # Records without these two keys are older: only parquet was read then.
            settings = {'format': recorded.get('format', 'parquet'), 'options': recorded.get('options') or {}}
            return dataclasses.replace(self, commit=recorded['commit'], files=files, **settings)
        found = self._ask(self.revision)
        if found is None and self.revision is None:
            # A loading script, or a format that `datasets` does not know.
            found = self._ask(CONVERTED)
            if found is not None and any('/partial-' in path for _, path, _ in found.files):
                raise InputError(
                    f'data.corpus={self.name}: `datasets` cannot read {self.repo}, and the hub has converted its first '
                    f'5 GB alone; to train on these, name hub:{self.repo}@{CONVERTED}'
                )
        if found is None or not any(split == 'train' for split, _, _ in found.files):
            raise InputError(f'data.corpus={self.name}: {self._where} has no files to train on; name another dataset')
        return found

    def source(self) -> dict[str, Any]:
        """Dataset, commit and files."""
        return {
            'hub': self.repo,
            'revision': self.revision,
            'commit': self.commit,
            'config': self.config,
            'format': self.format,
            'options': dict(self.options) or None,
            'files': [list(file) for file in self.files],
        }

    def decoder(self) -> Decoder:
        """As `data.invalid_bytes` says."""
        return Decoder(self.replaces)

    def parts(self) -> Sequence[Part]:
        """Shares of parquet files, by their size; other files whole: `datasets` reads them from the start alone."""
        parts = []
        for split, path, size in self._read_files:
            shares = (-(-size // corpora.PART_BYTES) or 1) if self.format == 'parquet' else 1
            split = split if self._own_validation else ''
            parts += [Part(path, share, shares, split, size=size // shares) for share in range(shares)]
        if not self.restores:
            return parts
        present = [split for split in SPLITS if any(part.split == split for part in parts)] or ['']
        sizes = {split: sum(part.size for part in parts if part.split == split) for split in present}
        return [Part('', split=split, size=sizes[split]) for split in present]

    def notices(self, end_of_text: Iterable[str]) -> Iterator[str]:
        """Markers at the beginning of plain text; nothing before `resolve`, as the files are not known then."""
        if self.format != 'text' or not self.files or self.separator:
            return
        path = self._read_files[0][1]
        text = ''.join(up_to(LOOK_CHARACTERS, self._rows(path, (0, 1), Decoder(replaces=True))))
        for marker in dict.fromkeys(end_of_text):
            if marker in text:
                yield (
                    f'data.corpus={self.name}: at least {text.count(marker)} times {marker} in {path}, taken for '
                    f'ordinary text; to end documents there: --config.data.separator={shlex.quote(marker)}'
                )

    def fetch(self, part: Part) -> None:
        """Downloads the part's files into the hub's cache, unless they are there or are streamed."""
        if not self.streaming:
            for path in self._paths(part):
                with self._asking():
                    self._location(path)

    def read(self, part: Part, decoder: Decoder) -> Iterator[Passage]:
        """The passages of a part."""
        share = (0, 1) if self.restores else (part.start, part.stop)
        texts = (text for path in self._paths(part) for text in self._documents_of(path, share, decoder))
        for text in articles(texts) if self.restores else texts:
            if text:
                yield Passage(part.split or split_of(text, self._fraction), text)

    @property
    def _reading(self) -> list[Any]:
        separator = [self.separator] if self.separator else []
        return [self.config, self.column, self.fraction, self.restores, self.replaces, *separator]

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

    def _ask(self, revision: str | None) -> 'HubCorpus | None':
        """The corpus at a revision; None where `datasets` finds no files there that it can read."""
        with self._asking():
            import huggingface_hub

            # Asked before `datasets` is, which would try a silent hub again and again for half a minute.
            info = huggingface_hub.HfApi().dataset_info(
                self.repo, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS
            )
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            if f'{self.repo.split("/")[1]}.py' in sizes:
                return None  # a loading script, which `datasets` has refused since its version 4
            card = info.card_data.to_dict() if info.card_data else {}
            builder = self._builder(info.sha, card.get('configs') or ())
        if builder is None:
            return None
        files = []
        for split in SPLITS:
            paths = _paths_of(builder.config, SPLIT_NAMES[split])
            files += [(split, path, sizes[path]) for path in paths]
        return dataclasses.replace(
            self,
            commit=info.sha,
            files=tuple(files),
            format=type(builder).__module__.rpartition('.')[2],
            options=_options(builder.config),
        )

    def _builder(self, commit: str, listed: Sequence[Mapping[str, Any]]) -> Any:
        """The `datasets.DatasetBuilder` of the config; None where there is nothing that it can read.

        Args:
          commit: of the dataset.
          listed: the entry `configs` of its card, which may be empty.

        Raises InputError where the config is unknown, or there are several and none is asked for.
        """
        datasets = _datasets()
        try:
            if listed:
                default = any(entry.get('default') for entry in listed)
                self._check_config([str(entry.get('config_name', 'default')) for entry in listed], default)
                return datasets.load_dataset_builder(self.repo, self.config, revision=commit)
            # Where no card lists them, configs are folders, which `datasets` alone would mix.
            builder = datasets.load_dataset_builder(self.repo, revision=commit)
            paths = _paths_of(builder.config, builder.config.data_files)
            folders = sorted({path.split('/')[0] for path in paths if '/' in path})
            words = {word for folder in folders for word in re.findall('[a-z]+', folder.lower())}
            if self.config is None and words & SPLIT_WORDS:
                return builder
            self._check_config(folders)
            folder = self.config or ('default' if 'default' in folders else None)
            return datasets.load_dataset_builder(self.repo, data_dir=folder, revision=commit) if folder else builder
        except (datasets.exceptions.DataFilesNotFoundError, datasets.data_files.EmptyDatasetError):
            return None

    def _check_config(self, names: Sequence[str], default: bool = False) -> None:
        """Raises InputError where none of the configs is the one that is asked for, the only one or the default."""
        if self.config in names or (self.config is None and (default or len(names) <= 1 or 'default' in names)):
            return
        what = f'no config {self.config!r}' if self.config else 'several configs'
        shown = ', '.join(names[:20]) + (', ...' if len(names) > 20 else '')
        raise InputError(
            f'data.corpus={self.name} has {what}; name one as hub:REPO[@REVISION]:CONFIG: {shown or "there is none"}'
        )

    def _location(self, path: str) -> str:
        """Where `datasets` finds a file: on the hub, or in the hub's cache, after a download where it is not there."""
        if self.streaming:
            return f'hf://datasets/{self.repo}@{self.commit}/{path}'
        import huggingface_hub

        return huggingface_hub.hf_hub_download(self.repo, path, repo_type='dataset', revision=self.commit)

    def _stream(self, path: str, **options: Any) -> Any:
        """The `datasets.IterableDataset` of one file."""
        location = self._location(path)
        # What `datasets` takes for a pattern, unless it is an address.
        files = {'train': [location if self.streaming else glob.escape(location)]}
        return _datasets().load_dataset(
            self.format, data_files=files, split='train', streaming=True, **(dict(self.options) | options)
        )

    def _documents_of(self, path: str, share: tuple[int, int], decoder: Decoder) -> Iterator[str]:
        """The documents of a share of a file: its rows, or what stands between separators in plain text."""
        rows = self._rows(path, share, decoder)
        if self.format != 'text':
            return rows
        # A byte order mark, which is no text and which `datasets` leaves there.
        rows = itertools.chain((row.removeprefix('\ufeff') for row in itertools.islice(rows, 1)), rows)
        if not self.separator:
            return rows
        return (text for text in split_stretches(rows, self.separator) if not text.isspace())

    def _rows(self, path: str, share: tuple[int, int], decoder: Decoder) -> Iterator[str]:
        """The texts of a share (i of n, from 0) of a file, '' where a row has none."""
        where = f'{self._where}/{path}'
        with self._asking():
            for table in self._tables(path, share):
                if self.column not in table.column_names:
                    raise self._no_column(where, table.column_names)
                check_text_type(table.schema.field(self.column).type, self.column, where)
                for chunk in table.column(self.column).chunks:
                    for data in text_bytes(chunk):
                        yield decoder.text(data or b'', f'a row of {where}')

    def _tables(self, path: str, share: tuple[int, int]) -> Iterator[Any]:
        # Other columns of parquet are not read at all.
        only = {'columns': [self.column], 'batch_size': BATCH_ROWS} if self.format == 'parquet' else {}
        if self.format == 'text' and self.separator:
            only = {'keep_linebreaks': True}  # a separator may stand between them
        stream = self._stream(path, **only)
        if self.format == 'parquet':
            where = f'{self._where}/{path}'
            if self.column not in stream.features:
                raise self._no_column(where, list(self._stream(path).features))
            # Before anything is read: a reader that is given up may take the process with it as this ends.
            check_text_type(stream.features.arrow_schema.field(self.column).type, self.column, where)
        streams = [stream]
        if share != (0, 1):
            row_groups = stream.reshard()
            count, (number, shares) = row_groups.num_shards, share
            chosen = range(number * count // shares, (number + 1) * count // shares)
            # One by one: `shard(shares, number)` would divide them otherwise than the parts of data prepared earlier.
            streams = (row_groups.shard(count, group) for group in chosen)
        for each in streams:
            yield from each.with_format('arrow').iter(BATCH_ROWS)

    def _no_column(self, where: str, names: Sequence[str]) -> InputError:
        return InputError(f'data.column={self.column}: {where} has no such column, only {", ".join(names)}')

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns whatever `datasets` and the hub's client raise into one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            # Everything that can go wrong here is the source's: the libraries raise errors of httpx, of requests, of
            # pyarrow, of their own and of the system, by version, without a common base.
            if isinstance(error, UnicodeError | json.JSONDecodeError) or type(error).__module__.startswith('pyarrow'):
                what = f'a file of {self._where} is damaged, or not what it is called'
                raise InputError(
                    f'data.corpus={self.name}: {what} ({type(error).__name__}: {first_line(error)}); name another '
                    'dataset or revision, or correct it as a file of yours: --config.data.path=FILE'
                ) from error
            raise InputError(
                f'data.corpus={self.name}: cannot read {self._where} ({type(error).__name__}: {first_line(error)}); '
                'connect to the hub, see that HF_HUB_OFFLINE is not set, or use files that are here: '
                "--config.data.path='DIR/*.parquet'; data that were prepared before need no hub: "
                '--config.data.cache_dir=DIR'
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


def load_hub(config: DataConfig) -> HubCorpus:
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
        separator=config.separator or '',
        **settings,
    )


def _datasets() -> Any:
    """The library, without the lines that it prints: what goes wrong is said in one line of ours."""
    import datasets  # two seconds, and data that were prepared before do without it

    # Each of these is half a minute of the hub's client, which tries five times by itself: 20 would be ten minutes.
    datasets.config.STREAMING_READ_MAX_RETRIES = 3
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _paths_of(config: Any, splits: Iterable[str]) -> list[str]:
    """The files that a `datasets.BuilderConfig` has for some splits, by their path in the dataset."""
    urls = {str(url) for split in splits for url in config.data_files.get(split, ())}
    return sorted(url.partition('@')[2].partition('/')[2] for url in urls)  # hf://datasets/OWNER/NAME@COMMIT/PATH


def _options(config: Any) -> dict[str, Any]:
    """What the card of a dataset sets for its loader, beside the files."""
    named = {field.name for field in dataclasses.fields(_datasets().BuilderConfig)} | {'features'}
    defaults = type(config)()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: value for name, value in values.items() if name not in named and value != getattr(defaults, name, None)
    }


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


_TITLE = re.compile(r' = [^=\s](.*[^=\s])? = \n?')
BLANK = ' \n'  # a blank line, as WikiText's raw file has it


def articles(rows: Iterable[str]) -> Iterator[str]:
    """WikiText's articles, each with its title, as the raw file has them.

    The dataset has a row a line: ` = Title = ` opens an article, ` = = Section = = ` a section of it, and what is a
    blank line in the raw file is an empty row (Merity et al., "Pointer Sentinel Mixture Models", section 4). A title
    has a blank line before and after it: a line of an article may look like one.
    """
    lines: list[str] = []
    held: str | None = None  # a line that is a title if a blank one follows
    blank = True
    for row in rows:
        line = row if row.strip() else BLANK
        if held is not None:
            if line == BLANK:
                if any(before != BLANK for before in lines):
                    yield ''.join(lines)
                lines = []
            lines.append(held)
            held = None
        if blank and _TITLE.fullmatch(line):
            held = line
        else:
            lines.append(line)
        blank = line == BLANK
    if held is not None:
        lines.append(held)
    if any(before != BLANK for before in lines):
        yield ''.join(lines)
