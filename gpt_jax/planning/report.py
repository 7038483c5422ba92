"""What a plan says: as nested dicts of numbers whose names carry the unit, and as plain text of about a screen."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.models.config import causal_flops_per_token, parameters_by_part, training_flops_per_token
from gpt_jax.parallel.devices import Device
from gpt_jax.planning.cost import cache_bytes, training_cost
from gpt_jax.planning.memory import Memory, Placement
from gpt_jax.planning.program import read_program
from gpt_jax.planning.search import Candidate
from gpt_jax.planning.topology import Compiled, describe, topology_compiler, torus

GIB, MIB = 2**30, 2**20
SHOWN = 8  # of a search
LABEL_WIDTH, VALUE_WIDTH = 28, 20

Plan = Mapping[str, Any]


def model_section(placement: Placement, tokens: int | None) -> dict[str, Any]:
    """Counts of parameters and of arithmetic."""
    config = placement.config
    parts = parameters_by_part(config)
    embeddings = parts['token embedding'] + parts['position embedding']
    flops = training_flops_per_token(config)
    return {
        'parameters': {
            'total': config.num_parameters,
            'non_embedding': config.num_parameters - embeddings,
            'parts': parts,
        },
        'training_flops': {
            'per_token': flops,
            'per_token_causal': causal_flops_per_token(config),
            'tokens': tokens,
            'total': None if tokens is None else flops * tokens,
        },
    }


def memory_section(placement: Placement, memory: Memory, limit: int | None) -> dict[str, Any]:
    """Bytes on one device."""
    return {
        'devices': placement.devices,
        'mesh': {axis: getattr(placement.mesh, axis) for axis in ('data', 'fsdp', 'tensor', 'context')},
        'rows_per_device': placement.rows,
        'accumulation_steps': placement.accumulation_steps,
        'remat': placement.config.remat,
        'compute': placement.config.compute_dtype,
        'parameters_bytes': memory.parameters,
        'optimizer_bytes': memory.optimizer,
        'gradients_bytes': memory.gradients,
        'kept_activations_bytes': memory.kept,
        'working_bytes': memory.working,
        'batch_bytes': memory.batch,
        'overlap_bytes': memory.overlap,
        'total_bytes': memory.total,
        'device_bytes': limit,
    }


def cache_section(placement: Placement, batch: int, length: int) -> dict[str, Any]:
    """Bytes of the key-value cache in decoding."""
    banded, dense = cache_bytes(placement.config, batch, length)
    return {'batch': batch, 'length': length, 'bytes': banded, 'dense_bytes': dense}


def cost_section(
    placement: Placement, flops: float | None, peak_flops: float | None, mfu: float, dollars_per_hour: float | None
) -> dict[str, Any] | None:
    """Time and money; None where the arithmetic or the devices' peak is not known."""
    if flops is None or peak_flops is None:
        return None
    cost = training_cost(flops, placement.devices, peak_flops, mfu, dollars_per_hour)
    given = {'peak_flops_per_second': peak_flops, 'mfu': mfu, 'dollars_per_device_hour': dollars_per_hour}
    return dataclasses.asdict(cost) | given


def compiled_section(
    topology: str,
    compiled: Compiled,
    limit: int | None,
    placement: Placement,
    device: Device | None,
    attention: Sequence[str],
) -> dict[str, Any]:
    """What the compiler said, in bytes on each device; where it did not refuse, held against `limit`.

    With the kernels that `attention` was given (`models.attention_kernels`), and with `program`, what the compiled step
    does: its collectives, and on GPUs its kernels and a roofline.
    """
    sizes = {f'{name}_bytes': size for name, size in dataclasses.asdict(compiled).items() if name != 'text'}
    if compiled.available is None and limit is not None and compiled.needed > limit:
        sizes['available_bytes'] = limit
    compiler = f'the {topology_compiler(topology).upper()} compiler'
    devices = describe(topology, placement.devices)
    section = {'topology': topology, 'devices': devices, 'compiler': compiler, 'fits': sizes['available_bytes'] is None}
    section['attention'] = list(attention)
    return section | sizes | {'program': _program_section(topology, compiled.text, placement, device)}


