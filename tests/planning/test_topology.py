import importlib.util

import pytest

from gpt_jax.errors import InputError
from gpt_jax.planning import compile_step, find_device, setup_memory, topology
from gpt_jax.planning.setup import Setup
from gpt_jax.training import plans, resolve

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
    import jax

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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu, the TPU compiler: [tpu-aot]')
class TestTpuCompiler:
    """The real step, compiled for four TPUs that are not here."""

    def run(self):
        from configs import gpt3

        config = gpt3.get_config('125m')
        config.model.update(n_layer=4, block_size=256)
        config.train.batch_size = 64
        config.mesh.update(data=1, fsdp=4)
        return resolve(config)

    def test_what_it_allocates_is_not_above_the_estimate_nor_far_below(self):
        run, devices = self.run(), topology.topology_devices('v5e:2x2')
        setup = Setup.of(plans.model_config(run), run.mesh, len(devices), run.train.batch_size, 1)
        compiled = compile_step(lambda: plans.lower_step(run, setup.config, setup.mesh, 1, devices))
        assert compiled.available is None
        assert compiled.needed == compiled.arguments + compiled.outputs + compiled.temporaries
        memory = setup_memory(setup, plans.abstract_state_of(run, setup.config, setup.mesh))
        # This compiler plans its buffers more tightly than the estimate, which is held to 15 % of the CPU's alone.
        assert 1.0 < memory.total / compiled.needed < 1.3
        # Parameters and Adam's moments, split over four, and the batch: exactly what goes in, but for padding.
        assert memory.parameters + memory.optimizer == pytest.approx(compiled.arguments, rel=0.02)

    def test_an_unknown_topology_is_one_line(self):
        with pytest.raises(InputError, match=r'--topology=v5e:3x is not one of the TPU compiler'):
            topology.topology_devices('v5e:3x')
