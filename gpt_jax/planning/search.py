"""Finding how a model trains fastest on given devices: mesh, rematerialisation and micro-batches, by estimate.

Tried is every mesh that the devices, the model and the batch allow, every policy of rematerialisation and every number
of micro-batches. What fits by the estimate of `memory` is ranked by the time of `cost.step_time`. The compiler has the
last word: it is asked for the first of the ranking, and where it refuses, for the next that is smaller by what was too
much (`next_smaller`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig
from gpt_jax.models.config import REMAT_POLICIES
from gpt_jax.parallel import MeshConfig
from gpt_jax.parallel.devices import Device
from gpt_jax.planning.cost import StepTime, step_time
from gpt_jax.planning.memory import Memory, Placement

# A row of a long context is worth splitting; shorter ones only make more to send.
LONG_CONTEXT = 8192
# Beyond that products get so narrow that no estimate here holds.
MOST_TENSOR = 16
# Rows of a TPU's tile of 16-bit numbers. Of parameters cut thinner the TPU compiler gathers parts by adding up whole
# matrices, most of them zeros: twice as much is sent (GPT-3 13B on 256 chips: 204 GB with parts of 20 of the 5,120
# rows, 103 GB with 80).
TPU_TILE_ROWS = 16
# An estimate is off by some per cent, and allocators need room: what comes closer is not asked for.
ROOM = 0.95
MOST_MICRO_BATCHES = 64


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to train, with what it takes by the estimates."""

    placement: Placement
    memory: Memory
    time: StepTime

    @property
    def flags(self) -> str:
        """The command line that makes it so."""
        p = self.placement
        keys = {f'mesh.{axis}': getattr(p.mesh, axis) for axis in ('data', 'fsdp', 'tensor', 'context')}
        keys |= {'model.remat': p.config.remat, 'train.accumulation_steps': p.accumulation_steps}
        return ' '.join(f'--config.{key}={value}' for key, value in keys.items())


def placements(config: GPTConfig, batch_size: int, devices: int, tile_rows: int = 1) -> Iterator[Placement]:
    """All ways to train a model with a batch of so many sequences on so many devices.

    fsdp leaves each device a multiple of `tile_rows` of a matrix's rows.
    """
    contexts = [1]
    if config.block_size >= LONG_CONTEXT:
        contexts += [size for size in (2, 4, 8, 16) if config.block_size % (2 * size) == 0]
    for tensor, context in itertools.product(_divisors(devices, MOST_TENSOR), contexts):
        if any(size % tensor for size in (config.n_head, config.d_mlp, config.padded_vocab_size)):
            continue
        rest = devices // (tensor * context)
        if devices % (tensor * context) or batch_size % rest:
            continue
        rows = batch_size // rest
        for fsdp in _divisors(rest, rest):
            if config.d_model % fsdp or (fsdp > 1 and config.d_model // fsdp % tile_rows):
                continue
            mesh = MeshConfig(rest // fsdp, fsdp, tensor, context)
            for steps, remat in itertools.product(_divisors(rows, MOST_MICRO_BATCHES), REMAT_POLICIES):
                yield Placement(dataclasses.replace(config, remat=remat), mesh, batch_size, steps)


def search(
    config: GPTConfig,
    batch_size: int,
    devices: int,
    device: Device,
    memory: Callable[[Placement], Memory],
    torus: Sequence[int] = (),
) -> tuple[list[Candidate], int]:
    """What fits, the fastest first, and the number of those that were tried; where none fits the smallest alone.

    Args:
      config, batch_size: what is trained.
      devices, device, torus: how many, what one is, and how TPUs are joined.
      memory: the estimate of a placement; raises InputError, with the reason, where it cannot be trained.

    Raises:
      InputError: there is no mesh at all, or none that can be trained.
    """
    tried, problem = [], None
    for placement in placements(config, batch_size, devices, 1 if device.per_host else TPU_TILE_ROWS):
        try:
            needed = memory(placement)
        except InputError as error:  # an axis that divides something else of the model, or another batch of the run
            problem = error
            continue
        tried.append(Candidate(placement, needed, step_time(placement, device, torus)))
    if not tried and problem is not None:
        # The last mesh has the most devices along tensor, and asks least of the batches that data and fsdp split.
        raise InputError(f'--search: none of the meshes of {devices} devices can train it. Of the last one: {problem}')
    if not tried:
        raise InputError(
            f'--search: no mesh of {devices} devices divides the batch of train.batch_size={batch_size} sequences and '
            f'the model (n_head={config.n_head}, d_model={config.d_model}); take another number of devices, or batch'
        )
    fitting = [one for one in tried if one.memory.total <= ROOM * device.memory_bytes]
    if not fitting:
        return [min(tried, key=lambda one: one.memory.total)], len(tried)
    # Of equal ones that which keeps more of what is done once, and has the plainer mesh.
    order = [(one.time.total, one.placement.accumulation_steps, one.placement.mesh.tensor) for one in fitting]
    return [fitting[i] for i in sorted(range(len(fitting)), key=order.__getitem__)], len(tried)


def next_smaller(ranking: Sequence[Candidate], refused: int, needed: int, available: int) -> int | None:
    """After the compiler refused a candidate, the place of the next one that it should take; None where there is none.

    What it said to need, beside the estimate, tells by how much the estimates of the others are too small.
    """
    excess = max(1.0, needed / ranking[refused].memory.total)
    for place in range(refused + 1, len(ranking)):
        total = ranking[place].memory.total
        if total * excess <= available and total < ranking[refused].memory.total:
            return place
    return None


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
