"""A corpus's parts -> token shards: in worker processes, on several machines, and again after a crash.

The folder of the prepared data holds, for part 7, `train-00007.bin`, `validation-00007.bin` (where it has such tokens)
and, written last, `parts/00007.json`, which says what the shards are. A part counts as finished when that file fits the
corpus, the tokenizer and the shards; all else is made again. A part is made under a lock, so that processes that
prepare the same data share the work.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import filelock

from gpt_jax.data.corpus import SPLITS, Corpus, Decoder, Part, Passage
from gpt_jax.data.encoding import token_chunks
from gpt_jax.data.shards import HEADER, ShardInfo, ShardWriter, dtype_of, shard_writer
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.files import remove_leftovers, replacing

PARTS = 'parts'


class StoppedError(Exception):
    """A part was given up because others failed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is told: make one part.

    Attributes:
      folder: of the prepared data; its tokenizer is there.
      corpus: resolved.
      number: of the part, from 0.
      part: which stretch of the corpus it is.
    """

    folder: pathlib.Path
    corpus: Corpus
    number: int
    part: Part


def shard_path(folder: pathlib.Path, split: str, number: int) -> pathlib.Path:
    """Where the shard of a part is."""
    return folder / f'{split}-{number:05}.bin'


def report_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where the report of a finished part is."""
    return folder / PARTS / f'{number:05}.json'


def lock(folder: pathlib.Path, name: str) -> filelock.BaseFileLock:
    """A lock between processes, which the system opens again when its holder dies."""
    return filelock.FileLock(folder / PARTS / f'{name}.lock')


def read_report(folder: pathlib.Path, number: int, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The report of a finished part; None where it is not finished, or was made of other text or ids."""
    try:
        report = json.loads(report_path(folder, number).read_text(encoding='utf-8'))
        made_of = (report['corpus_fingerprint'], report['tokenizer_fingerprint'])
        if made_of != (corpus.fingerprint, tokenizer.fingerprint):
            return None
        width = dtype_of(tokenizer.vocab_size).itemsize
        for split, counts in report['splits'].items():
            size = os.stat(shard_path(folder, split, number)).st_size
            if size != HEADER.size + counts['tokens'] * width:
                return None
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged, which the answer says
        return None
    return report


def build_part(
    job: Job, tokenizer: Tokenizer, blocking: bool = True, stopped: Callable[[], bool] = lambda: False
) -> bool:
    """Makes the shards of a part, unless they are finished; returns False where another process is making them.

    Args:
      job: which part.
      tokenizer: makes the ids.
      blocking: wait for that other process instead.
      stopped: asked now and then; where it says so the part is given up, with StoppedError.
    """
    try:
        with lock(job.folder, f'{job.number:05}').acquire(blocking=blocking):
            if read_report(job.folder, job.number, job.corpus, tokenizer) is None:
                _write_part(job, tokenizer, stopped)
            return True
    except filelock.Timeout:
        return False


def _write_part(job: Job, tokenizer: Tokenizer, stopped: Callable[[], bool]) -> None:
    remove_leftovers([report_path(job.folder, job.number), *(shard_path(job.folder, s, job.number) for s in SPLITS)])
    decoder = job.corpus.decoder()
    bytes_ = dict.fromkeys(SPLITS, 0)
    shards = _write_shards(job, tokenizer, _counted(job, decoder, bytes_), stopped)
    splits = {
        split: {
            'tokens': shard.tokens,
            'documents': shard.documents,
            'bytes': bytes_[split],
            'sha256': shard.sha256,
            'mtime_ns': os.stat(shard.path).st_mtime_ns,
        }
        for split, shard in shards.items()
    }
    report = {
        'corpus_fingerprint': job.corpus.fingerprint,
        'tokenizer_fingerprint': tokenizer.fingerprint,
        'splits': splits,
        'replaced_bytes': decoder.replaced,
    }
    with replacing(report_path(job.folder, job.number)) as file:
        file.write(json.dumps(report, indent=2).encode())


def _write_shards(
    job: Job, tokenizer: Tokenizer, passages: Iterable[Passage], stopped: Callable[[], bool]
) -> dict[str, ShardInfo]:
    writers: dict[str, ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for split, ids in token_chunks(tokenizer, passages):
            if stopped():
                raise StoppedError(job.part.file)
            if split not in writers and ids.size:
                path = shard_path(job.folder, split, job.number)
                writers[split] = stack.enter_context(shard_writer(path, tokenizer))
            if ids.size:
                writers[split].write(ids)
        return {split: writer.finish() for split, writer in writers.items()}


def _counted(job: Job, decoder: Decoder, bytes_: dict[str, int]) -> Iterator[Passage]:
    for passage in job.corpus.read(job.part, decoder):
        bytes_[passage.split] += len(passage.text.encode())
        yield passage
