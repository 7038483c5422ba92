"""Corpora -> tokenizer -> token shards, made once and kept in a cache by fingerprint.

What a run trains on is a mixture of corpora, all in the ids of one tokenizer; a single corpus is a mixture of one. The
names of corpora:

python_docs                     the running Python's documentation, 2-3 MB, on every machine (the default)
openwebtext_10k                 10 000 documents of OpenWebText, 50 MB, from the Hugging Face hub
wikitext_103                    articles of Wikipedia, 540 MB, from the hub
openwebtext                     OpenWebText, 8 million documents, 40 GB, from the hub
fineweb_edu_10b                 10 billion tokens of FineWeb-Edu, 27 GB of parquet, from the hub
hub:REPO[@REVISION][:CONFIG]    any dataset of the hub that `datasets` reads and that has a column of text
text                            local files, `data.path`
"""

import contextlib
import dataclasses
import errno
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import tqdm

from gpt_jax.config import DataConfig
from gpt_jax.data import hub, local, python_docs
from gpt_jax.data import tokenizer as tokenizers
from gpt_jax.data.batches import TokenSource
from gpt_jax.data.corpus import Corpus
from gpt_jax.data.parts import PARTS, Job, build_parts, lock, read_report, worthwhile
from gpt_jax.data.shards import (
    PREPARE_AGAIN,
    TOKENIZER,
    Tokens,
    check_manifest,
    digest,
    is_complete,
    open_shards,
    read_json,
    read_manifest,
    write_manifest,
)
from gpt_jax.data.shared import SharedFolder
from gpt_jax.data.tokenizer import Tokenizer, pieces, shorten_words, up_to
from gpt_jax.errors import InputError
from gpt_jax.files import check_local, replacing

