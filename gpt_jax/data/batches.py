"""Batches of token windows, each a pure function of seed and step, so that a run resumes at any step on any hosts.

Nothing here knows a process or a device. Rows of a batch are asked for by their global numbers, `rows(step, start,
stop)`; `gpt_jax.parallel.global_batch` asks for those that the devices at hand hold.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from gpt_jax.errors import InputError

Rows = dict[str, np.ndarray]
Made = TypeVar('Made')


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSource:
    """One part of what is trained on.

    Attributes:
      name: what messages and metrics call it.
      tokens: [count], token ids; end of text follows every document.
      weight: its share of the rows, relative to the other sources' weights; exact, so that shares are.
    """

    name: str
    tokens: Any = dataclasses.field(repr=False)
    weight: Fraction = Fraction(1)


MOST_BATCH_SIZES = 8  # of a ramp: a training step is compiled for each of them


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """How many rows the batch of each step has, and so which rows of the run these are: one size, or a few that grow.

    Attributes:
      stages: (first step, first row, rows of a batch) of each size, ascending; the last one goes on without end.
    """

    stages: tuple[tuple[int, int, int], ...]

    @classmethod
    def constant(cls, batch_size: int) -> 'BatchSizes':
        """The same size at every step."""
        _check_batch_size(batch_size)
        return cls(((0, 0, batch_size),))

    @classmethod
    def ramp(cls, first: int, full: int, block_size: int, ramp_tokens: int) -> 'BatchSizes':
        """From `first` rows to `full` ones along a line over `ramp_tokens` tokens (GPT-3, appendix B), in steps.

        There are at most `MOST_BATCH_SIZES` sizes, evenly spaced, all of them multiples of `first`. A batch has the
        largest of them that the line has reached, and the full one from `ramp_tokens` on.

        Raises:
          InputError: `first` does not divide `full`.
        """
        _check_batch_size(first)
        if full % first:
            raise InputError(
                f'train.batch_size={full} is no multiple of schedule.initial_batch_size={first}, from which it grows; '
                'choose one that divides it'
            )
        count = min(MOST_BATCH_SIZES, full // first)
        sizes = sorted({first * round(1 + (full // first - 1) * k / max(count - 1, 1)) for k in range(count)})
        stages, step, row = [], 0, 0
        for size, following in zip(sizes, [*sizes[1:], None], strict=True):
            stages.append((step, row, size))
            if following is not None:
                # Tokens at which the line reaches the next size, and from there whole steps; all in whole numbers.
                missing = ramp_tokens * (following - first) - row * block_size * (full - first)
                steps = max(0, -(-missing // (size * block_size * (full - first))))
                step, row = step + steps, row + steps * size
        # A ramp of fewer tokens than a batch leaves no step for some sizes.
        return cls(tuple(a for a, b in zip(stages, [*stages[1:], None], strict=True) if b is None or b[0] > a[0]))

    @property
    def full(self) -> int:
        """Rows of a batch when it grows no more."""
        return self.stages[-1][2]

    def at(self, step: int) -> int:
        """Rows of the batch of `step`, counted from 0."""
        return self._stage(step)[2]

    def rows_before(self, step: int) -> int:
        """Rows of all batches before that of `step`: the number of its first row."""
        first_step, first_row, size = self._stage(step)
        return first_row + (step - first_step) * size

    def steps(self, amount: float, of_row: float = 1) -> int:
        """The fewest steps whose rows, worth `of_row` each, come to `amount`."""
        first_step, first_row, size = next(
            stage for stage in reversed(self.stages) if stage[1] * of_row < amount or not stage[1]
        )
        return first_step + math.ceil((amount - first_row * of_row) / (size * of_row))

    def _stage(self, step: int) -> tuple[int, int, int]:
        return next(stage for stage in reversed(self.stages) if stage[0] <= step)


class Batches:
    """Shuffled training batches over non-overlapping windows of `block_size` tokens.

    Every epoch of a source takes each of its windows once, in an order of its own; a batch may hold the end of one
    epoch and the start of the next. Of several sources each has its share of the rows, see `Interleaving`.

    Attributes:
      windows_per_epoch: (len(tokens) - 1) // block_size, added up over the sources.
      sizes: how many rows each batch has.
      block_size: tokens in a row.
    """

    def __init__(
        self,
        sources: np.ndarray | Sequence[TokenSource],
        batch_size: int | BatchSizes,
        block_size: int,
        seed: int,
        end_of_text: int | None = None,
        left_out: int = 0,
    ):
        """Takes sources, or the tokens [count] of a single one, such as a `Tokens`.

        `left_out` rows of the run's order are passed over before the batch of any step that is asked for.
        Raises InputError where a source does not fill one window, or batch_size or seed is out of range.
        """
        if not isinstance(sources, tuple | list):
            sources = (TokenSource('', sources),)
        self.sizes = batch_size if isinstance(batch_size, BatchSizes) else BatchSizes.constant(batch_size)
        self.block_size, self._left_out = block_size, left_out
        self._end_of_text = end_of_text
        # Each source has a seed of its own: equally long ones would otherwise be read in the same order.
        self._windows = [Windows(source, block_size, seed + number) for number, source in enumerate(sources)]
        self._interleaving = Interleaving([source.weight for source in sources])
        self.windows_per_epoch = sum(windows.per_epoch for windows in self._windows)

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> Rows:
        """Rows [start, stop) of the batch of `step`, by default all of them.

        Returns:
          `tokens` and `targets`, int32 [stop - start, block_size]; targets are the tokens one place on. With an
          `end_of_text` also `positions` and `documents`, of the same type and shape, see `document_positions`.

        Raises:
          IndexError: step is below zero, or the batch has no such rows.
        """
        start, stop = _check_rows(step, start, stop, self.sizes.at(max(step, 0)))
        first = self.first_row(step)
        chosen = (self._interleaving[row] for row in range(first + start, first + stop))
        windows = np.stack([self._windows[source][index] for source, index in chosen]).astype(np.int32)
        return _with_documents({'tokens': windows[:, :-1], 'targets': windows[:, 1:]}, self._end_of_text)

    def first_row(self, step: int) -> int:
        """The number, in the run's order of rows, of the first row of the batch of `step`."""
        return self.sizes.rows_before(step) + self._left_out

    def origin(self, row: int) -> tuple[str, int]:
        """The source that a row of the run is from, by name, and the place of its first token there."""
        source, index = self._interleaving[row]
        return self._windows[source].source_name, self._windows[source].place(index)


