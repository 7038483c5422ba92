"""Corpus -> tokenizer -> token shards, made once and kept in a cache by fingerprint."""

import contextlib
import dataclasses
import errno
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import tqdm

from gpt_jax.config import DataConfig
from gpt_jax.data import corpora, manifest
from gpt_jax.data import tokenizer as tokenizers
from gpt_jax.data.building import PARTS, Job, lock, read_report
from gpt_jax.data.corpus import SPLITS, Corpus, empty_split
from gpt_jax.data.encoding import pieces, shorten_words, up_to
from gpt_jax.data.manifest import SOURCE, TOKENIZER, digest
from gpt_jax.data.shards import Tokens
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.data.workers import build_parts, worthwhile
from gpt_jax.errors import InputError
from gpt_jax.files import replacing

TOKENIZER_TEXT_LIMIT = 10**8  # characters that BPE learns from: more would change few merges and take hours
TOKENIZER_PARTS = 32  # that they are spread over


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


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None, log: Callable[[str], None] = print) -> Prepared:
    """Tokenizer and token shards of `config`, from the cache where they are there, else made and put there.

    A `tokenizer` given here, such as a checkpoint's, is used instead of the one that `config` asks for. `log` gets one
    line for each stage. Several processes may prepare the same data at once, and share the work. What a killed one has
    finished is kept, and nothing else is taken for finished.

    Raises InputError where the corpus or tokenizer cannot be had, the cache cannot be written, or files in it are
    damaged.
    """
    prepared = prepare_piece(config, (1, 1), tokenizer, log)
    assert prepared is not None  # the only piece is all of it
    return prepared


def prepare_piece(
    config: DataConfig,
    piece: tuple[int, int],
    tokenizer: Tokenizer | None = None,
    log: Callable[[str], None] = print,
) -> Prepared | None:
    """`prepare` for the share of one machine: `piece` (3, 16) is the third of sixteen.

    Returns None while parts of other pieces are missing. Whoever finishes last completes the folder; where the machines
    share no folder, that is whoever runs it after all files were copied into one.
    """
    config.check()
    corpus = corpora.load(config)
    cache = config.cache
    folder, tokenizer = _choose(cache, corpus, config, tokenizer)
    if manifest.complete(folder):
        prepared = _open(folder, corpus, log)
        log(f'data: reused from {folder}')
        return prepared
    with writing(cache):
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        corpus = _resolved(folder, corpus)
        tokenizer = _tokenizer_of(folder, corpus, config, tokenizer, log)
        if not _build(folder, corpus, config, tokenizer, piece, log):
            return None
    return _open(folder, corpus, log)


def _choose(
    cache: pathlib.Path, corpus: Corpus, config: DataConfig, given: Tokenizer | None
) -> tuple[pathlib.Path, Tokenizer | None]:
    """The folder for this data, and its tokenizer where that is known without the corpus or the network."""
    trained = {'bpe': f'bpe-{config.vocab_size}', 'char': 'char', 'gpt2': 'gpt2'}
    if config.tokenizer not in trained and given is None:
        given = tokenizers.gpt2(config.tokenizer)
    if config.tokenizer == 'bpe' and config.vocab_size < tokenizers.SMALLEST_BPE:
        raise InputError(
            f'data.vocab_size={config.vocab_size}: too few for 256 bytes and end of text; '
            f'use {tokenizers.SMALLEST_BPE} or more'
        )
    if config.tokenizer in trained:
        folder = _folder(cache, corpus, trained[config.tokenizer])
        # A resumed run gives the tokenizer that was made here before: its shards are here, too.
        if given is None:
            return folder, None
        if manifest.complete(folder) and manifest.read(folder)['tokenizer_fingerprint'] == given.fingerprint:
            return folder, given
    return _folder(cache, corpus, given.fingerprint), given


def _folder(cache: pathlib.Path, corpus: Corpus, tokenizer: str) -> pathlib.Path:
    return cache / f'{corpus.name}-{digest(corpus.key, tokenizer)[:16]}'