NAMES = ('python_docs', 'text', *hub.NAMED)
SOURCE = 'source.json'
TOKENIZER_TEXT_LIMIT = 10**8  # characters that BPE learns from: more would change few merges and take hours
TOKENIZER_PARTS = 32  # that they are spread over
MIXTURE_FORM = 'write NAME:WEIGHT,NAME:WEIGHT with weights above 0, such as python_docs:0.7,notes.txt:0.3'


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A corpus as tokens, with what is needed to read them.

    Attributes:
      tokenizer: made the tokens.
      train: the training tokens; end of text follows every document.
      validation: the held-out tokens, likewise.
      train_bytes: UTF-8 bytes of the training text, separators not counted.
      validation_bytes: UTF-8 bytes of the held-out text, for bits per byte.
      fingerprint: hex sha256 of corpus, tokenizer and format; the same one means the same tokens.
      folder: where the files are.
    """

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    train_bytes: int
    validation_bytes: int
    fingerprint: str
    folder: pathlib.Path


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """All corpora of a run.

    Attributes:
      tokenizer: made the tokens of all of them.
      prepared: name -> the corpus's tokens, in the order in which they were given.
      weights: name -> share of the training rows; they add up to 1.
    """

    tokenizer: Tokenizer
    prepared: Mapping[str, Prepared]
    weights: Mapping[str, Fraction]

    @property
    def fingerprint(self) -> str:
        """Hex sha256: the same one means the same tokens. Of a single corpus it is its own."""
        prints = [prepared.fingerprint for prepared in self.prepared.values()]
        return prints[0] if len(prints) == 1 else digest(*prints)

    @property
    def train(self) -> tuple[TokenSource, ...]:
        """The training splits, as `Batches` takes them."""
        return tuple(TokenSource(name, self.prepared[name].train, weight) for name, weight in self.weights.items())


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    log: Callable[[str], None] = print,
    piece: tuple[int, int] | None = None,
) -> TrainingData | None:
    """Tokenizer and token shards of `config`, from the cache where they are there, else made and put there.

    Several processes may prepare the same data at once, and share the work. What a killed one has finished is kept, and
    nothing else is taken for finished. A tokenizer that is learned learns from every corpus of a mixture, from as much
    of each as its weight says.

    Args:
      config: the section `data` of an experiment.
      tokenizer: such as a checkpoint's, instead of the one that `config` asks for.
      log: gets one line for each stage.
      piece: (3, 16): prepare the third of sixteen shares only, while other machines prepare the others. Where they
        share a folder, whoever finishes last completes it; else that is whoever runs it after all files were copied
        into one. Machines that share no folder need one tokenizer of a mixture: `gpt2`, or a folder that holds it.

    Returns:
      The data; None while parts of other pieces are missing.

    Raises:
      InputError: the mixture cannot be read or names what is no corpus and no file, a corpus or the tokenizer cannot be
        had, the cache cannot be written, or files in it are damaged.
    """
    if config.cache_dir is not None:
        if (shared := config.shared_cache) is not None:
            from gpt_jax import storage

            storage.check_reachable(shared, f'data.cache_dir={config.cache_dir}')
        else:
            check_local(config.cache_dir, f'data.cache_dir={config.cache_dir}')
        if '\0' in config.cache_dir:
            raise InputError(f'data.cache_dir={config.cache_dir}: no name of a folder; name another one')
    if config.mixture is not None and config.path is not None:
        raise InputError(f'data.path={config.path} beside data.mixture={config.mixture}: name the file in the mixture')
    if config.mixture is None:
        # A single corpus may be called anything: its name is not looked for in the text of a mixture.
        name = config.path or config.corpus
        weights, corpora = {name: Fraction(1)}, {name: load_corpus(config)}
    else:
        weights = parse_mixture(config.mixture)
        corpora = _load_mixture(config, weights)
        if tokenizer is None and config.tokenizer in ('bpe', 'char'):
            tokenizer = _shared_tokenizer(config, corpora, weights, log)
    markers = [tokenizers.END_OF_TEXT] + ([tokenizer.decode([tokenizer.end_of_text])] if tokenizer else [])
    for corpus in corpora.values():
        for line in corpus.notices(markers):
            log(line)
    prepared = {
        name: _prepare_corpus(corpus, config, tokenizer, piece or (1, 1), log) for name, corpus in corpora.items()
    }
    if None in prepared.values():
        return None  # other machines are still at their pieces
    return TrainingData(next(iter(prepared.values())).tokenizer, prepared, weights)


def parse_mixture(mixture: str) -> dict[str, Fraction]:
    """Name -> weight of 'NAME:WEIGHT,NAME:WEIGHT,...', in that order; weights add up to 1, whatever they did before.

    What stands before the last colon is the name, so that a name may hold colons, and commas where there is such a
    file.

    Raises InputError where a part has no weight, a weight is no number above 0, or a name stands there twice.
    """
    weights: dict[str, Fraction] = {}
    parts = mixture.split(',')
    while parts:
        # A name with commas takes several parts, the last of which has its weight.
        joined = {size: _part_of(','.join(parts[:size]))[0] for size in range(1, len(parts) + 1)}
        size = next((size for size, name in joined.items() if local.is_there(name)), 1)
        part, parts = ','.join(parts[:size]), parts[size:]
        name, text = _part_of(part)
        if not name or ':' not in part:
            raise InputError(f'data.mixture={mixture}: {part.strip()!r} is no source with a weight; {MIXTURE_FORM}')
        if name in weights:
            raise InputError(f'data.mixture={mixture}: {name} stands there twice; add its weights up')
        weight = _weight(text)
        if weight is None:
            what = f'the weight {text!r} of {name} is no number'
            raise InputError(f'data.mixture={mixture}: {what}; {MIXTURE_FORM}')
        if weight <= 0:
            what = f'the weight {text} of {name} is not above 0'
            raise InputError(f'data.mixture={mixture}: {what}; {MIXTURE_FORM}, or drop it')
        weights[name] = weight
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _part_of(part: str) -> tuple[str, str]:
    """'NAME:WEIGHT' -> its two, without the spaces around them, unless a file's name has them."""
    name, _, weight = part.rpartition(':')
    return (name if local.is_there(name) else name.strip()), weight.strip()


def _weight(text: str) -> Fraction | None:
    """An exact number; None where it is none, or has so many digits that reckoning with it takes for ever."""
    exponent = re.search(r'e([+-]?[\d_]+)$', text, re.IGNORECASE)
    try:
        if len(text) > 100 or (exponent and abs(int(exponent[1])) > 100):
            return None
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def _load_mixture(config: DataConfig, names: Iterable[str]) -> dict[str, Corpus]:
    """The corpora of a mixture. A separator holds for those of them that it stands in."""
    corpora = {}
    for name in names:
        if name in NAMES or name.startswith('hub:'):
            own = dataclasses.replace(config, mixture=None, corpus=name)
        elif local.is_there(name):
            own = dataclasses.replace(config, mixture=None, corpus='text', path=name)
        else:
            known = ', '.join(known for known in NAMES if known != 'text')
            what = f'{name} is no file and no corpus; name {known}, hub:OWNER/NAME or a file'
            raise InputError(f'data.mixture={config.mixture}: {what}')
        corpora[name] = load_corpus(own, in_mixture=True)
    if config.separator and not any(corpus.separator for corpus in corpora.values()):
        what = f'stands in no text of data.mixture={config.mixture}; correct or unset it'
        raise InputError(f'data.separator={config.separator!r}: {what}')
    return corpora


