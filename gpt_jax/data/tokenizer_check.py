"""Whether a tokenizer that somebody else made can be used: what its file asks of the library is tried out first.

A tokenizer.json is a program: normalizers and regular expressions run on every text. Some end the library's Rust code
in a panic, which Python sees as a BaseException after lines on standard error; some take all time or memory. So one
that is not of the plain kinds is tried on a few texts in a process of its own, whose time and memory are bounded.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from gpt_jax.errors import InputError, first_line, printable

TRIAL_SECONDS, TRIAL_BYTES = 20, 4 * 2**30
# GPT-2 makes one to four tokens of a character, and no letter of any script decomposes into more than 18.
MOST_TOKENS = 64
LARGEST_ID = 2**31 - 1  # batches hold ids as int32
# Among them long runs of one kind of character, on which a regular expression with choices within choices never ends.
TRIAL_TEXTS = (
    '',
    "The quick brown fox, 1234 don't\n\n\tjump \u00e9\u4e2d\U0001f642 \u0301\ufffd\x00<|endoftext|>",
    ''.join(map(chr, range(32, 127))),
    *(unit * 100 + '\x00' for unit in ('a', 'A', '1', ' ', '\n', '.', 'a ', 'ab', '\u00e9', '\u4e2d')),
)
TRIAL = """
import json, resource, sys
seconds, size, most, texts = json.loads(sys.argv[1])
for what, limit in ((resource.RLIMIT_AS, size), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
    try:
        resource.setrlimit(what, (limit, limit))
    except (OSError, ValueError):
        pass  # not on this system: the caller's clock is left
import tokenizers
inner = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
inner.no_truncation()
inner.no_padding()
for text in texts:
    ids = inner.encode(text, add_special_tokens=False).ids
    if len(ids) > most * (len(text) + 1):
        raise OverflowError(f'{len(ids)} tokens of {len(text)} characters')
    inner.decode(ids, skip_special_tokens=False)
"""


@contextlib.contextmanager
def library_errors(action: str) -> Iterator[None]:
    """What the library raises, panics among it, as InputError: `action` says what could not be done.

    It raises bare Exceptions, for bad files and bad content alike.
    """
    try:
        yield
    except BaseException as error:
        # pyo3's class has no importable name, and is no Exception.
        if type(error) is Exception or type(error).__name__ == 'PanicException':
            raise InputError(f'{action}: {first_line(error)}; use another one') from None
        raise


def check_ids(vocabulary: dict[str, int]) -> None:
    """Raises InputError where two tokens have one id, or an id is not an int32."""
    token_of: dict[int, str] = {}
    for token, id_ in vocabulary.items():
        if token_of.setdefault(id_, token) != token:
            raise InputError(f'the tokenizer gives id {id_} to both {token_of[id_]!a} and {token!a}: use another one')
        if id_ > LARGEST_ID:
            raise InputError(f'the tokenizer has token id {id_}, above int32: use another one')


@functools.lru_cache(maxsize=8)
def check_tokenizer_json(text: str) -> None:
    """Raises InputError where a tokenizer.json is none, or one of an unusual kind fails on the texts above."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f'not a tokenizer.json: {first_line(error)}; use another one') from None
    if not isinstance(document, dict):
        raise InputError('not a tokenizer.json: no JSON object; use another one')
    added = document.get('added_tokens')
    for token in added if isinstance(added, list) else ():
        id_ = token.get('id') if isinstance(token, dict) else None
        if isinstance(id_, int) and not 0 <= id_ <= LARGEST_ID:
            # The library would give it another id without a word.
            raise InputError(f'the tokenizer has id {id_} for {token.get("content")!a}, not an int32: use another one')
    if not _is_plain(document):
        _try_out(text)


def _is_plain(document: dict[str, Any]) -> bool:
    """Whether it is of a kind that this code makes, or GPT-2's: no regular expression, no rule that may fail."""

    def kind(key: str) -> Any:
        part = document.get(key)
        return part.get('type') if isinstance(part, dict) else part

    model, cut = document.get('model'), document.get('pre_tokenizer')
    if not isinstance(model, dict) or document.get('normalizer') is not None:
        return False
    if kind('decoder') not in ('ByteLevel', 'Fuse', None):
        return False
    characters = isinstance(cut, dict) and cut.get('type') == 'Split' and cut.get('pattern') == {'Regex': ''}
    if kind('model') == 'BPE' or (kind('model') is None and 'merges' in model):
        marks = ('unk_token', 'continuing_subword_prefix', 'end_of_word_suffix')
        return kind('pre_tokenizer') == 'ByteLevel' and not any(model.get(mark) for mark in marks)
    return kind('model') == 'WordLevel' and characters and model.get('unk_token') in (model.get('vocab') or ())


def _try_out(text: str) -> None:
    settings = json.dumps([TRIAL_SECONDS, TRIAL_BYTES, MOST_TOKENS, TRIAL_TEXTS])
    # One thread, whose memory can be bounded; a backtrace is of no use to anybody here.
    environment = os.environ | {'TOKENIZERS_PARALLELISM': 'false', 'RAYON_NUM_THREADS': '1', 'RUST_BACKTRACE': '0'}
    command = [sys.executable, '-P', '-c', TRIAL, settings]
    try:
        tried = subprocess.run(
            command, input=text.encode(), capture_output=True, env=environment, timeout=3 * TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        tried = None
    if tried is not None and tried.returncode == 0:
        return
    last = '' if tried is None else (tried.stderr.decode(errors='replace').strip().splitlines() or [''])[-1]
    if tried is None or tried.returncode < 0 or 'MemoryError' in last:
        bounds = f'{TRIAL_SECONDS} s or {TRIAL_BYTES // 2**30} GB'
        raise InputError(f'the tokenizer takes more than {bounds} for a few words: use another one')
    reason = printable(last.partition(': ')[2] or last or f'status {tried.returncode}')
    raise InputError(f'not a tokenizer.json that works: {reason}; use another one')
