"""Plan a training before it is started: recipe, parameters, arithmetic, memory, time and cost.

    python -m gpt_jax.plan --config=configs/gpt3.py:13b --devices=256 --device_kind='TPU v5p'

Nothing is trained and nothing large is allocated. With --topology the real training step is compiled for devices that
need not be here, and the compiler's own account of its memory, and of what devices send each other, stands beside the
estimate: v5p:8x8x8 by the TPU compiler (pip install -e '.[tpu-aot]'); a100, h100, h200 and b200 by the GPU's (pip
install -e '.[gpu-aot]'), as h100:8, or h100:4x8 for 4 hosts of 8 (an 8 is that of a host's GPUs wherever it stands:
h100:8x4 is the same), with the step's roofline; cpu:8 by the CPU's.

With --search mesh, rematerialisation and micro-batches are found that train fastest by estimate on these devices, the
compiler certifies that the best of them fits, and the flags to paste are printed:

    python -m gpt_jax.plan --config=configs/gpt3.py:1.3b --topology=v5e:4x8 --search
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
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
    from gpt_jax.parallel.devices import Device

CONFIG = config_flags.DEFINE_config_file('config', None, 'path to config file.')
DEVICES = flags.DEFINE_integer('devices', None, "devices to plan for (default: the topology's, else 1)")
DEVICE_KIND = flags.DEFINE_string('device_kind', None, "what they are, as jax calls them: 'NVIDIA H100 80GB HBM3', ...")
PEAK_TFLOPS = flags.DEFINE_float('peak_tflops', None, 'dense bf16 peak of a device, in TFLOP/s (default: of its kind)')
MFU = flags.DEFINE_float('mfu', 0.4, 'share of the peak that training uses, above 0 and at most 1; assumed')
DOLLARS = flags.DEFINE_float('dollars_per_device_hour', None, 'price of one device for an hour')
BATCH = flags.DEFINE_integer('decode_batch', 1, 'sequences of the key-value cache')
LENGTH = flags.DEFINE_integer('decode_length', None, 'tokens of the key-value cache (default: model.block_size)')
TOPOLOGY = flags.DEFINE_string('topology', None, 'devices to compile the step for: v5p:8x8x8, h100:8, h100:4x8, cpu:8')
SEARCH = flags.DEFINE_bool('search', False, 'find the fastest mesh, remat and micro-batches that fit the devices')
VERIFY = flags.DEFINE_bool('verify', False, 'with --topology: compile the first change that is proposed, too')
JSON = flags.DEFINE_bool('json', False, 'print one JSON object')

# How often a search asks the compiler, which takes minutes for a large model.
MOST_COMPILES = 4


def main() -> None:
    """Plans and prints."""
    config = cli.read_experiment(CONFIG)
    _check_flags()
    import jax

    # Nothing is run: devices that are here stay free for others.
    jax.config.update('jax_platforms', 'cpu')
    from gpt_jax import planning
    from gpt_jax.models import attention_kernels
    from gpt_jax.training import prefer_overrides, resolve
    from gpt_jax.training.recipe import planned_model
    from gpt_jax.training.step import check_mesh, check_multipliers

    prefer_overrides(config, config_flags.get_override_values(flags.FLAGS['config']))
    run = resolve(config)
    devices = planning.topology_devices(TOPOLOGY.value) if TOPOLOGY.value else None
    count = DEVICES.value or (len(devices) if devices else 1)
    if devices and count != len(devices):
        raise InputError(f'--devices={count}, but --topology={TOPOLOGY.value} has {len(devices)}; leave --devices out')
    kind = devices[0].device_kind if devices else DEVICE_KIND.value
    device = planning.find_device(kind, known=devices is None)
    compiler = planning.topology_compiler(TOPOLOGY.value) if devices else None
    if device and compiler == 'gpu':
        device = dataclasses.replace(device, per_host=planning.gpu_hosts(TOPOLOGY.value)[1])
    limit = device and device.memory_bytes
    states: dict[Any, Any] = {}  # by their mesh: the same for every policy and number of micro-batches

    def memory(placement: planning.Placement) -> planning.Memory:
        if placement.mesh not in states:
            known = next(iter(states.values()), None)
            states[placement.mesh] = _abstract_state(run, placement) if known is None else _moved(known, placement)
        return planning.training_memory(
            placement, states[placement.mesh], cpu=compiler == 'cpu', documents=run.data.mask_documents
        )

    def compiled(placement: planning.Placement) -> dict[str, Any]:
        answer = planning.compile_step(lambda: _lower_step(run, placement, devices))
        kernels = attention_kernels(
            placement.config,
            devices[0],
            documents=run.data.mask_documents,
            time_is_split=placement.mesh.context > 1,
        )
        return planning.compiled_section(TOPOLOGY.value, answer, limit, placement, device, kernels)

    model, found = planned_model(run), None
    check_multipliers(run, model)
    if SEARCH.value:
        placement, found = _search(run, model, count, device, devices and compiled, memory)
    else:
        placement = planning.Placement.of(model, run.mesh, count, run.train.batch_size, run.train.accumulation_steps)
    length = LENGTH.value or placement.config.block_size
    if length > placement.config.block_size:
        raise InputError(f'--decode_length={length} exceeds model.block_size={placement.config.block_size}')
    peak = PEAK_TFLOPS.value * 1e12 if PEAK_TFLOPS.value else device and device.peak_flops
    check_mesh(_planned_run(run, placement), dataclasses.asdict(placement.mesh), placement.config)
    estimate = memory(placement)
    plan = {'name': config_flags.get_config_filename(flags.FLAGS['config']), 'device_kind': kind}
    plan |= _recipe_section(run) | planning.model_section(placement, _training_tokens(run))
    plan['memory'] = planning.memory_section(placement, estimate, limit)
    plan['decode_cache'] = planning.cache_section(placement, BATCH.value, length)
    flops = plan['training_flops']['total']
    plan['cost'] = planning.cost_section(placement, flops, peak, MFU.value, DOLLARS.value)
    fits = limit is None or estimate.total <= limit
    if found:
        plan['search'] = found
    if devices:
        plan['compiled'] = found.pop('compiled') if found else compiled(placement)
        fits = plan['compiled']['fits']
        limit = plan['compiled']['available_bytes'] or limit
    if not fits and not found:
        changes, any_fits = planning.advice(placement, limit, memory)
        plan['advice'] = planning.advice_section(placement, changes, any_fits)
        if devices and VERIFY.value and any_fits:
            plan['advice']['verified'] = compiled(changes[0][0])
    print(json.dumps(plan, allow_nan=False) if JSON.value else planning.render(plan))


def _search(
    run: 'RunConfig',
    model: 'GPTConfig',
    count: int,
    device: 'Device | None',
    compiled: Callable[['planning.Placement'], dict[str, Any]] | None,
    memory: Callable[['planning.Placement'], 'planning.Memory'],
) -> tuple['planning.Placement', dict[str, Any]]:
    """The way to train that the compiler certified, or the estimate's best; and what was found on the way.

    `compiled` asks the compiler, at most `MOST_COMPILES` times; None: nothing is compiled.
    """
    from gpt_jax import planning
    from gpt_jax.training.step import check_mesh

    if device is None or device.memory_bandwidth is None:
        raise InputError(
            '--search needs devices that are known: --topology=h100:8, v5p:4x4x4, ..., or --devices with --device_kind'
        )
    started = time.monotonic()

    def trainable(placement: planning.Placement) -> planning.Memory:
        check_mesh(_planned_run(run, placement), dataclasses.asdict(placement.mesh), placement.config)
        return memory(placement)

    shape = planning.torus(TOPOLOGY.value) if TOPOLOGY.value else ()
    ranking, tried = planning.search(model, run.train.batch_size, count, device, trainable, shape)
    fits = ranking[0].memory.total <= device.memory_bytes
    found = planning.search_section(ranking, tried, fits, time.monotonic() - started)
    found |= {'certified': None, 'refused': [], 'compiled': None}
    place: int | None = 0
    while compiled is not None and place is not None and len(found['refused']) < MOST_COMPILES:
        section = compiled(ranking[place].placement)
        found['compiled'] = found['compiled'] or section
        verdict = {'flags': ranking[place].flags} | {
            key: section[key] for key in ('fits', 'needed_bytes', 'available_bytes')
        }
        if section['fits']:
            found |= {'certified': verdict, 'compiled': section}
            return ranking[place].placement, found
        found['refused'].append(verdict)
        place = planning.next_smaller(ranking, place, section['needed_bytes'], section['available_bytes'])
    return ranking[0].placement, found


def _planned_run(run: 'RunConfig', placement: 'planning.Placement') -> 'RunConfig':
    """The run with what a placement says of it."""
    train = dataclasses.replace(run.train, accumulation_steps=placement.accumulation_steps)
    return dataclasses.replace(run, mesh=placement.mesh, train=train)


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


def _moved(state: Any, placement: 'planning.Placement') -> Any:
    """An abstract state on the mesh of `placement`: its shapes are the same on each, and cost a second to find."""
    import jax

    from gpt_jax.parallel import make_abstract_mesh, tree_shardings

    shardings = tree_shardings(make_abstract_mesh(placement.mesh, placement.devices), state.params, state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )


def _lower_step(run: 'RunConfig', placement: 'planning.Placement', devices: 'Sequence[jax.Device]') -> Any:
    """The real training step, lowered for `devices`."""
    import optax

    from gpt_jax.models import GPT
    from gpt_jax.parallel import make_mesh
    from gpt_jax.training.optimizer import make_optimizer
    from gpt_jax.training.step import StepSettings, abstract_batch, make_train_step

    config, mesh = placement.config, make_mesh(placement.mesh, devices)
    schedule = optax.constant_schedule(run.optimizer.learning_rate)
    optimizer = make_optimizer(run.optimizer, schedule, run.precision.moments)
    count, settings = placement.accumulation_steps, StepSettings.of(run)
    step = make_train_step(GPT(config), optimizer, schedule, mesh, count, run.train.seed, settings)
    return step.lower(_abstract_state(run, placement, mesh), abstract_batch(run, config.block_size, mesh))


def _check_flags() -> None:
    if not 1e-6 <= MFU.value <= 1:
        raise InputError(
            f'--mfu={MFU.value} must be above 0 and at most 1, and not below 1e-6: it is a share of the peak'
        )
    for flag in (DEVICES, PEAK_TFLOPS, DOLLARS, BATCH, LENGTH):
        # Wider than anything real, and narrow enough that no product of them is infinite.
        if flag.value is not None and not 1e-9 <= flag.value <= 1e12:
            raise InputError(f'--{flag.name}={flag.value} must be above 0, and at most 1e12')
    if SEARCH.value and VERIFY.value:
        raise InputError('--search and --verify exclude each other: a search asks the compiler itself')
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
            'search',
            'verify',
            'json',
        ),
    )