def load_corpus(config: DataConfig, in_mixture: bool = False) -> Corpus:
    """The corpus that `config` names; with a `path`, the files there, whatever the name.

    `in_mixture`: a separator that does not fit the corpus is for others.

    Nothing is downloaded or parsed before its documents are asked for; local files are read once for their fingerprint.

    Raises InputError on an unknown name and on local files that are missing, empty or cannot be read.
    """
    name = config.corpus
    if name not in NAMES and not name.startswith('hub:'):
        raise InputError(f'data.corpus={name}: unknown; use one of {", ".join(NAMES)} or hub:OWNER/NAME')
    if config.separator is not None:
        try:
            config.separator.encode()
        except UnicodeEncodeError:
            raise InputError(f'data.separator={config.separator!a}: not UTF-8, so no text holds it') from None
    if config.path is not None:
        return local.load_local(config, in_mixture)
    if name == 'text':
        raise InputError('data.corpus=text needs a file: set --config.data.path=FILE')
    if name != 'python_docs':
        return hub.load_hub(config)
    if config.separator and not in_mixture:
        raise InputError(f'data.separator={config.separator!r}: python_docs has documents of its own; unset it')
    return python_docs.PythonDocs(config.validation_fraction or python_docs.FRACTION)


def _shared_tokenizer(
    config: DataConfig,
    corpora: Mapping[str, Corpus],
    weights: Mapping[str, Fraction],
    log: Callable[[str], None],
) -> Tokenizer:
    """The tokenizer of a mixture, from the cache where it was learned before."""
    kind = _tokenizer_key(config)
    cache = config.cache
    folder = (
        cache / f'mixture-{digest(kind, *(f"{corpus.key} {weights[name]}" for name, corpus in corpora.items()))[:16]}'
    )
    shared = SharedFolder(folder, config.shared_cache)
    with _writing(cache):
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        with lock(folder, TOKENIZER):
            shared.fetch(TOKENIZER)
            if (folder / TOKENIZER).is_file():
                return Tokenizer.load(folder / TOKENIZER)
            log(f'tokenizer: learning {kind} from {", ".join(weights)}')
            resolved = {name: corpus.resolve() for name, corpus in corpora.items()}
            if config.tokenizer == 'char':
                tokenizer = tokenizers.train_char(
                    text for corpus in resolved.values() for text in corpus.documents('train')
                )
            else:
                limits = {name: int(weight * TOKENIZER_TEXT_LIMIT) for name, weight in weights.items()}
                samples = (text for name, corpus in resolved.items() for text in up_to(limits[name], _sample(corpus)))
                tokenizer = tokenizers.train_bpe(samples, config.vocab_size)
            tokenizer.save(folder / TOKENIZER)
            return tokenizer if shared.publish_first(TOKENIZER) else Tokenizer.load(folder / TOKENIZER)


def _tokenizer_key(config: DataConfig) -> str:
    """What names the folders of data whose tokenizer is made for them, or is GPT-2's."""
    return f'bpe-{config.vocab_size}' if config.tokenizer == 'bpe' else config.tokenizer


def _prepare_corpus(
    corpus: Corpus,
    config: DataConfig,
    tokenizer: Tokenizer | None,
    piece: tuple[int, int],
    log: Callable[[str], None],
) -> Prepared | None:
    """One corpus of the mixture, or this piece of it; None while parts of other pieces are missing."""
    cache = config.cache
    folder, tokenizer = _choose_folder(cache, corpus, config, tokenizer, log)
    shared = SharedFolder(folder, config.shared_cache)
    shared.pull(log)
    if is_complete(folder):
        # The corpus is neither read nor resolved: this takes no network, and milliseconds.
        prepared = _open_folder(folder, corpus, log)
        log(f'data: reused from {shared.name}')
        return prepared
    with _writing(cache):
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        shared.fetch(SOURCE, TOKENIZER)
        unresolved, corpus = corpus, _resolve(shared, corpus)
        for line in corpus.notices([tokenizers.END_OF_TEXT]) if corpus is not unresolved else ():
            log(line)
        tokenizer = _tokenizer_of(shared, corpus, config, tokenizer, log)
        if not _build(shared, corpus, config, tokenizer, piece, log):
            return None
        shared.pull(log)
    return _open_folder(folder, corpus, log)


