import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.data import Batches, prefetch, validation_batches
from gpt_jax.data.mixture import Source
from gpt_jax.errors import InputError

sizes = settings(max_examples=40, deadline=None)


def tokens_up_to(count):
    return np.arange(count, dtype=np.uint16)


def windows_of(batch, block_size):
    """Window numbers of a batch made from `tokens_up_to`."""
    return [int(row[0]) // block_size for row in batch['tokens']]


@sizes
@given(
    count=st.integers(9, 300),
    batch_size=st.integers(1, 7),
    block_size=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    epochs=st.integers(1, 3),
)
def test_every_epoch_takes_each_window_once(count, batch_size, block_size, seed, epochs):
    batches = Batches(tokens_up_to(count), batch_size, block_size, seed)
    windows = batches.windows_per_epoch
    assert windows == (count - 1) // block_size
    steps = -(-windows * epochs // batch_size)
    order = [window for step in range(steps) for window in windows_of(batches[step], block_size)]
    for epoch in range(epochs):
        assert sorted(order[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


@sizes
@given(step=st.integers(0, 10**6), process_count=st.sampled_from([1, 2, 3, 6]))
def test_processes_hold_contiguous_slices_of_the_same_global_batch(step, process_count):
    tokens = tokens_up_to(101)
    whole = Batches(tokens, 6, 4, seed=1)[step]
    parts = [Batches(tokens, 6, 4, 1, index, process_count)[step] for index in range(process_count)]
    for name in ('tokens', 'targets'):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_rows_are_consecutive_tokens_and_targets_are_the_next_ones():
    batch = Batches(tokens_up_to(100), 4, 8, seed=3)[5]
    assert {name: (values.dtype, values.shape) for name, values in batch.items()} == {
        'tokens': (np.int32, (4, 8)),
        'targets': (np.int32, (4, 8)),
    }
    np.testing.assert_array_equal(batch['targets'], batch['tokens'] + 1)
    np.testing.assert_array_equal(np.diff(batch['tokens'], axis=1), 1)


def test_a_step_gives_the_same_batch_whatever_was_read_before():
    one, other = (Batches(tokens_up_to(500), 4, 8, seed=3) for _ in range(2))
    for step in range(20):
        one[step]
    np.testing.assert_array_equal(one[7]['tokens'], other[7]['tokens'])
    np.testing.assert_array_equal(one[10**9]['tokens'], other[10**9]['tokens'])


def test_order_differs_between_epochs_and_between_seeds():
    def order(seed, epoch):
        batches = Batches(tokens_up_to(401), 10, 4, seed)
        return [window for step in range(10) for window in windows_of(batches[10 * epoch + step], 4)]

    assert order(0, 0) != list(range(100))
    assert order(0, 0) != order(0, 1) != order(0, 2)
    assert order(0, 0) != order(1, 0)


class Calls:
    """Counts the Python functions and the array slices that a block of code calls: work, whatever the machine does."""

    def __enter__(self):
        self.count = 0
        sys.setprofile(self._count)
        return self

    def _count(self, frame, event, argument):
        self.count += event in ('call', 'c_call')

    def __exit__(self, *error):
        sys.setprofile(None)


def test_the_millionth_step_is_as_cheap_as_the_first():
    sources = [Source(name, tokens_up_to(401), Fraction(weight)) for name, weight in (('a', 7), ('b', 2), ('c', 1))]

    def work(step):
        with Calls() as calls:
            Batches(sources, 8, 4, seed=3)[step]
        return calls.count

    work(0)  # imports
    # Not equal to the call: which source a row is from takes one halving or two.
    assert work(10**6) == pytest.approx(work(0), rel=0.02)
    assert work(10**12) == pytest.approx(work(0), rel=0.02)


def test_corpus_of_one_window_is_repeated():
    batch = Batches(tokens_up_to(9), 3, 8, seed=0)[4]
    np.testing.assert_array_equal(batch['tokens'], np.tile(np.arange(8), (3, 1)))


def test_uint32_tokens_and_memory_maps_are_read(tmp_path):
    values = np.arange(70000, 70033, dtype='<u4')
    values.tofile(tmp_path / 'x')
    batch = Batches(np.memmap(tmp_path / 'x', '<u4', mode='r'), 2, 32, seed=0)[0]
    np.testing.assert_array_equal(batch['targets'][1], values[1:])


def test_corpus_shorter_than_a_window_is_refused_with_numbers():
    with pytest.raises(InputError, match=r'^block_size=8: .* take 9 tokens and the training split has 8; use'):
        Batches(tokens_up_to(8), 1, 8, seed=0)


def test_source_of_a_mixture_that_is_shorter_than_a_window_is_named():
    sources = [Source('long', tokens_up_to(100)), Source('short', tokens_up_to(8))]
    with pytest.raises(InputError, match=r'^block_size=8: .* split of short has 8; use'):
        Batches(sources, 1, 8, seed=0)


@pytest.mark.parametrize('batch_size', [0, 3])
def test_batch_that_does_not_divide_by_the_processes_is_refused(batch_size):
    with pytest.raises(InputError, match=f'^batch_size={batch_size}: .*multiple of the 2'):
        Batches(tokens_up_to(100), batch_size, 8, 0, 0, 2)
    with pytest.raises(InputError, match=f'^batch_size={batch_size}: .*multiple of the 2'):
        validation_batches(tokens_up_to(100), batch_size, 8, 0, 2)


def test_negative_seed_and_step_are_refused():
    with pytest.raises(InputError, match='seed=-1'):
        Batches(tokens_up_to(100), 1, 8, seed=-1)
    with pytest.raises(IndexError):
        Batches(tokens_up_to(100), 1, 8, seed=1)[-1]


@sizes
@given(
    count=st.integers(2, 200),
    rows=st.integers(1, 4),
    block_size=st.integers(1, 9),
    process_count=st.integers(1, 3),
)
def test_validation_predicts_every_token_but_the_first_exactly_once(count, rows, block_size, process_count):
    tokens = tokens_up_to(count) + 1  # no token is 0, the padding
    batch_size = rows * process_count
    streams = [
        list(validation_batches(tokens, batch_size, block_size, index, process_count)) for index in range(process_count)
    ]
    assert len({len(stream) for stream in streams}) == 1
    assert len(streams[0]) == -(-(count - 1) // (batch_size * block_size))
    seen = []
    for parts in zip(*streams, strict=True):
        for part in parts:
            assert {values.shape for values in part.values()} == {(rows, block_size)}
            weights = part['weights']
            assert weights.dtype == np.float32
            assert not part['tokens'][weights == 0].any()
            assert not part['targets'][weights == 0].any()
            np.testing.assert_array_equal(part['targets'][weights == 1], part['tokens'][weights == 1] + 1)
            seen += part['targets'][weights == 1].tolist()
    assert seen == tokens[1:].tolist()


def test_validation_split_of_one_token_is_refused():
    with pytest.raises(InputError, match='has 1 tokens'):
        validation_batches(tokens_up_to(1), 1, 8)


def mixed(weights, count=301):
    """Sources whose tokens tell which source they are from: the n-th has n times 1 000 added to its places."""
    return [
        Source(str(n), tokens_up_to(count).astype(np.uint32) + 1000 * n, Fraction(weight))
        for n, weight in enumerate(weights)
    ]


def test_every_source_of_a_mixture_has_its_share_and_takes_its_windows_once_an_epoch():
    batches = Batches(mixed(['0.5', '0.3', '0.2']), 10, 4, seed=5)
    assert batches.windows_per_epoch == 225
    rows = np.concatenate([batches[step]['tokens'][:, 0] for step in range(75)])
    for source, share in enumerate((0.5, 0.3, 0.2)):
        own = rows[rows // 1000 == source] % 1000 // 4
        assert abs(len(own) - 750 * share) < 2
        for epoch in range(len(own) // 75):
            assert sorted(own[75 * epoch : 75 * (epoch + 1)]) == list(range(75))


@sizes
@given(step=st.integers(0, 10**6), process_count=st.sampled_from([1, 2, 3, 6]))
def test_a_mixture_is_the_same_for_any_number_of_processes(step, process_count):
    sources = mixed([3, 1, 1])
    whole = Batches(sources, 6, 4, seed=1)[step]['tokens']
    parts = [Batches(sources, 6, 4, 1, index, process_count)[step]['tokens'] for index in range(process_count)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_sources_of_equal_length_are_read_in_different_orders():
    rows = np.concatenate([Batches(mixed([1, 1]), 10, 4, seed=0)[step]['tokens'][:, 0] for step in range(15)])
    assert (rows[rows < 1000] != rows[rows >= 1000] - 1000).any()


def test_batches_and_validation_say_where_documents_are_only_where_asked():
    tokens = np.array([5, 6, 0, 7, 0, 0, 8, 9, 4], np.uint16)
    for batch in (Batches(tokens, 2, 8, 0, end_of_text=0)[3], next(validation_batches(tokens, 1, 8, end_of_text=0))):
        np.testing.assert_array_equal(batch['tokens'][0], [5, 6, 0, 7, 0, 0, 8, 9])
        np.testing.assert_array_equal(batch['documents'][0], [0, 0, 1, 1, 2, 3, 3, 3])
        np.testing.assert_array_equal(batch['positions'][0], [0, 1, 0, 1, 0, 0, 1, 2])
        assert {values.dtype for name, values in batch.items() if name != 'weights'} == {np.dtype(np.int32)}
    for batch in (Batches(tokens, 2, 8, 0)[3], next(validation_batches(tokens, 1, 8))):
        assert not {'documents', 'positions'} & set(batch)


class Numbers:
    """Batch source whose batch is the step; remembers what was asked for, and by which thread."""

    def __init__(self, fails_at=None):
        self.asked, self.threads, self.fails_at = [], set(), fails_at

    def __getitem__(self, step):
        self.asked.append(step)
        self.threads.add(threading.current_thread())
        if step == self.fails_at:
            raise OSError(f'step {step}')
        return step


def test_prefetch_yields_every_step_once_in_order_from_one_other_thread():
    source = Numbers()
    assert list(prefetch(source, 3, 20, lambda step: -step)) == [-step for step in range(3, 20)]
    assert source.asked == list(range(3, 20))
    assert len(source.threads) == 1
    assert threading.current_thread() not in source.threads


@pytest.mark.parametrize(('start', 'stop'), [(5, 5), (5, 3), (5, 6)])
def test_prefetch_of_few_or_no_steps(start, stop):
    assert list(prefetch(Numbers(), start, stop, lambda step: step, depth=4)) == list(range(start, stop))


def test_prefetch_works_ahead_by_its_depth_and_no_further():
    source = Numbers()
    batches = prefetch(source, 0, 100, lambda step: step, depth=3)
    assert next(batches) == 0
    deadline = time.monotonic() + 10
    while len(source.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert source.asked == [0, 1, 2, 3]
    batches.close()


def test_prefetch_reports_a_wait_only_where_the_batch_was_not_there():
    may_go, waits = threading.Event(), []

    def to_device(step):
        if step == 0:
            may_go.wait(timeout=10)
        return step

    source = Numbers()
    batches = prefetch(source, 0, 3, to_device, depth=2, on_wait=waits.append)
    timer = threading.Timer(0.05, may_go.set)
    timer.start()
    assert next(batches) == 0
    assert len(waits) == 1
    assert waits[0] > 0.01
    deadline = time.monotonic() + 10
    while source.asked != [0, 1, 2] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert next(batches) == 1
    assert len(waits) == 1
    batches.close()
    timer.join()


@pytest.mark.parametrize('where', ['batches', 'to_device'])
def test_prefetch_raises_in_the_consumer_at_the_step_that_failed(where):
    source = Numbers(fails_at=4 if where == 'batches' else None)

    def to_device(step):
        if where == 'to_device' and step == 4:
            raise OSError('step 4')
        return step

    seen = []
    with pytest.raises(OSError, match='step 4'):
        seen.extend(step for step in recorded(prefetch(source, 0, 10, to_device), seen))
    assert seen == [0, 1, 2, 3]
    assert not [thread for thread in source.threads if thread.is_alive()]


def recorded(items, seen):
    for item in items:
        seen.append(item)
        yield from ()


def test_closing_prefetch_joins_its_thread_and_drops_what_is_queued():
    source = Numbers()
    batches = prefetch(source, 0, 1000, lambda step: step, depth=2)
    next(batches)
    batches.close()
    assert not [thread for thread in source.threads if thread.is_alive()]
    assert len(source.asked) <= 3


def test_interrupt_in_the_loop_ends_the_thread():
    source = Numbers()

    def consume():
        for _ in prefetch(source, 0, 1000, lambda step: step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert len(source.asked) <= 3
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in source.threads) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not [thread for thread in source.threads if thread.is_alive()]


def test_prefetch_without_depth_is_a_bug():
    with pytest.raises(ValueError, match='depth=0'):
        next(prefetch(Numbers(), 0, 1, lambda step: step, depth=0))