class ValidationBatches:
    """A whole split in order: every token but the first is a target with weight 1 exactly once.

    `len` is the number of batches; padding, in the last batch only, is token 0 with weight 0.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, block_size: int, end_of_text: int | None = None):
        """Takes tokens [count]. Raises InputError where they are fewer than two, or batch_size is not positive."""
        if len(tokens) < 2:
            raise InputError(
                f'the validation split has {len(tokens)} tokens, too few to predict one; '
                'raise data.validation_fraction, or use a larger corpus'
            )
        _check_batch_size(batch_size)
        self.batch_size, self.block_size = batch_size, block_size
        self._tokens, self._end_of_text = _plain(tokens), end_of_text

    def __len__(self) -> int:
        return math.ceil((len(self._tokens) - 1) / (self.batch_size * self.block_size))

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> Rows:
        """As `Batches.rows`, and `weights`, float32 [stop - start, block_size]: 1, and 0 where there is padding."""
        start, stop = _check_rows(step, start, stop, self.batch_size)
        size = (stop - start) * self.block_size
        place = (step * self.batch_size + start) * self.block_size
        count = min(max(len(self._tokens) - 1 - place, 0), size)
        batch = {name: np.zeros(size, np.int32) for name in ('tokens', 'targets')}
        batch['weights'] = np.zeros(size, np.float32)
        batch['tokens'][:count] = self._tokens[place : place + count]
        batch['targets'][:count] = self._tokens[place + 1 : place + 1 + count]
        batch['weights'][:count] = 1.0
        rows = {name: values.reshape(-1, self.block_size) for name, values in batch.items()}
        return _with_documents(rows, self._end_of_text)


class Windows:
    """The windows of `block_size` tokens of one source in the order of the run, without end.

    `windows[n]` is [block_size + 1], of the tokens' dtype: a window and the token after it. Windows do not overlap.
    Every epoch takes each once, in an order of its own, which is computed and not stored: the millionth costs what the
    first does.

    Attributes:
      per_epoch: (len(tokens) - 1) // block_size.
      source_name: that of its source.
    """

    def __init__(self, source: TokenSource, block_size: int, seed: int):
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
        self.source_name = source.name
        self._tokens, self._block_size = _plain(source.tokens), block_size
        # repeat reseeds the shuffle each epoch.
        self._order = grain.MapDataset.range(self.per_epoch).seed(seed).shuffle().repeat()

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.place(index)
        return self._tokens[start : start + self._block_size + 1]

    def place(self, index: int) -> int:
        """Where in the source's tokens the window begins."""
        return self._order[index] * self._block_size