def _program_section(
    topology: str, text: str | None, placement: Placement, device: Device | None
) -> dict[str, Any] | None:
    if text is None:
        return None
    program = read_program(text, device, placement.devices, torus(topology))
    found = dataclasses.asdict(program) | {'step_seconds': None, 'tokens_per_second': None, 'mfu': None}
    if program.kernel_seconds is not None:
        seconds = program.kernel_seconds + sum(one.seconds or 0.0 for one in program.collectives)
        tokens = placement.batch_size * placement.config.block_size
        flops = training_flops_per_token(placement.config) * tokens / placement.devices
        found |= {
            'step_seconds': seconds,
            'tokens_per_second': tokens / seconds,
            'mfu': flops / seconds / device.peak_flops,
        }
    return found


def search_section(ranking: Sequence[Candidate], tried: int, fits: bool, seconds: float) -> dict[str, Any]:
    """The best of a search by the estimates, and how many were tried."""
    best = [
        {
            'flags': one.flags,
            'mesh': dataclasses.asdict(one.placement.mesh),
            'remat': one.placement.config.remat,
            'accumulation_steps': one.placement.accumulation_steps,
            'rows_per_device': one.placement.rows,
            'total_bytes': one.memory.total,
            'step_seconds': one.time.total,
            'tokens_per_second': one.placement.batch_size * one.placement.config.block_size / one.time.total,
            'seconds': {name: getattr(one.time, name) for name in ('products', 'memory', 'beside', 'waiting')},
            'mfu': one.time.mfu,
        }
        for one in ranking[:SHOWN]
    ]
    return {'tried': tried, 'fitting': len(ranking) if fits else 0, 'fits': fits, 'seconds': seconds, 'best': best}


def advice_section(placement: Placement, found: list[tuple[Placement, Memory]], fits: bool) -> dict[str, Any]:
    """Changes that would make it fit by the estimate, or the smallest that they can make it."""
    changes = [
        {'flags': changed.flags(placement), 'total_bytes': memory.total, 'rows_per_device': changed.rows}
        for changed, memory in found
    ]
    return {'fits': fits, 'changes': changes}


def render(plan: Plan) -> str:
    """The sections of a plan (see above), one below the other."""
    sections = (_recipe, _parameters, _arithmetic, _memory, _cache, _cost, _search, _compiled, _program, _advice)
    return '\n\n'.join('\n'.join(lines) for section in sections if (lines := section(plan)))


def size(count: int) -> str:
    """Bytes as GiB, or as MiB where they are few."""
    return f'{count / GIB:,.2f} GiB' if abs(count) >= GIB / 10 else f'{count / MIB:,.2f} MiB'


def _row(label: str, value: str, note: str = '') -> str:
    return f'  {label:<{LABEL_WIDTH}} {value:>{VALUE_WIDTH}}  {note}'.rstrip()


def _plain(value: Any) -> str:
    if value is None:
        return 'not published'
    if isinstance(value, int):
        return f'{value:,}'
    return f'{value:g}' if isinstance(value, float) else str(value)


def _recipe(plan: Plan) -> list[str]:
    rows = [_row(name, _plain(entry['value']), entry['source']) for name, entry in plan['recipe'].items()]
    notes = [f'  Note: {note}' for note in plan['notes']]
    return [f'Recipe: {plan["name"]}', *rows, *notes]


def _parameters(plan: Plan) -> list[str]:
    found = plan['parameters']
    total = found['total']
    parts = [_row(f'  {part}', f'{count:,}', f'{count / total:.1%}') for part, count in found['parts'].items()]
    without = _row('total without embeddings', f'{found["non_embedding"]:,}')
    return ['Parameters', _row('total', f'{total:,}'), without, *parts]


