"""What a compiled program does on each device, read from its text (XLA's HLO): kernels, collectives, and a roofline.

A kernel is taken to be as slow as the slower of its two needs: the bytes that it reads and writes over the memory's
bandwidth, or its products over the peak. A collective costs what a device sends in a ring over the bandwidth of the
links that its group has. Both count as often as the loops around them turn. It is a model and not a measurement: small
kernels take longer than it says, no kernel reaches the whole peak, and collectives may run beside kernels.
(Williams et al. 2009, "Roofline"; what a ring sends: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce".)
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gpt_jax.parallel.devices import Device, ring_bandwidth

# Bits of a number of XLA's types; of one that is not here, its own digits ('s4', 'f8e4m3fn').
BITS = {'pred': 8, 'bf16': 16, 'c64': 64, 'token': 0, 'opaque': 0}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# What is no kernel: names for parts of buffers, the ends of what began elsewhere, and what only calls others.
FREE = frozenset(
    (
        'add-dependency',
        'after-all',
        'async-done',
        'async-start',
        'async-update',
        'bitcast',
        'call',
        'conditional',
        'constant',
        'get-tuple-element',
        'iota',
        'opt-barrier',
        'parameter',
        'partition-id',
        'replica-id',
        'tuple',
        'while',
    )
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """The computations that the attributes `keys` name."""
        return [name for key in keys for name in re.findall(rf'\b{key}=%?([\w.\-]+)', self.attributes)]


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices send each other, of one kind and among groups of one size.

    Attributes:
      kind: 'all-gather', ...
      devices: of a group, which are in it together.
      across_hosts: whether a group has devices of several hosts.
      count: how often a step does it.
      bytes: of the whole arrays that are gathered, reduced or sent, of all of them in a step.
      sent_bytes: that a device sends for them in a step.
      seconds: that this takes; None where the bandwidth is not known.
    """

    kind: str
    devices: int
    across_hosts: bool
    count: int
    bytes: int
    sent_bytes: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Program:
    """A step of training on each device.

    Attributes:
      kernels: launches, loops counted. This and the next three are of GPUs alone: on a TPU much of what a kernel reads
        never leaves the chip, and the text does not tell products plainly.
      memory_bytes: that kernels read and write.
      flops: of matrix products.
      kernel_seconds: the sum of all kernels' rooflines.
      collectives: by kind and group, those that send the most first.
      unknown_loops: whose turns the compiler does not tell; they count once.
    """

    kernels: int | None
    memory_bytes: int | None
    flops: int | None
    kernel_seconds: float | None
    collectives: tuple[Collective, ...]
    unknown_loops: int