class Interleaving:
    """Which source each row of a run comes from, and which of that source's rows it is.

    A pure function of the row's number, in time that grows with the logarithm of the number of sources. These are
    halved until one is left, and each half takes its exact share of the rows so far, rounded. So among the first n
    rows, whatever n, a source of weight w has w n of them, give or take fewer than the number of halvings: shares do
    not drift, and no source waits for long. (grain's own mixtures round the weights to hundredths of the smallest.)
    """

    def __init__(self, weights: Sequence[Fraction]):
        """Takes weights above 0, which need not add up to 1.

        Raises ValueError where there is none, or one is not above 0.
        """
        if not weights or min(weights) <= 0:
            raise ValueError(f'weights {weights}: at least one, and all above 0')
        scale = math.lcm(*(Fraction(weight).denominator for weight in weights))
        self._before = [0, *itertools.accumulate(int(weight * scale) for weight in weights)]

    def __getitem__(self, row: int) -> tuple[int, int]:
        """(source, how many of the rows before this one were that source's)."""
        first, last = 0, len(self._before) - 1
        while last - first > 1:
            middle = (first + last) // 2
            share = self._before[middle] - self._before[first]
            whole = self._before[last] - self._before[first]
            earlier = row * share // whole
            if (row + 1) * share // whole > earlier:
                last, row = middle, earlier
            else:
                first, row = middle, row - earlier
        return first, row


def document_positions(tokens_BT: np.ndarray, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """The position of every token in its document, and the number of that document in its row: for a document mask.

    An end of text opens the document that follows it, as it does where a text is generated from nothing: the first
    token of a document is then predicted from the separator alone, and no prediction sees another document.

    Args:
      tokens_BT: ids [batch, time].
      end_of_text: the id that separates documents.

    Returns:
      positions int32 [batch, time], 0 at each end of text and at the start of the row, counting on from there;
      documents int32 [batch, time], 0, 1, ... along a row: equal where two tokens belong to one document.
    """
    opens_BT = tokens_BT == end_of_text
    order_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
    starts_BT = np.maximum.accumulate(np.where(opens_BT, order_T, 0), axis=1)
    return order_T - starts_BT, np.cumsum(opens_BT, axis=1, dtype=np.int32)


def prefetch(
    make: Callable[[int], Made],
    start: int,
    stop: int,
    depth: int = 2,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Made]:
    """Yields `make(step)` for step in [start, stop), made by one background thread, `depth` ahead.

    Where a batch is asked for before it is there, `on_wait` gets the seconds until it was.

    What the thread raises is raised here, at the step that it belongs to. Closing the generator, also by leaving the
    loop or by Ctrl-C, ends the thread before it returns.
    """
    if depth < 1:
        raise ValueError(f'depth={depth}: at least one batch must be on its way')
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


def _with_documents(rows: Rows, end_of_text: int | None) -> Rows:
    if end_of_text is None:
        return rows
    positions, documents = document_positions(rows['tokens'], end_of_text)
    return rows | {'positions': positions, 'documents': documents}


def _plain(tokens: Any) -> Any:
    """The same memory as an array, without np.memmap's cost for each slice."""
    return np.asarray(tokens) if isinstance(tokens, np.ndarray) else tokens


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f'batch_size={batch_size}: must be at least 1')


def _check_rows(step: int, start: int, stop: int | None, batch_size: int) -> tuple[int, int]:
    stop = batch_size if stop is None else stop
    if step < 0 or not 0 <= start < stop <= batch_size:
        raise IndexError(f'step {step}, rows {start} to {stop}: steps are counted from 0, and a batch has {batch_size}')
    return start, stop
