"""Text <-> token ids: byte-level BPE, characters, or GPT-2's own vocabulary, behind one class.

Below it, documents -> ids in pieces: memory stays bounded and all cores work, be it many documents or one long one.
"""

import array
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt_jax.data import added_tokens
from gpt_jax.data.corpus import Passage
from gpt_jax.data.tokenizer_check import check_ids, check_tokenizer_json, library_errors
from gpt_jax.errors import InputError, first_line
from gpt_jax.files import check_regular, read_text, replacing

END_OF_TEXT = '<|endoftext|>'
UNKNOWN = '<|unknown|>'
SMALLEST_BPE = 257  # the 256 bytes and end of text
GPT2_REPOSITORY = 'openai-community/gpt2'
PIECE_CHARACTERS = 2**15
LONGEST_PIECE = 2**16
LONGEST_WORD = 1000
BATCH_CHARACTERS = 2**22
# GPT-2's pre-tokenizer cuts between any other character and a space that follows it, whatever stands around them.
_WORD_END = re.compile(r'\S(?=\s)')
_ENDLESS_WORD = re.compile(rf'(\S{{{LONGEST_WORD}}})\S+')


class Tokenizer:
    """A vocabulary with its rules for cutting text, and the id that separates documents.

    `encode` gives no special id unless asked to: a user's literal `<|endoftext|>` is cut like any other text, and
    only code that means the separator writes `end_of_text`. Added tokens that are not special are found in any text.
    With byte-level vocabularies `decode(encode(text))` is `text` for every string; with characters it is for strings
    of known characters, and every other character becomes the one unknown token.

    Ids may have holes, and a model may have more of them than there are tokens: `is_token` tells which are. An id that
    no token has stands for the empty text, as in `tokenizers`.

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      end_of_text: the id that ends every document.
      fingerprint: hex sha256 of the vocabulary and rules; the same tokenizer has the same one.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        """Takes a tokenizer of the library.

        Raises InputError where it has no end of text, or ids that do not fit int32.
        """
        end_of_text = inner.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise InputError(f'the tokenizer has no {END_OF_TEXT} token, which separates documents: use another one')
        # A file may list it as an ordinary token, which text could produce.
        inner.add_special_tokens([END_OF_TEXT])
        # Not stored in the file, so set wherever one is made or read: without it a literal `<|endoftext|>` in
        # somebody's text would end the document.
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.end_of_text: int = end_of_text
        vocabulary = inner.get_vocab()
        check_ids(vocabulary)
        self.vocab_size: int = max(vocabulary.values()) + 1  # the greatest id counts, should there be gaps
        self._ids = np.array(sorted(vocabulary.values()))
        self._added = inner.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        canonical = json.dumps(json.loads(inner.to_str()), sort_keys=True, separators=(',', ':'))
        self.fingerprint: str = hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def kind(self) -> str:
        """'char', 'gpt2' (by size and place of end of text) or 'bpe' for every other one."""
        if isinstance(self._inner.model, models.WordLevel):
            return 'char'
        return 'gpt2' if (self.vocab_size, self.end_of_text) == (50257, 50256) else 'bpe'

    @functools.cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text has at least its bytes divided by this many tokens."""
        return max(len(self.token_bytes(id_)) for id_ in self._ids.tolist()) or 1

    @functools.cached_property
    def marks(self) -> tuple[str, ...]:
        """The added tokens that are found in any text: those that are not special."""
        return tuple(token.content for token in self._added.values() if not token.special)

    def is_token(self, size: int) -> np.ndarray:
        """Which of the ids below `size`, such as those of a model, are tokens: bool [size]."""
        is_token = np.zeros(size, bool)
        is_token[self._ids[self._ids < size]] = True
        return is_token

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; with `special`, a literal `<|endoftext|>` or other special token in it becomes its id.

        Raises InputError where it holds a lone surrogate, which no encoding can store.
        """
        _check_text(text)
        inner = self._parser if special else self._inner
        with library_errors('the tokenizer cannot cut this text'):
            if len(text) <= BATCH_CHARACTERS:
                return inner.encode(text, add_special_tokens=False).ids
            # What the library makes of a text beside its ids takes sixty times the memory of the text.
            cut = (inner.encode_batch_fast([piece], add_special_tokens=False) for piece in pieces(text, self.marks))
            return [id_ for (encoding,) in cut for id_ in encoding.ids]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of every text, on all cores; a few million characters at a time, as above."""
        inner, found, start, characters = self._parser if special else self._inner, [], 0, 0
        for end, text in enumerate(texts, 1):
            _check_text(text)
            characters += len(text)
            if characters < BATCH_CHARACTERS and end < len(texts):
                continue
            with library_errors('the tokenizer cannot cut these texts'):
                encodings = inner.encode_batch_fast(list(texts[start:end]), add_special_tokens=False)
            found += [encoding.ids for encoding in encodings]
            start, characters = end, 0
        return found

    def find_special(self, text: str) -> str | None:
        """The first special token that stands in `text` literally; None where none does."""
        found = self._special_pattern.search(text)
        return found and found[0]

    def unknown_characters(self, text: str) -> str:
        """Characters of `text` that become the unknown token, each once; of byte-level vocabularies there are none."""
        if self.kind != 'char' or not self._is_additive:
            return ''
        return ''.join(sorted(each for each in set(text) if self._inner.token_to_id(each) is None))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, end of text included; bytes that are no UTF-8 become U+FFFD.

        Raises InputError on a negative id.
        """
        ids = [self._checked(id_) for id_ in ids]
        if self._is_additive:
            # Not the library's: of an added token with a letter such as \u00e9 it makes a byte that is no UTF-8.
            return b''.join(map(self.token_bytes, ids)).decode(errors='replace')
        with library_errors('the tokenizer cannot turn these ids into text'):
            return self._inner.decode([id_ for id_ in ids if id_ < self.vocab_size], skip_special_tokens=False)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that one token stands for: they may end in the middle of a character.

        Raises InputError on a negative id.
        """
        id_ = self._checked(id_)
        if id_ not in self._bytes:
            self._bytes[id_] = self._bytes_of(id_)
        return self._bytes[id_]

    def to_json(self) -> str:
        """The whole tokenizer as the `tokenizer.json` that Hugging Face's libraries read."""
        return self._inner.to_str()

    @classmethod
    def from_json(cls, text: str) -> 'Tokenizer':
        """The tokenizer that `to_json` wrote. Raises InputError on anything else."""
        check_tokenizer_json(text)
        with library_errors('not a tokenizer.json'):
            inner = tokenizers.Tokenizer.from_str(text)
            placed = added_tokens.place(json.loads(text), inner.get_vocab())
            return cls(inner if placed is None else tokenizers.Tokenizer.from_str(json.dumps(placed)))

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_json` to `path`, whole or not at all."""
        with replacing(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'Tokenizer':
        """Reads a `tokenizer.json`. Raises InputError, naming the file, where it is missing or damaged."""
        text = read_text(path)
        try:
            return cls.from_json(text)
        except InputError as error:
            raise InputError(f'{path}: {error}') from None

    @functools.cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but for special tokens in a text: it takes them for what they are."""
        return tokenizers.Tokenizer.from_str(self._inner.to_str())

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern:
        special = sorted((token.content for token in self._added.values() if token.special), key=len, reverse=True)
        return re.compile('|'.join(map(re.escape, special)))

    @functools.cached_property
    def _is_additive(self) -> bool:
        """Whether the text of tokens is that of each, one after the other, as it is with bytes and characters."""
        decoder = json.loads(self._inner.to_str())['decoder']
        return isinstance(decoder, dict) and decoder['type'] in ('ByteLevel', 'Fuse')

    def _bytes_of(self, id_: int) -> bytes:
        token = self._inner.id_to_token(id_) if id_ < self.vocab_size else None
        if token is None:
            return b''
        if id_ in self._added or (self.kind == 'char' and self._is_additive):
            return token.encode()
        if self._is_additive:
            try:
                return bytes(_byte_of_symbol()[symbol] for symbol in token)
            except KeyError:  # no symbols of bytes: a text, as the library has it
                return token.encode()
        # With other decoders a token's text is what it adds to one before it: spaces may be part of it, or not.
        with library_errors('the tokenizer cannot turn these ids into text'):
            once, twice = (self._inner.decode([id_] * count, skip_special_tokens=False) for count in (1, 2))
        return (twice[len(once) :] if twice.startswith(once) else once).encode()

    def _checked(self, id_: int) -> int:
        id_ = int(id_)
        if id_ < 0:
            raise InputError(f'token id {id_}: there are none below 0')
        return id_


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2 has it, learned from `documents`; the same documents give the same tokenizer.

    The vocabulary is `<|endoftext|>`, the 256 bytes and merges up to `vocab_size` tokens, or fewer where the text has
    no more pairs to merge.

    Raises InputError where `vocab_size` is below 257.
    """
    if vocab_size < SMALLEST_BPE:
        raise InputError(f'data.vocab_size={vocab_size}: too few for 256 bytes and {END_OF_TEXT}; use at least 257')
    inner = tokenizers.Tokenizer(models.BPE())
    _make_byte_level(inner)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_checked_texts(documents), trainer)
    return Tokenizer(inner)


def train_char(documents: Iterable[str]) -> Tokenizer:
    """One token for each character of `documents`, by code point, then the unknown token and end of text.

    The unknown token stands for every character that `documents` does not have: validation text and prompts may.
    """
    characters = set()
    for text in _checked_texts(documents):
        characters.update(text)
    vocabulary = {character: id_ for id_, character in enumerate(sorted(characters))} | {UNKNOWN: len(characters)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(''), 'isolated')
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner)


def gpt2(source: str | os.PathLike = 'gpt2', room: int | None = None) -> Tokenizer:
    """GPT-2's tokenizer: `source` is 'gpt2' (the Hugging Face hub, or its cache) or a directory.

    A directory holds `tokenizer.json`, or GPT-2's vocabulary as `encoder.json` (`vocab.json`) with `vocab.bpe`
    (`merges.txt`), and beside them what `added_tokens` reads. `room` is how many ids the model has, if that is known.

    Raises InputError where the hub cannot be reached, or a file is missing or damaged.
    """
    if source == 'gpt2':
        return Tokenizer.load(_download_gpt2())
    folder = pathlib.Path(source)
    if not folder.is_dir():
        raise InputError(f'data.tokenizer={source}: no such directory; use bpe, char, gpt2 or an existing directory')
    path, tokenizer = folder / 'tokenizer.json', None
    if path.exists():
        tokenizer = Tokenizer.load(path)
        document = json.loads(tokenizer.to_json())
    else:
        path, merges = _first_file(folder, 'encoder.json', 'vocab.json'), _first_file(folder, 'vocab.bpe', 'merges.txt')
        for part in (path, merges):
            check_regular(part)
        with library_errors(f'{path} with {merges}: not a BPE vocabulary'):
            inner = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(merges)))
            _make_byte_level(inner)
            document = json.loads(inner.to_str())
    try:
        whole = added_tokens.add_listed(document, folder, room, always=END_OF_TEXT)
        known = tokenizer is not None and whole == document
        return tokenizer if known else Tokenizer.from_json(json.dumps(whole, ensure_ascii=False))
    except InputError as error:
        raise InputError(f'{path}, with the files beside it: {error}') from None


def _make_byte_level(inner: tokenizers.Tokenizer) -> None:
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()


def _first_file(folder: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f'data.tokenizer={folder}: has no {" or ".join(names)}; add it, or a tokenizer.json')


def _download_gpt2() -> str:
    import huggingface_hub  # comes with tokenizers; needed here alone

    try:
        return huggingface_hub.hf_hub_download(GPT2_REPOSITORY, 'tokenizer.json', local_files_only=True)
    except huggingface_hub.errors.LocalEntryNotFoundError:
        return _download_uncached_gpt2()


def _download_uncached_gpt2() -> str:
    import huggingface_hub

    try:
        # Asked first because it fails at once where the hub is out of reach; the download retries for 23 s.
        huggingface_hub.HfApi().model_info(GPT2_REPOSITORY, timeout=10)
        return huggingface_hub.hf_hub_download(GPT2_REPOSITORY, 'tokenizer.json')
    except Exception as error:  # of httpx, requests, the client or the system, by version: without a common base
        raise InputError(
            f'data.tokenizer=gpt2: cannot load {GPT2_REPOSITORY} ({type(error).__name__}: {first_line(error)}); '
            'connect to the hub, see that HF_HUB_OFFLINE is not set, or name a directory: --config.data.tokenizer=DIR'
        ) from error


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """GPT-2 writes printable bytes as themselves and the n-th other one as the character 256 + n."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    printable = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    others = (byte for byte in range(256) if byte not in printable.values())
    return printable | {chr(256 + n): byte for n, byte in enumerate(others)}


def _checked_texts(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        _check_text(text)
        yield text


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f'text: lone surrogate {text[error.start]!a} at character {error.start} is not a character; remove it'
        ) from None


def up_to(limit: int, texts: Iterable[str]) -> Iterator[str]:
    """The first of `texts`, until they have `limit` characters together."""
    characters = 0
    for text in texts:
        if characters >= limit:
            return
        characters += len(text)
        yield text


def pieces(text: str, marks: Sequence[str] = ()) -> Iterator[str]:
    """Cuts a text before spaces or ends of lines into pieces of about 2^15 characters.

    GPT-2's pre-tokenizer never joins what stands on both sides of such a cut, and characters stand alone anyway: the
    ids of the pieces, joined, are the ids of the text. `marks` are texts that the tokenizer finds before that, with
    spaces in them or beside them: no cut touches one. Only where 2^16 characters hold no such place they are cut
    regardless, since the work on one word grows faster than its length: there the ids may differ.
    """
    start = 0
    while start < len(text):
        end = min(start + LONGEST_PIECE, len(text))
        if len(text) - start > PIECE_CHARACTERS:
            cuts = (found.end() for found in _WORD_END.finditer(text, start + PIECE_CHARACTERS - 1, end))
            apart = (
                cut
                for cut in cuts
                if not any(mark in text[max(0, cut - len(mark)) : cut + len(mark)] for mark in marks)
            )
            end = next(apart, end)
        yield text[start:end]
        start = end


def shorten_words(text: str) -> str:
    """`text` with the first 1000 characters of words longer than that.

    BPE learns from a word in the square of its length, and holds some 50 bytes for each character of different ones: of
    hundreds of megabytes without a space, gigabytes.
    """
    return _ENDLESS_WORD.sub(r'\1', text)


def safe_end(text: str) -> int:
    """Where the last such cut of `text` is; its length where there is none."""
    for end in range(len(text) - 1, 0, -1):
        if text[end].isspace() and not text[end - 1].isspace():
            return end
    return len(text)


def token_chunks(tokenizer: Tokenizer, passages: Iterable[Passage]) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids) of all passages in order, end of text after each document; ids uint32, some million at most."""
    batch: list[Passage] = []
    characters = 0
    for passage in passages:
        left = len(passage.text)
        # One by one: all pieces of a document together would take its memory once more.
        for piece in pieces(passage.text, tokenizer.marks) if left else ('',):
            left -= len(piece)
            batch.append(Passage(passage.split, piece, passage.ends_document and left == 0))
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield from _encode_passages(tokenizer, batch)
                batch, characters = [], 0
    yield from _encode_passages(tokenizer, batch)


def _encode_passages(tokenizer: Tokenizer, batch: list[Passage]) -> Iterator[tuple[str, np.ndarray]]:
    ids: dict[str, list[int]] = {}
    encoded = tokenizer.encode_batch([passage.text for passage in batch])
    for piece_ids, passage in zip(encoded, batch, strict=True):
        of_split = ids.setdefault(passage.split, [])
        of_split += piece_ids
        if passage.ends_document:
            of_split.append(tokenizer.end_of_text)
    for split, of_split in ids.items():
        # Three times as fast as numpy is with a list.
        yield split, np.frombuffer(array.array('I', of_split), np.uint32)
