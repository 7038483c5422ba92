"""Plan a training before it is started: recipe, parameters, arithmetic, memory, time and cost.

    python -m gpt_jax.plan --config=configs/gpt3.py:13b --devices=256 --device_kind='TPU v5p' --config.mesh.fsdp=256

Nothing is trained and nothing large is allocated. With --topology the real training step is compiled for devices that
need not be here, and the compiler's own account of its memory stands beside the estimate: v5p:8x8x8 by the TPU compiler
(pip install -e '.[tpu-aot]'), h100:8 by the GPU's (pip install -e '.[cuda12]'), cpu:8 by the CPU's.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from gpt_jax import cli
from gpt_jax.errors import InputError

if TYPE_CHECKING:
    import jax

    from gpt_jax import planning
    from gpt_jax.config import RunConfig
    from gpt_jax.models import GPTConfig

CONFIG = config_flags.DEFINE_config_file('config', None, 'path to config file.')
DEVICES = flags.DEFINE_integer('devices', None, "devices to plan for (default: the topology's, else 1)")
DEVICE_KIND = flags.DEFINE_string('device_kind', None, "what they are, as jax calls them: 'NVIDIA H100 80GB HBM3', ...")
PEAK_TFLOPS = flags.DEFINE_float('peak_tflops', None, 'dense bf16 peak of a device, in TFLOP/s (default: of its kind)')
MFU = flags.DEFINE_float('mfu', 0.4, 'share of the peak that training uses, above 0 and at most 1; assumed')
DOLLARS = flags.DEFINE_float('dollars_per_device_hour', None, 'price of one device for an hour')
BATCH = flags.DEFINE_integer('decode_batch', 1, 'sequences of the key-value cache')
LENGTH = flags.DEFINE_integer('decode_length', None, 'tokens of the key-value cache (default: model.block_size)')
TOPOLOGY = flags.DEFINE_string('topology', None, 'devices to compile the step for: v5p:8x8x8, h100:8, cpu:8')
VERIFY = flags.DEFINE_bool('verify', False, 'with --topology: compile the first change that is proposed, too')
JSON = flags.DEFINE_bool('json', False, 'print one JSON object')


def main() -> None:
    """Plans and prints."""
    config = cli.read_experiment(CONFIG)
    _check_flags()
    import jax

    # Nothing is run: devices that are here stay free for others.
    jax.config.update('jax_platforms', 'cpu')
    from gpt_jax import planning
    from gpt_jax.training import prefer_overrides, resolve
    from gpt_jax.training.step import check_mesh

    prefer_overrides(config, config_flags.get_override_values(flags.FLAGS['config']))
    run = resolve(config)
    devices = planning.topology_devices(TOPOLOGY.value) if TOPOLOGY.value else None
    count = DEVICES.value or (len(devices) if devices else 1)
    if devices and count != len(devices):
        raise InputError(f'--devices={count}, but --topology={TOPOLOGY.value} has {len(devices)}; leave --devices out')
    kind = devices[0].device_kind if devices else DEVICE_KIND.value
    device = planning.find_device(kind, known=devices is None)
    placement = planning.Placement.of(
        _planned_model(run), run.mesh, count, run.train.batch_size, run.train.accumulation_steps
    )
    on_cpu = bool(devices) and planning.topology_compiler(TOPOLOGY.value) == 'cpu'

    def memory(placement: planning.Placement) -> planning.Memory:
        return planning.training_memory(placement, _abstract_state(run, placement), on_cpu)

    def compiled(placement: planning.Placement) -> dict[str, Any]:
        answer = planning.compile_step(lambda: _lower_step(run, placement, devices))
        return planning.compiled_section(TOPOLOGY.value, answer, limit)

    length = LENGTH.value or placement.config.block_size
    if length > placement.config.block_size:
        raise InputError(f'--decode_length={length} exceeds model.block_size={placement.config.block_size}')
    peak = PEAK_TFLOPS.value * 1e12 if PEAK_TFLOPS.value else device and device.peak_flops
    limit = device and device.memory_bytes
    estimate = memory(placement)
    # After the state has been split: an axis that divides no parameter is the plainer reason.
    check_mesh(run, dataclasses.asdict(placement.mesh))
    plan = {'name': config_flags.get_config_filename(flags.FLAGS['config']), 'device_kind': kind}
    plan |= _recipe_section(run) | planning.model_section(placement, _training_tokens(run))
    plan['memory'] = planning.memory_section(placement, estimate, limit)
    plan['decode_cache'] = planning.cache_section(placement, BATCH.value, length)
    flops = plan['training_flops']['total']
    plan['cost'] = planning.cost_section(placement, flops, peak, MFU.value, DOLLARS.value)
    fits = limit is None or estimate.total <= limit
    if devices:
        plan['compiled'] = compiled(placement)
        fits = plan['compiled']['fits']
        limit = plan['compiled']['available_bytes'] or limit
    if not fits:
        found, any_fits = planning.advice(placement, limit, memory)
        plan['advice'] = planning.advice_section(placement, found, any_fits)
        if devices and VERIFY.value and any_fits:
            plan['advice']['verified'] = compiled(found[0][0])
    print(json.dumps(plan, allow_nan=False) if JSON.value else planning.render(plan))


def _recipe_section(run: 'RunConfig') -> dict[str, Any]:
    """`recipe`, name -> value and source, and `notes`, sentences."""
    from gpt_jax.config import as_dict
    from gpt_jax.training import recipe

    model = run.model
    found = recipe.provenance(as_dict(run)) | recipe.facts(model.version, model.preset)
    return {
        'recipe': {name: {'value': value.value, 'source': value.source} for name, value in found.items()},
        'notes': recipe.notes(model.preset),
    }


def _planned_model(run: 'RunConfig') -> 'GPTConfig':
    """The architecture; where the corpus decides on the vocabulary, the size that the config asks for.

    A run trains a tokenizer of at most `data.vocab_size` tokens, or takes GPT-2's. Only the data tell how many
    characters there are: 256 stand for them.
    """
    from gpt_jax.models import PRESETS
    from gpt_jax.training.recipe import model_config

    sizes = {'bpe': run.data.vocab_size, 'char': 256}
    gpt2 = PRESETS['gpt2-small'].vocab_size
    return model_config(run, run.model.vocab_size or sizes.get(run.data.tokenizer, gpt2))


def _training_tokens(run: 'RunConfig') -> int | None:
    """Tokens of the whole run; None where its length is in epochs of a corpus that is not at hand."""
    from gpt_jax.training.optimizer import batch_sizes

    sizes, block_size = batch_sizes(run), run.model.block_size
    if run.train.steps is not None:
        return sizes.rows_before(run.train.steps) * block_size
    if run.train.tokens is None:
        return None
    return sizes.rows_before(sizes.steps(run.train.tokens, of_row=block_size)) * block_size


def _abstract_state(run: 'RunConfig', placement: 'planning.Placement', mesh: Any = None) -> Any:
    """The training state as sharded ShapeDtypeStructs, on `mesh` or on one of devices that need not be here."""
    import optax

    from gpt_jax.models import GPT
    from gpt_jax.parallel import make_abstract_mesh
    from gpt_jax.training.optimizer import make_optimizer
    from gpt_jax.training.step import StepSettings, abstract_state

    # The schedule's form does not change the state's.
    schedule = optax.constant_schedule(run.optimizer.learning_rate)
    optimizer = make_optimizer(run.optimizer, schedule, run.precision.moments)
    if mesh is None:
        mesh = make_abstract_mesh(placement.mesh, placement.devices)
    return abstract_state(GPT(placement.config), optimizer, mesh, StepSettings.of(run))


def _lower_step(run: 'RunConfig', placement: 'planning.Placement', devices: 'Sequence[jax.Device]') -> Any:
    """The real training step, lowered for `devices`."""
    import jax
    import jax.numpy as jnp
    import optax

    from gpt_jax.models import GPT
    from gpt_jax.parallel import batch_sharding, make_mesh
    from gpt_jax.training.optimizer import make_optimizer
    from gpt_jax.training.step import StepSettings, make_train_step

    config, mesh = placement.config, make_mesh(placement.mesh, devices)
    schedule = optax.constant_schedule(run.optimizer.learning_rate)
    optimizer = make_optimizer(run.optimizer, schedule, run.precision.moments)
    count, settings = placement.accumulation_steps, StepSettings.of(run)
    step = make_train_step(GPT(config), optimizer, schedule, mesh, count, run.train.seed, settings)
    shape = (placement.batch_size, config.block_size)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    return step.lower(_abstract_state(run, placement, mesh), {'tokens': tokens, 'targets': tokens})


def _check_flags() -> None:
    if not 1e-6 <= MFU.value <= 1:
        raise InputError(
            f'--mfu={MFU.value} must be above 0 and at most 1, and not below 1e-6: it is a share of the peak'
        )
    for flag in (DEVICES, PEAK_TFLOPS, DOLLARS, BATCH, LENGTH):
        # Wider than anything real, and narrow enough that no product of them is infinite.
        if flag.value is not None and not 1e-9 <= flag.value <= 1e12:
            raise InputError(f'--{flag.name}={flag.value} must be above 0, and at most 1e12')
    if VERIFY.value and not TOPOLOGY.value:
        raise InputError('--verify needs --topology: it is a compiler that verifies')


if __name__ == '__main__':
    cli.run(
        main,
        __doc__,
        (
            'config',
            'devices',
            'device_kind',
            'peak_tflops',
            'mfu',
            'dollars_per_device_hour',
            'decode_batch',
            'decode_length',
            'topology',
            'verify',
            'json',
        ),
    )
