import dataclasses
import mmap

import jax
import numpy as np
import pytest

from gpt_jax.models import GPTConfig
from gpt_jax.parallel.devices import Device
from gpt_jax.training import speed
from gpt_jax.training.speed import Throughput, memory_in_use, model_flops_utilisation

CONFIG = GPTConfig(vocab_size=128, block_size=32, n_layer=2, n_head=2, d_model=32)


@pytest.fixture
def clock(monkeypatch):
    """A function: seconds by which the clock goes on."""
    now = [100.0]

    def go_on(seconds):
        now[0] += seconds

    monkeypatch.setattr(speed.time, 'perf_counter', lambda: now[0])
    return go_on


def test_rates_leave_out_what_is_not_training(clock):
    throughput, seconds = Throughput(), (0.5, 0.1, 0.2, 0.7, 0.1)
    with throughput.compiling():
        clock(30.0)
    for number, one in enumerate(seconds):
        clock(one)
        throughput.finished()
        if number == 2:
            with throughput.left_out():
                clock(1000.0)
    throughput.waited(0.25)
    row = throughput.lap(320, CONFIG)
    assert row['tokens_per_second'] == pytest.approx(320 / sum(seconds))
    assert row['compile_seconds'] == pytest.approx(30.0)
    assert row['data_wait_ms'] == pytest.approx(250.0)
    for name, share in (('median', 50), ('p90', 90), ('max', 100)):
        assert row[f'step_ms_{name}'] == pytest.approx(1000 * np.percentile(seconds, share))
    clock(2.0)
    throughput.finished()
    row = throughput.lap(64, CONFIG)
    assert (row['tokens_per_second'], row['compile_seconds'], row['data_wait_ms']) == (pytest.approx(32.0), 0.0, 0.0)
    assert row['step_ms_max'] == pytest.approx(2000.0)


def test_a_lap_that_no_clock_can_measure_is_finite(clock):
    assert np.isfinite(Throughput().lap(100, CONFIG)['tokens_per_second'])


def test_utilisation_has_both_conventions_and_is_null_where_no_data_sheet_is_known(monkeypatch):
    assert model_flops_utilisation(CONFIG, 1e6) == {'mfu': None, 'mfu_6n': None}
    monkeypatch.setitem(speed.DEVICES, jax.devices()[0].device_kind, Device(peak_flops=1e12, memory_bytes=1))
    wte, block = 128 * 32, 12 * 32 * 32 + 13 * 32
    weights = wte + 2 * block + 2 * 32  # without the position embeddings
    peak = 1e12 * jax.device_count()
    found = model_flops_utilisation(CONFIG, 1e6)
    assert found['mfu_6n'] == pytest.approx(1e6 * 6 * weights / peak)
    assert found['mfu'] == pytest.approx(1e6 * (6 * weights + 12 * 2 * 32 * 32) / peak)
    banded = dataclasses.replace(CONFIG, attention_pattern='alternating', band_size=4)
    assert model_flops_utilisation(banded, 1e6)['mfu'] < found['mfu']


def test_memory_is_that_of_the_process_where_devices_do_not_tell():
    before = memory_in_use()
    held = np.frombuffer(mmap.mmap(-1, 2**27), np.uint8)  # 128 MiB of its own: an allocator may give old ones again
    held[:] = 1
    after = memory_in_use()
    assert after['memory_gib'] - before['memory_gib'] == pytest.approx(held.nbytes / 2**30, rel=0.2)
    assert after['peak_memory_gib'] >= after['memory_gib'] - 0.01
