"""Corpus -> tokenizer -> token shards, made once and kept in a cache by fingerprint."""

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable

import platformdirs

from gpt_jax.data import corpora
from gpt_jax.data import tokenizer as tokenizers
from gpt_jax.data.corpora import Corpus
from gpt_jax.data.encoding import Counted, pieces, token_chunks, up_to
from gpt_jax.data.files import replacing
from gpt_jax.data.shards import TokenShard, open_shard, write_shard
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import InputError

FORMAT = 1  # raise it whenever the code below would write other tokens or files: it is part of every fingerprint
MANIFEST = 'manifest.json'
TOKENIZER = 'tokenizer.json'
SHARDS = {'train': 'train.bin', 'validation': 'validation.bin'}
TOKENIZER_TEXT_LIMIT = 10**9  # characters that BPE learns from: more would change few merges and take hours
LEFTOVER_SECONDS = 24 * 3600


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      corpus: a name of `gpt_jax.data.corpora.NAMES`.
      path: a UTF-8 text file to use instead of `corpus`.
      tokenizer: 'bpe' (learned from the corpus), 'char', 'gpt2', or a directory with a GPT-2 vocabulary.
      vocab_size: tokens of a 'bpe' tokenizer, 257 or more; the others have their own size.
      cache_dir: where prepared data is kept; None is `data` in the user's cache folder.
    """

    corpus: str = 'python_docs'
    path: str | None = None
    tokenizer: str = 'bpe'
    vocab_size: int = 4096
    cache_dir: str | None = None


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
    train: TokenShard
    validation: TokenShard
    train_bytes: int
    validation_bytes: int
    fingerprint: str
    folder: pathlib.Path


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None, log: Callable[[str], None] = print) -> Prepared:
    """Tokenizer and token shards of `config`, from the cache where they are there, else made and put there.

    A `tokenizer` given here, such as a checkpoint's, is used instead of the one that `config` asks for. `log` gets one
    line for each stage. Several processes may prepare the same data at once; what an interrupted one leaves behind is
    never taken for finished.

    Raises InputError where the corpus or tokenizer cannot be had, the cache cannot be written, or files in it are
    damaged.
    """
    corpus = corpora.load(config.corpus, config.path)
    cache = pathlib.Path(config.cache_dir or pathlib.Path(platformdirs.user_cache_dir('gpt_jax'), 'data')).expanduser()
    folder, tokenizer = _choose(cache, corpus, config, tokenizer)
    if _complete(folder):
        prepared = _open(folder, corpus)
        log(f'data: reused from {folder}')
        return prepared
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        building = folder.with_name(f'{folder.name}.tmp-{secrets.token_hex(4)}')
        building.mkdir()
    except OSError as error:
        raise InputError(f'data.cache_dir={cache}: cannot be written ({error.strerror}); name another folder') from None
    try:
        _build(building, corpus, config, tokenizer, log)
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)  # it is gone where all went well
    return _open(folder, corpus)


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
        if given is None or (_complete(folder) and _manifest(folder)['tokenizer_fingerprint'] == given.fingerprint):
            return folder, given
    return _folder(cache, corpus, given.fingerprint), given


def _folder(cache: pathlib.Path, corpus: Corpus, tokenizer: str) -> pathlib.Path:
    return cache / f'{corpus.name}-{_digest(corpus.fingerprint, tokenizer)[:16]}'


def _digest(*parts: str) -> str:
    return hashlib.sha256('\n'.join((f'gpt_jax data {FORMAT}', *parts)).encode()).hexdigest()


def _complete(folder: pathlib.Path) -> bool:
    return all((folder / name).is_file() for name in (MANIFEST, TOKENIZER, *SHARDS.values()))


def _manifest(folder: pathlib.Path) -> dict:
    """The manifest, checked to have every entry that is read from it."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
        counts = [int(manifest[kind][split]) for kind in ('tokens', 'bytes') for split in SHARDS]
        names = [manifest[name] for name in ('fingerprint', 'corpus_fingerprint', 'tokenizer_fingerprint')]
        damaged = min(counts) < 0 or not all(isinstance(name, str) for name in names)
    except (ValueError, KeyError, TypeError):
        damaged = True
    if damaged:
        raise InputError(f'{path}: damaged; delete it to prepare the data anew')
    return manifest