def _arithmetic(plan: Plan) -> list[str]:
    found = plan['training_flops']
    rule = '6 N + 12 D x keys of each layer: T if dense, else the mean of min(t, band)'
    rows = [
        _row('a token', f'{found["per_token"]:.4g} FLOP', rule),
        _row('a token, unmasked work alone', f'{found["per_token_causal"]:.4g} FLOP', 'half of T in a dense layer'),
    ]
    if found['total'] is None:
        rows.append(_row('in all', 'unknown', 'the run is given in epochs; give --config.train.tokens'))
    else:
        rows.append(_row('in all', f'{found["total"]:.4g} FLOP', f'{found["tokens"]:,} tokens'))
    return ['Arithmetic of training', *rows]


def _memory(plan: Plan) -> list[str]:
    found = plan['memory']
    mesh = ' x '.join(f'{axis} {count}' for axis, count in found['mesh'].items() if count > 1) or 'alone'
    rows = f'{found["rows_per_device"]:,} sequences at once, {found["accumulation_steps"]:,} times a step'
    parts = (
        ('parameters', 'parameters_bytes', 'as precision.params'),
        ('optimizer', 'optimizer_bytes', "Adam's two moments, as precision.moments, and the average"),
        ('gradients', 'gradients_bytes', 'float32; with micro-batches the sum and the newest'),
        ('activations kept', 'kept_activations_bytes', f'{found["compute"]}, remat {found["remat"]}; {rows}'),
        ('working memory', 'working_bytes', "one layer's backward pass, or the logits of a chunk"),
        ('batch', 'batch_bytes', 'token ids'),
        ('never at once', 'overlap_bytes', 'gradients that come when activations have gone'),
    )
    total, limit = found['total_bytes'], found['device_bytes']
    share = '' if limit is None else f'{total / limit:.0%} of the {size(limit)} of a {plan["device_kind"]}'
    lines = [_row(label, size(found[key]), note) for label, key, note in parts if key != 'overlap_bytes' or found[key]]
    count = f'{found["devices"]:,} devices' if found['devices'] > 1 else '1 device'
    return [f'Memory of a device in training, estimated ({count}: {mesh})', *lines, _row('total', size(total), share)]


def _cache(plan: Plan) -> list[str]:
    found = plan['decode_cache']
    note = f'{size(found["dense_bytes"])} if all layers were dense' if found['dense_bytes'] != found['bytes'] else ''
    label = f'{found["batch"]:,} x {found["length"]:,} tokens'
    return ['Key-value cache of decoding', _row(label, size(found['bytes']), note)]


def _cost(plan: Plan) -> list[str]:
    found = plan['cost']
    if found is None:
        return ['Time', '  unknown: give --device_kind or --peak_tflops, and the length in steps or tokens']
    peak = (
        f'{found["peak_flops_per_second"] / 1e12:,.6g} TFLOP/s a device, of which {found["mfu"]:.0%} are used (--mfu)'
    )
    rows = [
        _row('wall time', f'{found["days"]:,.2f} days', peak),
        _row('use', f'{found["device_hours"]:,.0f} device hours'),
    ]
    if found['dollars'] is not None:
        rows.append(
            _row('cost', f'{found["dollars"]:,.0f} USD', f'{found["dollars_per_device_hour"]:g} USD a device hour')
        )
    return [f'Time on {plan["memory"]["devices"]:,} devices', *rows]


def _compiled(plan: Plan) -> list[str]:
    found = plan.get('compiled')
    if found is None:
        return []
    title = f'Memory of a device, by {found["compiler"]} ({found["topology"]}, {found["devices"]})'
    kernels = _row('attention', ' and '.join(found['attention']))
    if found['fits']:
        rows = [_row(name, size(found[f'{name}_bytes'])) for name in ('arguments', 'outputs', 'temporaries')]
        return [title, *rows, _row('total', size(found['needed_bytes']), 'it fits'), kernels]
    what = 'temporaries alone' if found['temporaries_bytes'] else 'total'
    return [title, _row(what, size(found['needed_bytes']), _verdict(found)), kernels]


