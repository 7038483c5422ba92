"""How a run lies on its devices, before anything is allocated: every array of the state, and the activations."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from gpt_jax.config import RunConfig
from gpt_jax.models import GPT, GPTConfig
from gpt_jax.parallel import logical_spec, path_name, recorded_activations
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.step import StepSettings, abstract_batch, abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Line:
    """One array: its shape, the mesh axes that split each dimension, and the bytes of one device's part."""

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes_per_device: int

    @property
    def partition(self) -> str:
        """'tensor, -' for an array whose rows are split along the axis tensor."""
        axes = [*self.spec, *(None for _ in range(len(self.shape) - len(self.spec)))]
        names = ('-' if a is None else a if isinstance(a, str) else '+'.join(a) for a in axes)
        return ', '.join(names) or '-'


def layout(run: RunConfig, config: GPTConfig, mesh: Mesh) -> dict[str, list[Line]]:
    """What a training step on `mesh` holds: `parameters`, `optimizer`, `batch` and `activations`.

    Activations are those that the model names to the mesh, each once, whatever layers there are; the step is traced for
    them and not compiled.

    Raises:
      InputError: a parameter cannot be divided over the mesh.
    """
    model, schedule = GPT(config), optax.constant_schedule(run.optimizer.learning_rate)
    settings = StepSettings.of(run)
    optimizer = make_optimizer(run.optimizer, schedule, run.precision.moments, run.train.seed)
    state = abstract_state(model, optimizer, mesh, settings)
    batch = abstract_batch(run, config.block_size, mesh)
    step = make_train_step(model, optimizer, schedule, mesh, run.train.accumulation_steps, run.train.seed, settings)
    with recorded_activations() as found:
        step.trace(state, batch)
    activations = (
        Line(a.called, a.shape, logical_spec(*a.names), math.prod(a.local_shape) * jnp.dtype(a.dtype).itemsize)
        for a in found
    )
    return {
        'parameters': list(_lines(state.params)),
        'optimizer': list(_lines(state.optimizer | ({} if state.ema is None else {'ema': state.ema}))),
        'batch': list(_lines(batch)),
        'activations': list(dict.fromkeys(activations)),
    }


def _lines(tree: Any) -> Iterable[Line]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        count = math.prod(leaf.sharding.shard_shape(leaf.shape))
        yield Line(path_name(path), leaf.shape, leaf.sharding.spec, count * leaf.dtype.itemsize)


# What the parts of the table say of themselves, and whether it means something to add their bytes up.
HEADINGS = {
    'parameters': ('parameter', True),
    'optimizer': ('optimizer state', True),
    'batch': ('batch', True),
    'activations': ('activation (of a layer, or of the ends)', False),
}


def render(sections: dict[str, Sequence[Line]], mesh: Mesh) -> str:
    """The table as text, with totals."""
    rows, totals = [], 0
    for section, lines in sections.items():
        heading, has_total = HEADINGS[section]
        rows += [(heading, 'shape', 'partition', 'bytes per device')]
        rows += [
            (line.name, ' x '.join(map(str, line.shape)) or '-', line.partition, f'{line.bytes_per_device:,}')
            for line in lines
        ]
        total = sum(line.bytes_per_device for line in lines)
        rows += [('total', '', '', f'{total:,}')] * has_total + [('', '', '', '')]
        totals += total * has_total
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    text = '\n'.join(
        f'{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:{widths[2]}}  {row[3]:>{widths[3]}}'.rstrip()
        for row in rows
    )
    sizes = ', '.join(f'mesh.{axis}={size}' for axis, size in mesh.shape.items())
    device = mesh.devices.flat[0]
    return (
        f'{mesh.size} {device.platform} device(s): {sizes}\n\n{text}\n'
        f'parameters, optimizer state and batch: {totals:,} bytes on each device. Gradients take as much as the '
        'parameters; how many activations are kept at a time, python -m gpt_jax.plan estimates.'
    )
