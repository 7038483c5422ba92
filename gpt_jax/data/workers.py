"""Many jobs in processes of their own, which stop together: at the first failure, at Ctrl-C, and with their parent."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from gpt_jax.data.building import Job, build_part
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import InputError

WORKER_BYTES = 2**25  # of the source, that a worker is started for
_worker: dict[str, Any] = {}  # in a worker: its tokenizer, and the event that stops all


def worthwhile(jobs: Sequence[Job]) -> int:
    """As many workers as have work: starting one takes a second, and this process encodes on all cores as well."""
    sizes = [job.part.size for job in jobs]
    # What this process may use of the machine, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min(cores, sum(sizes) // max([WORKER_BYTES, *sizes])))


def build_parts(
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    tokenizer_path: pathlib.Path,
    num_workers: int,
    done: Callable[[Job], None],
) -> None:
    """Makes all parts, whatever other processes make of them meanwhile; calls `done` after each.

    One worker is this process, which encodes on all cores. Several are processes that encode on one core each; started
    from a script, they need its `if __name__ == '__main__'`.

    Raises what a part raises, InputError among it, and InputError where a worker was killed.
    """
    # What others are making is left for last: by then it may be finished.
    rest = _each(jobs, tokenizer, tokenizer_path, num_workers, done, blocking=False)
    _each(rest, tokenizer, tokenizer_path, num_workers, done, blocking=True)


def _each(
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    tokenizer_path: pathlib.Path,
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
    executor = concurrent.futures.ProcessPoolExecutor(
        min(num_workers, len(jobs)), context, _start, (tokenizer_path, stop)
    )
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
            future = executor.submit(_run, job, blocking)
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


def _start(tokenizer_path: pathlib.Path, stop: Any) -> None:
    """Runs in each worker before its first part."""
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the workers are the parallelism
    # Ctrl-C reaches all processes of a terminal; here the parent decides, and its event stops the parts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(tokenizer=Tokenizer.load(tokenizer_path), stopped=stop.is_set)


def _end_with_parent() -> None:
    # A parent that is killed cannot tell its workers, which would wait for parts forever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(job: Job, blocking: bool) -> bool:
    return build_part(job, _worker['tokenizer'], blocking, _worker['stopped'])