def _program(plan: Plan) -> list[str]:
    found = (plan.get('compiled') or {}).get('program')
    if found is None:
        return []
    lines = ['What a device sends in a step, by the compiled program']
    for one in found['collectives']:
        where = f'among {one["devices"]:,}' + (', over hosts' if one['across_hosts'] else '')
        time = '' if one['seconds'] is None else f'{one["seconds"] * 1e3:,.2f} ms at full bandwidth'
        label = f'{one["kind"]} {where}'
        lines.append(_row(label, f'{size(one["sent_bytes"])}', f'{one["count"]:,} times; {time}'.rstrip('; ')))
    if not found['collectives']:
        lines.append('  nothing')
    if found['step_seconds'] is not None:
        sending = sum(one['seconds'] for one in found['collectives'])
        rows = (
            ('kernels', f'{found["kernels"]:,}', f'{size(found["memory_bytes"])} read and written'),
            ('products', f'{found["flops"]:.4g} FLOP', ''),
            (
                'kernels at their roofline',
                f'{found["kernel_seconds"] * 1e3:,.1f} ms',
                'the slower of bytes and products',
            ),
            ('collectives', f'{sending * 1e3:,.1f} ms', 'none beside a kernel'),
            ('a step', f'{found["step_seconds"] * 1e3:,.1f} ms', f'{found["tokens_per_second"]:,.0f} tokens/s'),
            ('MFU', f'{found["mfu"]:.1%}', 'by 6 N + 12 L D T'),
        )
        lines += ['', 'Roofline of the compiled step: a model, not a measurement', *(_row(*row) for row in rows)]
    if found['unknown_loops']:
        lines.append(f'  {found["unknown_loops"]} loops of unknown length count once.')
    return lines


def _search(plan: Plan) -> list[str]:
    found = plan.get('search')
    if found is None:
        return []
    title = f'{found["tried"]:,} ways to train were tried, {found["fitting"]:,} fit by the estimate'
    if not found['fits']:
        return [f'{title}: take more devices, or a smaller model. The smallest is', *_ranking(found['best'])]
    lines = [f'{title}; the fastest, by a model of time and not a measurement:', *_ranking(found['best'])]
    for number, refused in enumerate(found['refused'], 1):
        lines.append(f'  Refused ({number}): {refused["flags"]}')
        lines.append(f'    {_verdict(refused)}')
    certified = found['certified']
    if certified is None:
        why = 'no compiler was asked (--topology)' if not found['refused'] else 'the compiler took none of them'
        return [*lines, '', f'To paste ({why}):', f'  {found["best"][0]["flags"]}']
    return [*lines, '', f'To paste (compiled: {_verdict(certified)}):', f'  {certified["flags"]}']


def _ranking(best: Sequence[Plan]) -> list[str]:
    lines = ['     ms a step    tokens/s    MFU      memory  remat  micro-batches  mesh']
    for one in best:
        mesh = ' x '.join(f'{axis} {count}' for axis, count in one['mesh'].items() if count > 1) or 'alone'
        lines.append(
            f'  {one["step_seconds"] * 1e3:12,.1f} {one["tokens_per_second"]:11,.0f}  {one["mfu"]:5.1%} '
            f'{size(one["total_bytes"]):>11}  {one["remat"]:<5}  {one["accumulation_steps"]:>13,}  {mesh}'
        )
    return lines


def _verdict(found: Plan) -> str:
    if found['fits']:
        return f'it fits, with {size(found["needed_bytes"])}'
    over = size(found['needed_bytes'] - found['available_bytes'])
    return f'does not fit: there are {size(found["available_bytes"])}, {over} too few'


def _advice(plan: Plan) -> list[str]:
    found = plan.get('advice')
    if found is None:
        return []
    if not found['changes']:
        return ['No change of remat, mesh or micro-batches is left that makes it smaller: take more devices.']
    rows = [f'  {size(change["total_bytes"]):>12}  {change["flags"]}' for change in found['changes']]
    if not found['fits']:
        return ['By the estimate nothing fits on these devices: take more of them. The smallest is', *rows]
    checked = []
    if 'verified' in found:
        checked = [f'  The first, by {found["verified"]["compiler"]}: {_verdict(found["verified"])}.']
    return ['What would fit, by the estimate', *rows, *checked]