def _choose_folder(
    cache: pathlib.Path, corpus: Corpus, config: DataConfig, given: Tokenizer | None, log: Callable[[str], None]
) -> tuple[pathlib.Path, Tokenizer | None]:
    """The folder for this data, and its tokenizer where that is known without the corpus or the network."""

    def folder_of(key: str) -> pathlib.Path:
        return cache / f'{corpus.name}-{digest(corpus.key, key)[:16]}'

    named = config.tokenizer in ('bpe', 'char', 'gpt2')
    if not named and given is None:
        given = tokenizers.gpt2(config.tokenizer)
    if config.tokenizer == 'bpe' and config.vocab_size < tokenizers.SMALLEST_BPE:
        raise InputError(
            f'data.vocab_size={config.vocab_size}: too few for 256 bytes and end of text; '
            f'use {tokenizers.SMALLEST_BPE} or more'
        )
    if named:
        folder = folder_of(_tokenizer_key(config))
        # A resumed run gives the tokenizer that was made here before: its shards are here, too.
        if given is None:
            return folder, None  # made, or downloaded, only where the folder is not complete
        SharedFolder(folder, config.shared_cache).pull(log)
        if is_complete(folder) and read_manifest(folder)['tokenizer_fingerprint'] == given.fingerprint:
            return folder, given
    return folder_of(given.fingerprint), given


@contextlib.contextmanager
def _writing(cache: pathlib.Path) -> Iterator[None]:
    """Turns errors of writing in `cache` into InputError, and leaves all others alone."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'data.cache_dir={cache}: cannot be made ({error.strerror}); name another folder') from None
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f'data.cache_dir={cache}: the disk is full; free some space, or name another folder, and run the '
                'command again: the finished parts are kept'
            ) from None
        place = error.filename2 or error.filename
        if place is None or not pathlib.Path(place).is_relative_to(cache):
            raise
        what = cache if pathlib.Path(place) == cache else f'{cache}: {place}'
        raise InputError(f'data.cache_dir={what} cannot be written ({error.strerror}); name another folder') from None


def _resolve(shared: SharedFolder, corpus: Corpus) -> Corpus:
    """The corpus as the first process to prepare it here has found it, so that all parts are of one revision."""
    with lock(shared.folder, SOURCE):
        path = shared.folder / SOURCE
        if not path.is_file():
            resolved = corpus.resolve()
            with replacing(path) as file:
                file.write(json.dumps(resolved.source(), indent=2).encode())
            if shared.publish_first(SOURCE):
                return resolved
        recorded = read_json(path)
        try:
            return corpus.resolve(recorded)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f'{path}: damaged; {PREPARE_AGAIN}') from None


def _tokenizer_of(
    shared: SharedFolder, corpus: Corpus, config: DataConfig, tokenizer: Tokenizer | None, log: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer of the folder, made by one process where several are here."""
    start = time.perf_counter()
    with lock(shared.folder, TOKENIZER):
        path = shared.folder / TOKENIZER
        if tokenizer is None and path.is_file():
            tokenizer = Tokenizer.load(path)
        else:
            tokenizer = tokenizer or _make_tokenizer(corpus, config)
            tokenizer.save(path)
        if not shared.publish_first(TOKENIZER):
            tokenizer = Tokenizer.load(path)
    log(f'tokenizer: {tokenizer.kind}, {_spaced(tokenizer.vocab_size)} tokens, {time.perf_counter() - start:.1f} s')
    return tokenizer


def _make_tokenizer(corpus: Corpus, config: DataConfig) -> Tokenizer:
    if config.tokenizer == 'gpt2':
        return tokenizers.gpt2()
    if config.tokenizer == 'char':
        return tokenizers.train_char(piece for text in corpus.documents('train') for piece in pieces(text))
    return tokenizers.train_bpe(_sample(corpus), config.vocab_size)


