import itertools
import math
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.data import Batches, ValidationBatches, document_positions, prefetch
from gpt_jax.data.batches import Interleaving, TokenSource
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
    order = [window for step in range(steps) for window in windows_of(batches.rows(step), block_size)]
    for epoch in range(epochs):
        assert sorted(order[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


cuts = st.lists(st.integers(1, 5), max_size=4).map(lambda places: [0, *sorted(set(places)), 6])


@sizes
@given(step=st.integers(0, 10**6), cuts=cuts)
def test_rows_asked_for_in_parts_are_those_of_the_whole_batch(step, cuts):
    batches = Batches(tokens_up_to(101), 6, 4, seed=1, end_of_text=7)
    whole = batches.rows(step)
    parts = [batches.rows(step, *span) for span in itertools.pairwise(cuts)]
    assert set(whole) == {'tokens', 'targets', 'positions', 'documents'}
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_rows_are_consecutive_tokens_and_targets_are_the_next_ones():
    batch = Batches(tokens_up_to(100), 4, 8, seed=3).rows(5)
    assert {name: (values.dtype, values.shape) for name, values in batch.items()} == {
        'tokens': (np.int32, (4, 8)),
        'targets': (np.int32, (4, 8)),
    }
    np.testing.assert_array_equal(batch['targets'], batch['tokens'] + 1)
    np.testing.assert_array_equal(np.diff(batch['tokens'], axis=1), 1)


def test_a_step_gives_the_same_batch_whatever_was_read_before():
    one, other = (Batches(tokens_up_to(500), 4, 8, seed=3) for _ in range(2))
    for step in range(20):
        one.rows(step)
    np.testing.assert_array_equal(one.rows(7)['tokens'], other.rows(7)['tokens'])
    np.testing.assert_array_equal(one.rows(10**9)['tokens'], other.rows(10**9)['tokens'])


def test_order_differs_between_epochs_and_between_seeds():
    def order(seed, epoch):
        batches = Batches(tokens_up_to(401), 10, 4, seed)
        return [window for step in range(10) for window in windows_of(batches.rows(10 * epoch + step), 4)]

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
    sources = [
        TokenSource(name, tokens_up_to(401), Fraction(weight)) for name, weight in (('a', 7), ('b', 2), ('c', 1))
    ]

    def work(step):
        with Calls() as calls:
            Batches(sources, 8, 4, seed=3).rows(step)
        return calls.count

    work(0)  # imports
    # Not equal to the call: which source a row is from takes one halving or two.
    assert work(10**6) == pytest.approx(work(0), rel=0.02)
    assert work(10**12) == pytest.approx(work(0), rel=0.02)


def test_corpus_of_one_window_is_repeated():
    batch = Batches(tokens_up_to(9), 3, 8, seed=0).rows(4)
    np.testing.assert_array_equal(batch['tokens'], np.tile(np.arange(8), (3, 1)))


def test_uint32_tokens_and_memory_maps_are_read(tmp_path):
    values = np.arange(70000, 70033, dtype='<u4')
    values.tofile(tmp_path / 'x')
    batch = Batches(np.memmap(tmp_path / 'x', '<u4', mode='r'), 2, 32, seed=0).rows(0)
    np.testing.assert_array_equal(batch['targets'][1], values[1:])


def test_corpus_shorter_than_a_window_is_refused_with_numbers():
    with pytest.raises(InputError, match=r'^block_size=8: .* take 9 tokens and the training split has 8; use'):
        Batches(tokens_up_to(8), 1, 8, seed=0)


def test_source_of_a_mixture_that_is_shorter_than_a_window_is_named():
    sources = [TokenSource('long', tokens_up_to(100)), TokenSource('short', tokens_up_to(8))]
    with pytest.raises(InputError, match=r'^block_size=8: .* split of short has 8; use'):
        Batches(sources, 1, 8, seed=0)


@pytest.mark.parametrize(
    'make', [lambda tokens, size: Batches(tokens, size, 8, 0), lambda t, s: ValidationBatches(t, s, 8)]
)
@pytest.mark.parametrize('batch_size', [0, -1])
def test_batch_without_rows_is_refused(make, batch_size):
    with pytest.raises(InputError, match=f'^batch_size={batch_size}: must be at least 1'):
        make(tokens_up_to(100), batch_size)


def test_negative_seed_is_refused():
    with pytest.raises(InputError, match='seed=-1'):
        Batches(tokens_up_to(100), 1, 8, seed=-1)


@pytest.mark.parametrize('asked', [(-1,), (0, -1, 2), (0, 0, 5), (0, 2, 2), (0, 3, 2)])
def test_steps_and_rows_that_there_are_not_raise(asked):
    for batches in (Batches(tokens_up_to(100), 4, 8, seed=1), ValidationBatches(tokens_up_to(100), 4, 8)):
        with pytest.raises(IndexError, match=f'step {asked[0]}, rows'):
            batches.rows(*asked)


@sizes
@given(
    count=st.integers(2, 200),
    rows=st.integers(1, 4),
    block_size=st.integers(1, 9),
    parts=st.integers(1, 3),
)
def test_validation_predicts_every_token_but_the_first_exactly_once(count, rows, block_size, parts):
    tokens = tokens_up_to(count) + 1  # no token is 0, the padding
    batches = ValidationBatches(tokens, rows * parts, block_size)
    assert len(batches) == -(-(count - 1) // (rows * parts * block_size))
    seen = []
    for step, start in itertools.product(range(len(batches)), range(0, rows * parts, rows)):
        part = batches.rows(step, start, start + rows)
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
        ValidationBatches(tokens_up_to(1), 1, 8)


def mixed(weights, count=301):
    """Sources whose tokens tell which source they are from: the n-th has n times 1 000 added to its places."""
    return [
        TokenSource(str(n), tokens_up_to(count).astype(np.uint32) + 1000 * n, Fraction(weight))
        for n, weight in enumerate(weights)
    ]


def test_every_source_of_a_mixture_has_its_share_and_takes_its_windows_once_an_epoch():
    batches = Batches(mixed(['0.5', '0.3', '0.2']), 10, 4, seed=5)
    assert batches.windows_per_epoch == 225
    rows = np.concatenate([batches.rows(step)['tokens'][:, 0] for step in range(75)])
    for source, share in enumerate((0.5, 0.3, 0.2)):
        own = rows[rows // 1000 == source] % 1000 // 4
        assert abs(len(own) - 750 * share) < 2
        for epoch in range(len(own) // 75):
            assert sorted(own[75 * epoch : 75 * (epoch + 1)]) == list(range(75))


@sizes
@given(step=st.integers(0, 10**6), cuts=cuts)
def test_rows_of_a_mixture_are_the_same_in_parts(step, cuts):
    batches = Batches(mixed([3, 1, 1]), 6, 4, seed=1)
    parts = [batches.rows(step, *span)['tokens'] for span in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), batches.rows(step)['tokens'])


def test_sources_of_equal_length_are_read_in_different_orders():
    rows = np.concatenate([Batches(mixed([1, 1]), 10, 4, seed=0).rows(step)['tokens'][:, 0] for step in range(15)])
    assert (rows[rows < 1000] != rows[rows >= 1000] - 1000).any()


def test_batches_and_validation_say_where_documents_are_only_where_asked():
    tokens = np.array([5, 6, 0, 7, 0, 0, 8, 9, 4], np.uint16)
    for batches in (Batches(tokens, 2, 8, 0, end_of_text=0), ValidationBatches(tokens, 1, 8, end_of_text=0)):
        batch = batches.rows(0)
        np.testing.assert_array_equal(batch['tokens'][0], [5, 6, 0, 7, 0, 0, 8, 9])
        np.testing.assert_array_equal(batch['documents'][0], [0, 0, 1, 1, 2, 3, 3, 3])
        np.testing.assert_array_equal(batch['positions'][0], [0, 1, 0, 1, 0, 0, 1, 2])
        assert {values.dtype for name, values in batch.items() if name != 'weights'} == {np.dtype(np.int32)}
    for batches in (Batches(tokens, 2, 8, 0), ValidationBatches(tokens, 1, 8)):
        assert not {'documents', 'positions'} & set(batches.rows(0))


weight_lists = st.lists(st.fractions(Fraction(1, 1000), 10, max_denominator=1000), min_size=1, max_size=9)


def halvings(weights):
    return math.ceil(math.log2(len(weights)))


@settings(max_examples=60, deadline=None)
@given(weight_lists)
def test_shares_are_right_after_any_number_of_rows(weights):
    interleaving, counts = Interleaving(weights), [0] * len(weights)
    # In whole numbers, which are compared much sooner than fractions.
    shares = [(weight / sum(weights)).as_integer_ratio() for weight in weights]
    for row in range(600):
        source, index = interleaving[row]
        assert index == counts[source]  # none of a source's rows is left out or given twice
        counts[source] += 1
        for (share, of), count in zip(shares, counts, strict=True):
            assert abs(count * of - share * (row + 1)) < max(halvings(weights) * of, 1)


@settings(max_examples=60, deadline=None)
@given(weight_lists, st.integers(0, 10**12))
def test_no_source_starves_however_late_in_the_run(weights, start):
    interleaving = Interleaving(weights)
    for source, weight in enumerate(weights):
        gap = math.ceil(2 * max(halvings(weights), 1) * sum(weights) / weight)
        assert any(interleaving[row][0] == source for row in range(start, start + min(gap, 3000))) or gap > 3000


def test_weights_hold_to_a_thousandth_over_a_run():
    weights = [Fraction(weight) for weight in ('0.33', '0.27', '0.2', '0.15', '0.04', '0.01')]
    interleaving = Interleaving(weights)
    # By how many of a source's rows came before: exact at any length, without walking through the run.
    for rows in (5_000, 10**6, 10**9):
        latest = {}
        for row in range(rows - 500, rows):
            source, index = interleaving[row]
            latest[source] = index + 1
        for source, weight in enumerate(weights):
            assert abs(latest[source] / rows - weight) < 1e-3


def test_two_equal_sources_take_turns():
    order = [Interleaving([Fraction(1), Fraction(1)])[row][0] for row in range(8)]
    assert all(one != other for one, other in itertools.pairwise(order))


def test_a_single_source_gets_every_row():
    assert [Interleaving([Fraction(3)])[row] for row in range(4)] == [(0, 0), (0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize('weights', [[], [Fraction(0)], [Fraction(1), Fraction(-1)]])
def test_interleaving_without_weights_above_zero_is_a_bug(weights):
    with pytest.raises(ValueError, match='all above 0'):
        Interleaving(weights)


END = 0


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4))
def test_positions_are_those_of_documents_cut_apart_by_hand(rows):
    positions, documents = document_positions(np.array(rows), END)
    assert (positions.dtype, documents.dtype) == (np.int32, np.int32)
    for row, row_positions, row_documents in zip(rows, positions, documents, strict=True):
        pieces = [[]]
        for token in row:
            if token == END:
                pieces.append([])
            pieces[-1].append(token)
        assert [place for piece in pieces for place in range(len(piece))] == row_positions.tolist()
        assert [number for number, piece in enumerate(pieces) for _ in piece] == row_documents.tolist()


def test_row_without_a_separator_is_one_document_that_starts_with_it():
    positions, documents = document_positions(np.array([[4, 5, 6]]), END)
    assert positions.tolist() == [[0, 1, 2]]
    assert documents.tolist() == [[0, 0, 0]]


class Numbers:
    """Makes a batch that is the step; remembers what was asked for, and by which thread."""

    def __init__(self, fails_at=None):
        self.asked, self.threads, self.fails_at = [], set(), fails_at

    def __call__(self, step):
        self.asked.append(step)
        self.threads.add(threading.current_thread())
        if step == self.fails_at:
            raise OSError(f'step {step}')
        return -step


def test_prefetch_yields_every_step_once_in_order_from_one_other_thread():
    source = Numbers()
    assert list(prefetch(source, 3, 20)) == [-step for step in range(3, 20)]
    assert source.asked == list(range(3, 20))
    assert len(source.threads) == 1
    assert threading.current_thread() not in source.threads


@pytest.mark.parametrize(('start', 'stop'), [(5, 5), (5, 3), (5, 6)])
def test_prefetch_of_few_or_no_steps(start, stop):
    assert list(prefetch(Numbers(), start, stop, depth=4)) == [-step for step in range(start, stop)]


def test_prefetch_works_ahead_by_its_depth_and_no_further():
    source = Numbers()
    batches = prefetch(source, 0, 100, depth=3)
    assert next(batches) == 0
    deadline = time.monotonic() + 10
    while len(source.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert source.asked == [0, 1, 2, 3]
    batches.close()


def test_prefetch_reports_a_wait_only_where_the_batch_was_not_there():
    may_go, waits = threading.Event(), []

    def make(step):
        if step == 0:
            may_go.wait(timeout=10)
        return source(step)

    source = Numbers()
    batches = prefetch(make, 0, 3, depth=2, on_wait=waits.append)
    timer = threading.Timer(0.05, may_go.set)
    timer.start()
    assert next(batches) == 0
    assert len(waits) == 1
    assert waits[0] > 0.01
    deadline = time.monotonic() + 10
    while source.asked != [0, 1, 2] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert next(batches) == -1
    assert len(waits) == 1
    batches.close()
    timer.join()


def test_prefetch_raises_in_the_consumer_at_the_step_that_failed():
    source = Numbers(fails_at=4)
    seen = []
    with pytest.raises(OSError, match='step 4'):
        seen.extend(step for step in recorded(prefetch(source, 0, 10), seen))
    assert seen == [0, -1, -2, -3]
    assert not [thread for thread in source.threads if thread.is_alive()]


def recorded(items, seen):
    for item in items:
        seen.append(item)
        yield from ()


def test_closing_prefetch_joins_its_thread_and_drops_what_is_queued():
    source = Numbers()
    batches = prefetch(source, 0, 1000, depth=2)
    next(batches)
    batches.close()
    assert not [thread for thread in source.threads if thread.is_alive()]
    assert len(source.asked) <= 3


def test_interrupt_in_the_loop_ends_the_thread():
    source = Numbers()

    def consume():
        for _ in prefetch(source, 0, 1000):
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
        next(prefetch(Numbers(), 0, 1, depth=0))
