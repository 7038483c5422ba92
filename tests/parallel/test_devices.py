"""How much memory there is: as devices say, as data sheets say, as the machine or its container has it."""

import types

import jax
import pytest

from gpt_jax.parallel import devices


def device(platform='gpu', kind='NVIDIA H200', stats=None):
    return types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats)


@pytest.fixture
def limits(monkeypatch, tmp_path):
    """A function: what the file of a container's limit says -> what the machine has by it."""

    def read(text):
        (tmp_path / 'memory.max').write_text(text)
        monkeypatch.setattr(devices, 'CONTAINER_LIMITS', (str(tmp_path / 'none'), str(tmp_path / 'memory.max')))
        return devices.host_memory()

    return read


def test_the_machine_has_what_its_container_may_take(limits):
    whole = limits('max\n')
    assert whole > 2**28
    assert limits(f'{2**28}\n') == 2**28
    assert limits(f'{2**62}\n') == whole
    assert devices.memory_of(jax.devices()) == devices.host_memory()


def test_accelerators_have_what_they_say_or_their_data_sheet():
    assert devices.memory_of([device(stats={'bytes_limit': 5}), device(stats={'bytes_limit': 7})]) == 12
    assert devices.memory_of([device(), device(stats={})]) == 2 * 141 * 10**9
    assert devices.memory_of([device(kind='of the future')]) == devices.host_memory()