def _sample(corpus: Corpus) -> Iterator[str]:
    """The training text that BPE learns from: the beginnings of parts that are spread over the corpus."""
    parts = [part for part in corpus.parts() if part.split in ('', 'train')]
    chosen = parts
    if len(parts) > TOKENIZER_PARTS:
        # The first parts alone may all be of one year, one site or one language.
        chosen = [parts[number * len(parts) // TOKENIZER_PARTS] for number in range(TOKENIZER_PARTS)]
    empty = True
    for part in chosen:
        texts = (shorten_words(piece) for text in corpus.texts(part, 'train') for piece in pieces(text))
        for text in up_to(TOKENIZER_TEXT_LIMIT // len(chosen), texts):
            empty = False
            yield text
    if empty:
        raise corpus.empty_split('train')


def _build(
    shared: SharedFolder,
    corpus: Corpus,
    config: DataConfig,
    tokenizer: Tokenizer,
    piece: tuple[int, int],
    log: Callable[[str], None],
) -> bool:
    """Makes this piece's parts and, where no other's is missing then, the manifest; returns whether none is."""
    start, folder = time.perf_counter(), shared.folder
    # The same for every machine and number of workers: pieces and restarts count on it.
    parts = corpus.parts()
    jobs = [Job(folder, corpus, number, part) for number, part in enumerate(parts)]
    own, there = jobs[piece[0] - 1 :: piece[1]], shared.reports(corpus, tokenizer)

    def finished(job: Job) -> dict[str, Any] | None:
        return there.get(job.number) or read_report(folder, job.number, corpus, tokenizer)

    mine = [job for job in own if finished(job) is None]
    if len(mine) < len(own):
        log(f'data: going on in {shared.name}, {len(mine)} of {len(parts)} parts to do')
    num_workers = config.num_workers or worthwhile(mine)
    with _progress(mine) as done:
        if shared.address is None:
            build_parts(mine, tokenizer, num_workers, done)
        else:
            there = shared.share(
                own, tokenizer, corpus, lambda few: build_parts(few, tokenizer, num_workers, done), 2 * num_workers
            )
    reports = [finished(job) for job in jobs]
    missing = reports.count(None)
    if missing:
        log(f'data: piece {piece[0]}/{piece[1]} is done; {missing} of {len(parts)} parts are missing in {shared.name}')
        return False
    content = write_manifest(folder, corpus, tokenizer, reports)
    shared.publish_manifest()
    _log_counts(corpus, content, time.perf_counter() - start, log)
    return True


@contextlib.contextmanager
def _progress(jobs: list[Job]) -> Iterator[Callable[[Job], None]]:
    """A bar over the bytes of the source, on a terminal and where there is more than one part."""
    total = sum(job.part.size for job in jobs)
    with tqdm.tqdm(
        total=total, desc='preparing', unit='B', unit_scale=True, disable=True if len(jobs) < 2 else None
    ) as bar:
        yield lambda job: bar.update(job.part.size)


def _log_counts(corpus: Corpus, content: dict[str, Any], seconds: float, log: Callable[[str], None]) -> None:
    documents, bytes_, tokens = (content[name] for name in ('documents', 'bytes', 'tokens'))
    replaced = content['replaced_bytes']
    log(
        f'{corpus.name}: {_spaced(sum(documents.values()))} documents, {sum(bytes_.values()) / 1e6:.1f} MB'
        + (f', {_spaced(replaced)} times U+FFFD in the place of invalid bytes' if replaced else '')
    )
    log(
        f'tokens: {_spaced(tokens["train"])} train, {_spaced(tokens["validation"])} validation, '
        f'{sum(bytes_.values()) / sum(tokens.values()):.2f} bytes a token, {seconds:.1f} s'
    )


def _open_folder(folder: pathlib.Path, corpus: Corpus, log: Callable[[str], None]) -> Prepared:
    content = read_manifest(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    check_manifest(folder, content, corpus, tokenizer)
    shards = open_shards(folder, content, tokenizer, log)
    return Prepared(
        tokenizer,
        Tokens(shards['train']),
        Tokens(shards['validation']),
        train_bytes=content['bytes']['train'],
        validation_bytes=content['bytes']['validation'],
        fingerprint=content['fingerprint'],
        folder=folder,
    )


def _spaced(number: int) -> str:
    return f'{number:,}'.replace(',', ' ')
