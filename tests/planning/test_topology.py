import importlib.util

import jax
import pytest

from gpt_jax.errors import InputError
from gpt_jax.planning import compile_step, find_device, topology

GIB = 2**30
# As the compiler words it.
REFUSAL = (
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
    'temporaries (459.55G) exceeds available HBM (95.73G). HLO module: jit_train_step.\nSee https://openxla.org'
)


def test_a_refusal_is_read_for_what_is_needed_and_what_there_is():
    found = topology.parse_refusal(REFUSAL)
    assert (found.needed, found.available) == (int(459.55 * GIB), int(95.73 * GIB))
    assert found.temporaries == found.needed
    assert found.arguments is None
    assert topology.parse_refusal('INTERNAL: something else') is None


def test_an_error_of_another_kind_is_not_taken_for_a_refusal():

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError('INTERNAL: a bug')

    with pytest.raises(jax.errors.JaxRuntimeError, match='a bug'):
        compile_step(Lowered)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[tpu-aot\]'"):
        topology.topology_devices('v5e:2x2')


def test_an_unknown_kind_of_device_is_refused_unless_it_is_the_compilers():
    assert find_device('TPU v5p').memory_bytes == 95 * GIB
    assert find_device(None) is None
    assert find_device('TPU v99', known=False) is None
    with pytest.raises(InputError, match=r'--device_kind=H100 is not one of NVIDIA A100.*--peak_tflops'):
        find_device('H100')


@pytest.mark.parametrize('name', ['cpu:', 'cpu:0', 'cpu:2x2', 'h100', 'h100:2x', 'h100:2x2x2'])
def test_a_topology_of_cpus_or_gpus_is_a_kind_and_a_number(name):
    with pytest.raises(InputError, match=rf'--topology={name} is not a kind and a number of devices, such as '):
        topology.topology_devices(name)


def test_cpu_devices_are_those_of_this_process():
    assert [device.platform for device in topology.topology_devices('cpu:8')] == ['cpu'] * 8
    with pytest.raises(InputError, match='--topology=cpu:900: this process has 8 CPU devices'):
        topology.topology_devices('cpu:900')


@pytest.mark.parametrize(
    ('name', 'hosts', 'gpus', 'words'),
    [
        ('h100:8', 1, 8, '8 GPUs of a host'),
        ('h200:2', 1, 2, '2 GPUs of a host'),
        ('h100:4x8', 4, 8, '32 GPUs: 4 hosts of 8'),
        ('h100:8x4', 4, 8, '32 GPUs: 4 hosts of 8'),
        ('a100:32', 4, 8, '32 GPUs: 4 hosts of 8'),
        ('b200:128x8', 128, 8, '1,024 GPUs: 128 hosts of 8'),
        ('h100:2x4', 2, 4, '8 GPUs: 2 hosts of 4'),
    ],
)
def test_an_eight_is_that_of_a_hosts_gpus_wherever_it_stands(name, hosts, gpus, words):
    assert topology.gpu_hosts(name) == (hosts, gpus)
    assert topology.describe(name, hosts * gpus) == words


def test_a_slice_of_tpus_is_a_torus():
    assert topology.torus('v5p:8x8x20') == (8, 8, 20)
    assert topology.torus('h100:4x8') == topology.torus('cpu:8') == ()
    assert topology.describe('v5p:8x8x20', 1280) == '1,280 chips: 8 x 8 x 20'


def test_every_gpu_that_can_be_compiled_for_has_a_data_sheet():
    for name, target in topology.GPU_TARGETS.items():
        device = find_device(target['kind'])
        assert device.per_host == topology.HOST_GPUS, name
        assert device.memory_bandwidth > 1e12
        assert device.memory_bytes == pytest.approx(target['memory'], rel=0.08)
        text = topology.GPU_TARGET.format(bandwidth=1, **target)
        assert text.count('{') == text.count('}') == 3


def test_the_kind_of_a_topology_names_its_compiler():
    names = ('v5p:8x8x8', 'h100:8', 'h100:4x8', 'cpu:8')
    assert [topology.topology_compiler(name) for name in names] == ['tpu', 'gpu', 'gpu', 'cpu']


@pytest.mark.skipif(importlib.util.find_spec('jax_plugins') is not None, reason='a plugin is installed')
def test_without_the_cuda_plugin_the_extra_is_named():
    with pytest.raises(InputError, match=r"--topology=h100:8 needs JAX's CUDA plugin.*pip install -e '\.\[gpu-aot\]'"):
        topology.topology_devices('h100:8')


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu, the TPU compiler: [tpu-aot]')
def test_an_unknown_topology_is_one_line():
    with pytest.raises(InputError, match=r'--topology=v5e:3x is not one of the TPU compiler'):
        topology.topology_devices('v5e:3x')


@pytest.mark.parametrize('error', [RuntimeError, jax.errors.JaxRuntimeError], ids=['tracing', 'compiling'])
def test_attention_that_needs_cudnn_names_the_extra_whoever_misses_it(error):
    def lower():
        raise error('cuDNN not found')

    with pytest.raises(InputError, match=r"needs cuDNN: pip install -e '\.\[gpu-aot\]'"):
        compile_step(lower)