def read_program(text: str, device: Device | None, devices: int, torus: Sequence[int] = ()) -> Program:
    """What the program does that `compiled.as_text()` gives.

    Args:
      text: the scheduled program of one device.
      device: what it runs on, as far as it is known.
      devices: of the whole program.
      torus: of a TPU slice, its chips along each axis.
    """
    computations, entry = parse(text)
    is_gpu = device is not None and device.per_host is not None
    kernels = memory_bytes = flops = 0
    seconds = 0.0
    found: dict[tuple, list[float]] = {}
    chained: set[tuple] = set()
    unknown = 0
    for instruction, inside, times, is_known in _executed(computations, entry):
        unknown += instruction.opcode == 'while' and not is_known
        shapes = {one.name: one.shape for one in computations[inside]}
        kind = instruction.opcode.removesuffix('-start').removesuffix('-done')
        if kind in COLLECTIVES:
            if instruction.opcode.endswith('-done'):
                continue
            # The TPU compiler spreads one over several kernels, each of which names it.
            channel = re.search(r'channel_id=(\d+)', instruction.attributes)
            if channel and 'chain_id' in instruction.attributes:
                key = (channel[1], times, kind)
                if key in chained:
                    continue
                chained.add(key)
            group = _first_group(instruction.attributes, devices)
            size = sum(_bytes(shapes.get(name, '')) for name in instruction.operands)
            if kind == 'all-reduce' and _is_cut(instruction, computations[inside]):
                kind = 'reduce-scatter'
            whole, sent = _volume(kind, size, len(group))
            per_host = device.per_host if is_gpu else devices
            hosts = len({member // per_host for member in group})
            bandwidth = device and ring_bandwidth(device, len(group), hosts, devices, torus)
            row = found.setdefault((kind, len(group), hosts > 1), [0, 0, 0, 0.0 if bandwidth else math.nan])
            for i, more in enumerate((1, whole, sent, sent / bandwidth if bandwidth else math.nan)):
                row[i] += more * times
        elif kind not in FREE and not instruction.opcode.endswith('-done'):
            size = _kernel_bytes(instruction, shapes, computations)
            work = _products(instruction, shapes, computations)
            kernels += times
            memory_bytes += size * times
            flops += work * times
            if is_gpu:
                seconds += max(size / device.memory_bandwidth, work / device.peak_flops) * times
    collectives = [
        Collective(*key, int(count), int(whole), int(sent), None if math.isnan(cost) else cost)
        for key, (count, whole, sent, cost) in found.items()
    ]
    collectives.sort(key=lambda one: -one.sent_bytes)
    of_kernels = (kernels, memory_bytes, flops, seconds) if is_gpu else (None,) * 4
    return Program(*of_kernels, tuple(collectives), unknown)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """All computations of a program by their names, and the name of the one that it begins with."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ''
    for line in text.splitlines():
        if head := re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and (found := re.match(r'\s+(ROOT )?%?([\w.\-]+) = ', line)):
            rest = line[found.end() :]
            shape = _balanced(rest) if rest.startswith('(') else rest.partition(' ')[0]
            opcode, _, _ = rest[len(shape) :].strip().partition('(')
            start = rest.index(f'{opcode}(', len(shape)) + len(opcode)
            operands = _balanced(rest[start:])
            attributes = rest[start + len(operands) :]
            names = re.findall(r'%([\w.\-]+)', operands)
            if opcode in ('parameter', 'constant'):
                names, attributes = [], operands
            computations[current].append(Instruction(found[2], shape, opcode, tuple(names), attributes, bool(found[1])))
    return computations, entry


def _balanced(text: str) -> str:
    """The start of `text`, from its first parenthesis to the one that closes it."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == '(') - (character == ')')
        if depth == 0:
            return text[: i + 1]
    return text


def _executed(
    computations: dict[str, list[Instruction]], name: str, times: int = 1, is_known: bool = True
) -> Iterator[tuple[Instruction, str, int, bool]]:
    """Each instruction that runs, the computation it stands in, how often, and whether that is known.

    Collectives inside of a fusion run as well; all else inside of it is one kernel.
    """
    for instruction in computations.get(name, ()):
        if instruction.opcode == 'while':
            trips = _trips(instruction, computations)
            yield instruction, name, times, is_known and trips is not None
            for body in instruction.called('body'):
                yield from _executed(computations, body, times * (trips or 1), is_known)
            continue
        yield instruction, name, times, is_known
        if instruction.opcode in ('call', 'conditional') or instruction.opcode.startswith('async-start'):
            keys = ('to_apply', 'calls', 'true_computation', 'false_computation')
            branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.attributes)
            inner = instruction.called(*keys) + re.findall(r'%([\w.\-]+)', branches[1] if branches else '')
            for called in inner:
                yield from _executed(computations, called, times, is_known)
        elif instruction.opcode == 'fusion':
            for called in instruction.called('calls'):
                for one, inside, count, known in _executed(computations, called, times, is_known):
                    if one.opcode.removesuffix('-start') in COLLECTIVES:
                        yield one, inside, count, known


def _is_cut(instruction: Instruction, computation: list[Instruction]) -> bool:
    """Whether an all-reduce is a reduce-scatter as the TPU compiler writes it: its kernel keeps a part of it alone."""
    return any(one.is_root and one.opcode == 'dynamic-slice' for one in computation if instruction.name in one.operands)


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often a loop turns: as the compiler tells, or by the one number that its condition compares with."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = [one for name in loop.called('condition') for one in computations.get(name, ())]
    limits = [one for one in condition if one.opcode == 'constant' and re.match(r'[su](32|64)\[\]', one.shape)]
    return int(limits[0].attributes.strip('()')) if len(limits) == 1 else None


def _dims(shape: str) -> list[int]:
    found = re.search(r'\[([\d,]*)\]', shape)
    return [int(size) for size in found[1].split(',') if size] if found else []


def _bytes(shape: str) -> int:
    """Of an array or a tuple of them, as HLO writes its type: 'bf16[16,2048]{1,0}'."""
    total = 0
    for kind, sizes in re.findall(r'\b([a-z]\w*)\[([\d,]*)\]', shape):
        bits = BITS.get(kind) or int(re.search(r'\d+', kind)[0]) if kind not in ('token', 'opaque') else 0
        total += math.prod(int(size) for size in sizes.split(',') if size) * bits // 8
    return total


def _kernel_bytes(instruction: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]) -> int:
    """Bytes that a kernel reads and writes: its operands and results, and of those that it only cuts, the cuts."""
    called = instruction.called('calls') if instruction.opcode == 'fusion' else []
    inner = computations.get(called[0], []) if called else []
    inner_shapes = {one.name: one.shape for one in inner}
    written = _bytes(instruction.shape)
    for one in inner:
        if one.is_root and one.opcode == 'dynamic-update-slice':  # in place: what is put there is read and written
            written = 2 * _bytes(inner_shapes[one.operands[1]])
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * _bytes(shapes.get(instruction.operands[1], ''))
    if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
        return 2 * written
    parameters = {int(one.attributes.strip('()')): one.name for one in inner if one.opcode == 'parameter'}
    read = 0
    for number, operand in enumerate(instruction.operands):
        users = [one for one in inner if parameters.get(number) in one.operands]
        if users and all(one.opcode in ('dynamic-slice', 'slice', 'gather') for one in users):
            read += sum(_bytes(one.shape) for one in users)
        elif not (users and all(one.opcode == 'dynamic-update-slice' for one in users)):
            read += _bytes(shapes.get(operand, ''))
    return written + read


