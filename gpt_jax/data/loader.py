"""Batches of token windows: each a pure function of (seed, step), so that a run resumes at any step, on any hosts."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np

from gpt_jax.errors import InputError

Batch = dict[str, np.ndarray]
OnDevice = TypeVar('OnDevice')


class BatchSource(Protocol):
    """Anything that gives the batch of a step, as `Batches` does."""

    def __getitem__(self, step: int) -> Any: ...


class Batches:
    """Shuffled training batches over non-overlapping windows of `block_size` tokens.

    `batches[step]` is `{'tokens': int32 [rows, block_size], 'targets': int32 [rows, block_size]}` with
    rows = batch_size / process_count; targets are the tokens one place on. Every epoch takes each window once, in an
    order of its own; a batch may hold the end of one epoch and the start of the next. A process gets a contiguous
    slice of the global batch's rows, which is the same batch for every process_count.

    Attributes:
      windows_per_epoch: (len(tokens) - 1) // block_size.
      batch_size: rows of the global batch.
      block_size: tokens in a row.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        block_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Takes `tokens` [count], such as `TokenShard.tokens`.

        Raises InputError where they do not fill one window, the rows do not divide by `process_count`, or the seed is
        negative.
        """
        # Here and not above: grain takes a second to import and brings jax, which tokenising and preparing do without.
        import grain

        self._tokens = np.asarray(tokens)  # the same memory, without np.memmap's cost for each slice
        self.batch_size = batch_size
        self.block_size = block_size
        self.windows_per_epoch = (len(tokens) - 1) // block_size
        if self.windows_per_epoch < 1:
            raise InputError(
                f'block_size={block_size}: a window and its last target take {block_size + 1} tokens and the split '
                f'has {len(tokens)}; use a smaller block_size or a larger corpus'
            )
        if seed < 0:
            raise InputError(f'seed={seed}: below zero; use 0 or more')
        self._first_row, self._rows = _rows_of_process(batch_size, process_index, process_count)
        # repeat reseeds the shuffle each epoch. Rows index it one by one: only this process's are computed.
        self._order = grain.MapDataset.range(self.windows_per_epoch).seed(seed).shuffle().repeat()

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f'step {step} is below zero')
        first = step * self.batch_size + self._first_row
        starts = [self._order[row] * self.block_size for row in range(first, first + self._rows)]
        windows = np.stack([self._tokens[start : start + self.block_size + 1] for start in starts]).astype(np.int32)
        return {'tokens': windows[:, :-1], 'targets': windows[:, 1:]}


def validation_batches(
    tokens: np.ndarray, batch_size: int, block_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The whole split in order: every token but the first is a target with weight 1 exactly once.

    Yields `{'tokens': int32, 'targets': int32, 'weights': float32}`, each [batch_size / process_count, block_size];
    padding, in the last batch only, is token 0 with weight 0. Every process yields the same number of batches, its
    contiguous slice of the rows of each.

    Raises InputError where there are fewer than two tokens or the rows do not divide by `process_count`.
    """
    if len(tokens) < 2:
        raise InputError(f'the validation split has {len(tokens)} tokens, too few to predict one; use a larger corpus')
    first_row, rows = _rows_of_process(batch_size, process_index, process_count)
    return _in_order(np.asarray(tokens), batch_size, block_size, first_row, rows)


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
    batches: BatchSource, start: int, stop: int, to_device: Callable[[Any], OnDevice], depth: int = 2
) -> Iterator[OnDevice]:
    """Yields `to_device(batches[step])` for step in [start, stop), made by one background thread, `depth` ahead.

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
            batch = pending.popleft().result()
            if ahead < stop:
                pending.append(executor.submit(make, ahead))
            yield batch
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