def _open(folder: pathlib.Path, corpus: Corpus) -> Prepared:
    manifest = _manifest(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    fingerprint = _digest(corpus.fingerprint, tokenizer.fingerprint)
    if manifest['tokenizer_fingerprint'] != tokenizer.fingerprint:
        raise InputError(f'{folder / TOKENIZER}: not the tokenizer of this data; delete it to prepare the data anew')
    if manifest['fingerprint'] != fingerprint:
        raise InputError(f'{folder / MANIFEST}: of other data; delete it to prepare the data anew')
    shards = {}
    for split, name in SHARDS.items():
        shards[split] = open_shard(folder / name, tokenizer.fingerprint, tokenizer.vocab_size)
        if len(shards[split]) != manifest['tokens'][split]:
            raise InputError(
                f'{folder / name}: has {len(shards[split])} tokens and {MANIFEST} says {manifest["tokens"][split]}; '
                'delete it to prepare the data anew'
            )
    bytes_ = manifest['bytes']
    return Prepared(
        tokenizer,
        **shards,
        train_bytes=bytes_['train'],
        validation_bytes=bytes_['validation'],
        fingerprint=fingerprint,
        folder=folder,
    )


def _build(
    folder: pathlib.Path, corpus: Corpus, config: DataConfig, tokenizer: Tokenizer | None, log: Callable[[str], None]
) -> None:
    """Writes all files of `corpus` into the empty `folder`, the manifest last."""
    start = time.perf_counter()
    if tokenizer is None:
        tokenizer = _make_tokenizer(corpus, config)
    tokenizer.save(folder / TOKENIZER)
    log(f'tokenizer: {tokenizer.kind}, {_spaced(tokenizer.vocab_size)} tokens, {time.perf_counter() - start:.1f} s')
    start = time.perf_counter()
    documents, bytes_, tokens = {}, {}, {}
    for split, name in SHARDS.items():
        counted = Counted(corpus.documents(split))
        chunks = token_chunks(tokenizer, counted)
        tokens[split] = write_shard(folder / name, chunks, tokenizer.vocab_size, tokenizer.fingerprint)
        documents[split], bytes_[split] = counted.documents, counted.bytes
    log(f'{corpus.name}: {_spaced(sum(documents.values()))} documents, {sum(bytes_.values()) / 1e6:.1f} MB')
    log(
        f'tokens: {_spaced(tokens["train"])} train, {_spaced(tokens["validation"])} validation, '
        f'{sum(bytes_.values()) / sum(tokens.values()):.2f} bytes a token, {time.perf_counter() - start:.1f} s'
    )
    manifest = {
        'format': FORMAT,
        'corpus': corpus.name,
        'corpus_fingerprint': corpus.fingerprint,
        'tokenizer': tokenizer.kind,
        'tokenizer_fingerprint': tokenizer.fingerprint,
        'fingerprint': _digest(corpus.fingerprint, tokenizer.fingerprint),
        'vocab_size': tokenizer.vocab_size,
        'documents': documents,
        'bytes': bytes_,
        'tokens': tokens,
    }
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2).encode())


def _make_tokenizer(corpus: Corpus, config: DataConfig) -> Tokenizer:
    if config.tokenizer == 'gpt2':
        return tokenizers.gpt2()
    texts = (piece for document in corpus.documents('train') for piece in pieces(document))
    if config.tokenizer == 'char':
        return tokenizers.train_char(texts)
    return tokenizers.train_bpe(up_to(TOKENIZER_TEXT_LIMIT, texts), config.vocab_size)


def _publish(building: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives a finished folder its name; where another process was faster, its equal work is kept instead."""
    if folder.exists() and not _complete(folder):  # somebody deleted a file to have it made anew
        aside = folder.with_name(f'{folder.name}.tmp-{secrets.token_hex(4)}')
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(building, folder)
    except OSError:  # the name is taken
        if not _complete(folder):
            raise


def _remove_leftovers(cache: pathlib.Path) -> None:
    """Removes what killed processes left; a folder that a living one builds is younger than a day."""
    for folder in cache.glob('*.tmp-*'):
        if time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _spaced(number: int) -> str:
    return f'{number:,}'.replace(',', ' ')