def _products(instruction: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]) -> int:
    """Floating-point operations of the matrix products in a kernel."""
    if instruction.opcode == 'fusion':
        inner = [one for called in instruction.called('calls') for one in computations.get(called, ())]
        inner_shapes = {one.name: one.shape for one in inner}
        return sum(_products(one, inner_shapes, computations) for one in inner)
    if instruction.opcode == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
        left = _dims(shapes.get(instruction.operands[0], ''))
        return 2 * math.prod(_dims(instruction.shape)) * math.prod(left[int(i)] for i in contracted[1].split(',') if i)
    if instruction.opcode != 'custom-call':
        return 0
    if '__cublas$' in instruction.attributes:
        left = _dims(shapes.get(instruction.operands[0], ''))
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        depth = math.prod(left[int(i)] for i in re.findall(r'\d+', contracted[1])) if contracted else 0
        return 2 * math.prod(_dims(instruction.shape)) * depth
    if '__cudnn$fmha' in instruction.attributes:
        batch, time, heads, width = _dims(shapes.get(instruction.operands[0], '')) or (0, 0, 0, 0)
        window = re.search(r'"sliding_window_length": ?"?(\d+)', instruction.attributes)
        keys = min(time / 2, int(window[1]) if window and int(window[1]) else time)  # a mask hides half of them
        products = 5 if 'fmhaSoftmaxBackward' in instruction.attributes else 2
        return int(products * 2 * batch * heads * time * keys * width)
    return 0


def _volume(kind: str, operands: int, devices: int) -> tuple[int, int]:
    """Bytes of the whole array of a collective, and those that a device sends in a ring, by its operands' bytes."""
    if kind == 'all-gather':
        return operands * devices, operands * (devices - 1)
    if kind == 'collective-permute':
        return operands, operands
    rounds = 2 if kind == 'all-reduce' else 1
    return operands, rounds * operands * (devices - 1) // devices


def _first_group(attributes: str, devices: int) -> list[int]:
    """The devices of the first group of a collective, in each of the forms that XLA writes them in."""
    if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', attributes):
        return [int(pairs[1]), int(pairs[2])]
    if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
        return [int(member) for member in listed[1].split(',')]
    if found := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
        return _iota(found[2], found[3]).reshape(_list(found[1]))[0].tolist()
    mesh = r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}'
    if found := re.search(mesh, attributes):
        axes = re.findall(r"'(\w+)'=(\d+)", found[1])
        sizes = [int(size) for _, size in axes]
        ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(sizes))
        chosen = re.findall(r"'(\w+)'", found[4])
        index = tuple(slice(None) if name in chosen else 0 for name, _ in axes)
        return ids.reshape(sizes)[index].reshape(-1).tolist()
    return list(range(devices))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """XLA's short form of a list of devices: counted up over `dims`, which are then transposed to `order`."""
    ids = np.arange(math.prod(_list(dims))).reshape(_list(dims))
    return ids.transpose(_list(order) if order else range(ids.ndim))


def _list(text: str) -> list[int]:
    return [int(number) for number in text.split(',')]
