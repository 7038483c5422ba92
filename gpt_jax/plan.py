"""Plan a training before it is started: recipe, parameters, arithmetic, memory, time and cost.

    python -m gpt_jax.plan --config=configs/gpt3.py:13b --devices=256 --device_kind='TPU v5p' --config.mesh.fsdp=256

Nothing is trained and nothing large is allocated. With --topology=v5p:8x8x8 the real training step is compiled by the
TPU compiler, without a TPU (pip install -e '.[tpu-aot]'): what it says of memory is no estimate.
"""

import json

from absl import flags
from ml_collections import config_flags

from gpt_jax import cli
from gpt_jax.errors import InputError

CONFIG = config_flags.DEFINE_config_file('config', None, 'path to config file.')
DEVICES = flags.DEFINE_integer('devices', None, "devices to plan for (default: the topology's, else 1)")
DEVICE_KIND = flags.DEFINE_string('device_kind', None, "what they are, as jax calls them: 'NVIDIA H100 80GB HBM3', ...")
PEAK_TFLOPS = flags.DEFINE_float('peak_tflops', None, 'dense bf16 peak of a device, in TFLOP/s (default: of its kind)')
MFU = flags.DEFINE_float('mfu', 0.4, 'share of the peak that training uses, above 0 and at most 1; assumed')
DOLLARS = flags.DEFINE_float('dollars_per_device_hour', None, 'price of one device for an hour')
BATCH = flags.DEFINE_integer('decode_batch', 1, 'sequences of the key-value cache')
LENGTH = flags.DEFINE_integer('decode_length', None, 'tokens of the key-value cache (default: model.block_size)')
TOPOLOGY = flags.DEFINE_string('topology', None, 'TPUs to compile the training step for, such as v5p:8x8x8')
VERIFY = flags.DEFINE_bool('verify', False, 'with --topology: compile the first change that is proposed, too')
JSON = flags.DEFINE_bool('json', False, 'print one JSON object')


def main() -> None:
    """Plans and prints."""
    config = cli.read_config(CONFIG)
    _check_flags()
    import jax

    # Nothing is run: devices that are here stay free for others.
    jax.config.update('jax_platforms', 'cpu')
    from gpt_jax import planning
    from gpt_jax.training import plans, prefer_overrides, resolve

    prefer_overrides(config, config_flags.get_override_values(flags.FLAGS['config']))
    run = resolve(config)
    devices = planning.topology_devices(TOPOLOGY.value) if TOPOLOGY.value else None
    count = DEVICES.value or (len(devices) if devices else 1)
    if devices and count != len(devices):
        raise InputError(f'--devices={count}, but --topology={TOPOLOGY.value} has {len(devices)}; leave --devices out')
    kind = devices[0].device_kind if devices else DEVICE_KIND.value
    device = planning.find_device(kind, known=devices is None)
    setup = planning.Setup.of(
        plans.model_config(run), run.mesh, count, run.train.batch_size, run.train.accumulation_steps
    )

    def memory(setup: planning.Setup) -> planning.Memory:
        return planning.setup_memory(setup, plans.abstract_state_of(run, setup.config, setup.mesh))

    length = LENGTH.value or setup.config.block_size
    if length > setup.config.block_size:
        raise InputError(f'--decode_length={length} exceeds model.block_size={setup.config.block_size}')
    peak = PEAK_TFLOPS.value * 1e12 if PEAK_TFLOPS.value else device and device.peak_flops
    limit = device and device.memory_bytes
    estimate = memory(setup)
    plan = {'name': config_flags.get_config_filename(flags.FLAGS['config']), 'device_kind': kind}
    plan |= plans.recipe_section(run) | planning.model_section(setup, plans.training_tokens(run))
    plan['memory'] = planning.memory_section(setup, estimate, limit)
    plan['decode_cache'] = planning.cache_section(setup, BATCH.value, length)
    flops = plan['training_flops']['total']
    plan['cost'] = planning.cost_section(setup, flops, peak, MFU.value, DOLLARS.value)
    fits = limit is None or estimate.total <= limit
    if devices:
        plan['compiled'] = planning.compiled_section(TOPOLOGY.value, _compile(run, setup, devices))
        fits = plan['compiled']['fits']
        limit = plan['compiled']['available_bytes'] or limit
    if not fits:
        found, any_fits = planning.advice(setup, limit, memory)
        plan['advice'] = planning.advice_section(setup, found, any_fits)
        if devices and VERIFY.value and any_fits:
            verified = planning.compiled_section(TOPOLOGY.value, _compile(run, found[0][0], devices))
            plan['advice']['verified'] = verified
    print(json.dumps(plan) if JSON.value else planning.render(plan))


def _compile(run, setup, devices):
    from gpt_jax import planning
    from gpt_jax.training import plans

    return planning.compile_step(
        lambda: plans.lower_step(run, setup.config, setup.mesh, setup.accumulation_steps, devices)
    )


def _check_flags() -> None:
    if not 0 < MFU.value <= 1:
        raise InputError(f'--mfu={MFU.value} must be above 0 and at most 1: it is a share of the peak')
    for flag in (DEVICES, PEAK_TFLOPS, DOLLARS, BATCH, LENGTH):
        if flag.value is not None and not 0 < flag.value < float('inf'):
            raise InputError(f'--{flag.name}={flag.value} must be above 0')
    if VERIFY.value and not TOPOLOGY.value:
        raise InputError('--verify needs --topology: it is the TPU compiler that verifies')


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
