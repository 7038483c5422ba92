"""Batches of token windows: each a pure function of (seed, step), so that a run resumes at any step, on any hosts."""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from gpt_jax.data.documents import document_places
from gpt_jax.data.mixture import Interleaving, Source
from gpt_jax.errors import InputError

Batch = dict[str, np.ndarray]
OnDevice = TypeVar('OnDevice')


class BatchSource(Protocol):
    """Anything that gives the batch of a step, as `Batches` does."""

    def __getitem__(self, step: int) -> Any: ...


class Windows:
    """The windows of `block_size` tokens of one source in the order of the run, without end.

    `windows[n]` is [block_size + 1], of the tokens' dtype: a window and the token after it. Windows do not overlap.
    Every epoch takes each once, in an order of its own, which is computed and not stored: the millionth costs what the
    first does.

    Attributes:
      per_epoch: (len(tokens) - 1) // block_size.
    """

    def __init__(self, source: Source, block_size: int, seed: int):
        """Raises InputError where the tokens do not fill one window, or the seed is negative."""
        # Here and not above: grain takes a second to import and brings jax, which tokenising and preparing do without.
        import grain

        count = len(source.tokens)
        self.per_epoch = (count - 1) // block_size
        if self.per_epoch < 1:
            raise InputError(
                f'block_size={block_size}: a window and its last target take {block_size + 1} tokens and the training '
                f'split{source.name and f" of {source.name}"} has {count}; use a smaller block_size or a larger corpus'
            )
        if seed < 0:
            raise InputError(f'seed={seed}: below zero; use 0 or more')
        self._tokens, self._block_size = _plain(source.tokens), block_size
        # repeat reseeds the shuffle each epoch.
        self._order = grain.MapDataset.range(self.per_epoch).seed(seed).shuffle().repeat()

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._order[index] * self._block_size
        return self._tokens[start : start + self._block_size + 1]


class Batches:
    """Shuffled training batches over non-overlapping windows of `block_size` tokens.

    `batches[step]` is `{'tokens': int32 [rows, block_size], 'targets': int32 [rows, block_size]}` with
    rows = batch_size / process_count; targets are the tokens one place on. Every epoch of a source takes each of its
    windows once, in an order of its own; a batch may hold the end of one epoch and the start of the next. Of several
    sources each has its share of the rows, see `Interleaving`. A process gets a contiguous slice of the global batch's
    rows, which is the same batch for every process_count.

    With an `end_of_text` a batch also has `positions` and `documents`, int32 [rows, block_size], see `document_places`.

    Attributes:
      windows_per_epoch: (len(tokens) - 1) // block_size, added up over the sources.
      batch_size: rows of the global batch.
      block_size: tokens in a row.
    """

    def __init__(
        self,
        sources: np.ndarray | Sequence[Source],
        batch_size: int,
        block_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        end_of_text: int | None = None,
    ):
        """Takes sources, or the tokens [count] of a single one, such as a `Tokens`.

        Raises InputError where a source does not fill one window, the rows do not divide by `process_count`, or the
        seed is negative.
        """
        if not isinstance(sources, tuple | list):
            sources = (Source('', sources),)
        self.batch_size = batch_size
        self.block_size = block_size
        self._end_of_text = end_of_text
        self._first_row, self._rows = _rows_of_process(batch_size, process_index, process_count)
        # Each source has a seed of its own: equally long ones would otherwise be read in the same order.
        self._windows = [Windows(source, block_size, seed + number) for number, source in enumerate(sources)]
        self._interleaving = Interleaving([source.weight for source in sources])
        self.windows_per_epoch = sum(windows.per_epoch for windows in self._windows)

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f'step {step} is below zero')
        first = step * self.batch_size + self._first_row
        places = (self._interleaving[row] for row in range(first, first + self._rows))
        windows = np.stack([self._windows[source][index] for source, index in places]).astype(np.int32)
        return _with_documents({'tokens': windows[:, :-1], 'targets': windows[:, 1:]}, self._end_of_text)


def validation_batches(
    tokens: np.ndarray,
    batch_size: int,
    block_size: int,
    process_index: int = 0,
    process_count: int = 1,
    end_of_text: int | None = None,
) -> Iterator[Batch]:
    """The whole split in order: every token but the first is a target with weight 1 exactly once.

    Yields `{'tokens': int32, 'targets': int32, 'weights': float32}`, each [batch_size / process_count, block_size], and
    with an `end_of_text` also what `Batches` adds then. Padding, in the last batch only, is token 0 with weight 0.
    Every process yields the same number of batches, its contiguous slice of the rows of each.

    Raises InputError where there are fewer than two tokens or the rows do not divide by `process_count`.
    """
    if len(tokens) < 2:
        raise InputError(f'the validation split has {len(tokens)} tokens, too few to predict one; use a larger corpus')
    first_row, rows = _rows_of_process(batch_size, process_index, process_count)
    batches = _in_order(_plain(tokens), batch_size, block_size, first_row, rows)
    return (_with_documents(batch, end_of_text) for batch in batches)


def _in_order(tokens: np.ndarray, batch_size: int, block_size: int, first_row: int, rows: int) -> Iterator[Batch]:
    predictions = len(tokens) - 1
    for batch_start in range(0, predictions, batch_size * block_size):
        start = batch_start + first_row * block_size
        count = min(max(predictions - start, 0), rows * block_size)
        batch = {name: np.zeros(rows * block_size, np.int32) for name in ('tokens', 'targets')}
        batch['weights'] = np.zeros(rows * block_size, np.float32)
        batch['tokens'][:count] = tokens[start : start + count]
        batch['targets'][:count] = tokens[start + 1 : start + 1 + count]
        batch['weights'][:count] = 1.0
        yield {name: values.reshape(rows, block_size) for name, values in batch.items()}


def _with_documents(batch: Batch, end_of_text: int | None) -> Batch:
    if end_of_text is None:
        return batch
    positions, documents = document_places(batch['tokens'], end_of_text)
    return batch | {'positions': positions, 'documents': documents}


def _plain(tokens: Any) -> Any:
    """The same memory as an array, without np.memmap's cost for each slice."""
    return np.asarray(tokens) if isinstance(tokens, np.ndarray) else tokens


def _rows_of_process(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """First row and number of rows of a process: a contiguous slice, as device meshes lay the batch out."""
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f'batch_size={batch_size}: must be a positive multiple of the {process_count} processes, '
            'each of which loads its share of the rows'
        )
    rows = batch_size // process_count
    return process_index * rows, rows


def prefetch(
    batches: BatchSource,
    start: int,
    stop: int,
    to_device: Callable[[Any], OnDevice],
    depth: int = 2,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[OnDevice]:
    """Yields `to_device(batches[step])` for step in [start, stop), made by one background thread, `depth` ahead.

    Where a batch is asked for before it is there, `on_wait` gets the seconds until it was.

    What the thread raises is raised here, at the step that it belongs to. Closing the generator, also by leaving the
    loop or by Ctrl-C, ends the thread before it returns.
    """
    if depth < 1:
        raise ValueError(f'depth={depth}: at least one batch must be on its way')

    def make(step: int) -> OnDevice:
        return to_device(batches[step])

    executor = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix='prefetch')
    try:
        pending = collections.deque(executor.submit(make, step) for step in range(start, min(start + depth, stop)))
        for ahead in range(start + depth, stop + depth):
            if not pending:
                break
            future = pending.popleft()
            ready, began = future.done(), time.perf_counter()
            batch = future.result()
            if not ready:
                on_wait(time.perf_counter() - began)
            if ahead < stop:
                pending.append(executor.submit(make, ahead))
            yield batch
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
