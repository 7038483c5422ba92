"""A corpus's parts -> token shards: in worker processes, on several machines, and again after a crash.

The folder of the prepared data holds, for part 7, `train-00007.bin`, `validation-00007.bin` (where it has such tokens)
and, written last, `parts/00007.json`, which says what the shards are. A part counts as finished when that file fits the
corpus, the tokenizer and the shards; all else is made again. A part is made under a lock, so that processes that
prepare the same data share the work.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import filelock

from gpt_jax.data.corpus import SPLITS, Corpus, Decoder, Part, Passage
from gpt_jax.data.shards import HEADER, TOKENIZER, ShardInfo, ShardWriter, dtype_of, shard_path, shard_writer
from gpt_jax.data.tokenizer import Tokenizer, token_chunks
from gpt_jax.errors import InputError
from gpt_jax.files import read_json, remove_leftovers, replacing

PARTS = 'parts'
WORKER_BYTES = 2**25  # of the source, that a worker is started for


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


def report_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where the report of a finished part is."""
    return folder / PARTS / f'{number:05}.json'


def lock(folder: pathlib.Path, name: str) -> filelock.BaseFileLock:
    """A lock between processes, which the system opens again when its holder dies."""
    return filelock.FileLock(folder / PARTS / f'{name}.lock')


def read_report(folder: pathlib.Path, number: int, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The report of a finished part; None where it is not finished, or was made of other text or ids."""
    try:
        report = read_json(report_path(folder, number))
        made_of = (report['corpus_fingerprint'], report['tokenizer_fingerprint'])
        if made_of != (corpus.fingerprint, tokenizer.fingerprint):
            return None
        width = dtype_of(tokenizer.vocab_size).itemsize
        int(report['replaced_bytes'])
        for split, counts in report['splits'].items():
            if split not in SPLITS or {'tokens', 'documents', 'bytes', 'sha256', 'mtime_ns'} - counts.keys():
                return None
            size = os.stat(shard_path(folder, split, number)).st_size
            if size != HEADER.size + counts['tokens'] * width:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or damaged, which the answer says
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


_worker: dict[str, Any] = {}  # in a worker process: its tokenizer, and the event that stops all


def worthwhile(jobs: Sequence[Job]) -> int:
    """As many workers as have work: starting one takes a second, and this process encodes on all cores as well."""
    sizes = [job.part.size for job in jobs]
    # What this process may use of the machine, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min(cores, sum(sizes) // max([WORKER_BYTES, *sizes])))


def build_parts(
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    num_workers: int,
    done: Callable[[Job], None],
) -> None:
    """Makes all parts, whatever other processes make of them meanwhile; calls `done` after each.

    One worker is this process, which encodes on all cores. Several are processes that encode on one core each; started
    from a script, they need its `if __name__ == '__main__'`.

    Raises what a part raises, InputError among it, and InputError where a worker was killed.
    """
    # What others are making is left for last: by then it may be finished.
    rest = _each(jobs, tokenizer, num_workers, done, blocking=False)
    _each(rest, tokenizer, num_workers, done, blocking=True)


def _each(
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    num_workers: int,
    done: Callable[[Job], None],
    blocking: bool,
) -> list[Job]:
    """Makes the parts; returns those that others are making, unless it waits for them."""
    if min(num_workers, len(jobs)) <= 1:
        rest = []
        for job in jobs:
            job.corpus.fetch(job.part)
            if build_part(job, tokenizer, blocking):
                done(job)
            else:
                rest.append(job)
        return rest
    # Not forked: jax may be running threads here, and a forked copy of a held lock is never released.
    context = multiprocessing.get_context('spawn')
    stop = context.Event()
    arguments = (jobs[0].folder / TOKENIZER, stop)
    executor = concurrent.futures.ProcessPoolExecutor(min(num_workers, len(jobs)), context, _start_worker, arguments)
    futures: dict[concurrent.futures.Future, Job] = {}
    failed = threading.Event()

    def ended(future: concurrent.futures.Future) -> None:
        if future.cancelled():
            return
        if future.exception() is not None:
            failed.set()
        elif future.result():
            done(futures[future])

    try:
        for job in jobs:
            job.corpus.fetch(job.part)  # while the workers are at the parts before
            if failed.is_set():
                break
            future = executor.submit(_run_in_worker, job, blocking)
            futures[future] = job
            future.add_done_callback(ended)
        finished, _ = concurrent.futures.wait(futures, return_when='FIRST_EXCEPTION')
        made = {futures[future].number: future.result() for future in finished}  # raises what a part has raised
        return [job for job in jobs if not made[job.number]]
    except BrokenProcessPool:
        raise InputError(
            f'data.num_workers={num_workers}: a worker was killed, perhaps for lack of memory; run the command again, '
            'which keeps the finished parts, or with fewer workers'
        ) from None
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(tokenizer_path: pathlib.Path, stop: Any) -> None:
    """Runs in each worker before its first part."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the workers are the parallelism
    os.environ['USE_TORCH'] = '0'  # which `datasets` would import where it is installed: seconds, and 200 MB each
    # Ctrl-C reaches all processes of a terminal; here the parent decides, and its event stops the parts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(tokenizer=Tokenizer.load(tokenizer_path), stopped=stop.is_set)


def _end_with_parent() -> None:
    # A parent that is killed cannot tell its workers, which would wait for parts forever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(job: Job, blocking: bool) -> bool:
    return build_part(job, _worker['tokenizer'], blocking, _worker['stopped'])