@contextlib.contextmanager
def writing(cache: pathlib.Path) -> Iterator[None]:
    """Turns errors of writing in `cache` into InputError, and leaves all others alone."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f'data.cache_dir={cache}: the disk is full; free some space, or name another folder, and run the '
                'command again: the finished parts are kept'
            ) from None
        if error.filename is None or not pathlib.Path(error.filename).is_relative_to(cache):
            raise
        raise InputError(f'data.cache_dir={cache}: cannot be written ({error.strerror}); name another folder') from None


def _resolved(folder: pathlib.Path, corpus: Corpus) -> Corpus:
    """The corpus as the first process to prepare it here has found it, so that all parts are of one revision."""
    with lock(folder, SOURCE):
        path = folder / SOURCE
        if path.is_file():
            return corpus.resolve(manifest.read_json(path))
        corpus = corpus.resolve()
        with replacing(path) as file:
            file.write(json.dumps(corpus.source(), indent=2).encode())
    return corpus


def _tokenizer_of(
    folder: pathlib.Path, corpus: Corpus, config: DataConfig, tokenizer: Tokenizer | None, log: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer of the folder, made by one process where several are here."""
    start = time.perf_counter()
    with lock(folder, TOKENIZER):
        path = folder / TOKENIZER
        if tokenizer is None and path.is_file():
            tokenizer = Tokenizer.load(path)
        else:
            tokenizer = tokenizer or _make_tokenizer(corpus, config)
            tokenizer.save(path)
    log(f'tokenizer: {tokenizer.kind}, {_spaced(tokenizer.vocab_size)} tokens, {time.perf_counter() - start:.1f} s')
    return tokenizer


def _make_tokenizer(corpus: Corpus, config: DataConfig) -> Tokenizer:
    if config.tokenizer == 'gpt2':
        return tokenizers.gpt2()
    if config.tokenizer == 'char':
        return tokenizers.train_char(piece for text in corpus.documents('train') for piece in pieces(text))
    return tokenizers.train_bpe(sample(corpus), config.vocab_size)


def sample(corpus: Corpus) -> Iterator[str]:
    """The training text that BPE learns from: the beginnings of parts that are spread over the corpus."""
    parts = [part for part in corpus.parts() if part.split in ('', 'train')]
    spread = [parts[number * len(parts) // TOKENIZER_PARTS] for number in range(TOKENIZER_PARTS)]
    chosen = parts if len(parts) <= TOKENIZER_PARTS else spread
    empty = True
    for part in chosen:
        texts = (shorten_words(piece) for text in corpus.texts(part, 'train') for piece in pieces(text))
        for text in up_to(TOKENIZER_TEXT_LIMIT // len(chosen), texts):
            empty = False
            yield text
    if empty:
        raise empty_split('train', corpus.name)


def _build(
    folder: pathlib.Path,
    corpus: Corpus,
    config: DataConfig,
    tokenizer: Tokenizer,
    piece: tuple[int, int],
    log: Callable[[str], None],
) -> bool:
    """Makes this piece's parts and, where no other's is missing then, the manifest; returns whether none is."""
    start = time.perf_counter()
    parts = corpus.parts()
    jobs = [Job(folder, corpus, number, part) for number, part in enumerate(parts)]
    mine = [job for job in jobs[piece[0] - 1 :: piece[1]] if read_report(folder, job.number, corpus, tokenizer) is None]
    if len(mine) < len(parts[piece[0] - 1 :: piece[1]]):
        log(f'data: going on in {folder}, {len(mine)} of {len(parts)} parts to do')
    with _progress(mine) as done:
        build_parts(mine, tokenizer, folder / TOKENIZER, config.num_workers or worthwhile(mine), done)
    reports = [read_report(folder, job.number, corpus, tokenizer) for job in jobs]
    missing = reports.count(None)
    if missing:
        log(f'data: piece {piece[0]}/{piece[1]} is done; {missing} of {len(parts)} parts are missing in {folder}')
        return False
    content = manifest.make(corpus, tokenizer, reports)
    for split in SPLITS:
        if not content['tokens'][split]:
            raise empty_split(split, corpus.name)
    manifest.write(folder, content)
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


def _open(folder: pathlib.Path, corpus: Corpus, log: Callable[[str], None]) -> Prepared:
    content = manifest.read(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    manifest.check(folder, content, corpus, tokenizer)
    shards = manifest.open_shards(folder, content, tokenizer, log)
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
