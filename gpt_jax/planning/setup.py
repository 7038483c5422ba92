"""What is planned: a model, the devices that it trains on, and the changes that would make it smaller."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig
from gpt_jax.parallel import MeshConfig, axis_sizes
from gpt_jax.planning.memory import Memory, training_memory


@dataclasses.dataclass(frozen=True)
class Setup:
    """One way to train a model.

    Attributes:
      config: the model.
      mesh: devices along each axis, -1 filled in.
      batch_size: sequences a step, over all devices.
      accumulation_steps: micro-batches that a step is cut into.

    Raises:
      InputError: the micro-batch cannot be divided over the mesh.
    """

    config: GPTConfig
    mesh: MeshConfig
    batch_size: int
    accumulation_steps: int

    def __post_init__(self):
        rows, rest = divmod(self.batch_size, self.accumulation_steps * self.split)
        if rest or not rows:
            raise InputError(
                f'train.batch_size={self.batch_size} in {self.accumulation_steps} micro-batches is not divisible by '
                f'the {self.split} devices of mesh.data={self.mesh.data} x mesh.fsdp={self.mesh.fsdp}; choose a '
                f'multiple, or another mesh'
            )

    @classmethod
    def of(cls, config: GPTConfig, mesh: MeshConfig, devices: int, batch_size: int, accumulation_steps: int) -> 'Setup':
        """A setup on so many devices; InputError where the mesh does not have them."""
        return cls(config, MeshConfig(**axis_sizes(mesh, devices)), batch_size, accumulation_steps)

    @property
    def split(self) -> int:
        """Devices that the rows of a batch are spread over."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def devices(self) -> int:
        """All devices of the mesh."""
        return self.split * self.mesh.tensor * self.mesh.context

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch on one device."""
        return self.batch_size // self.accumulation_steps // self.split

    def flags(self, before: 'Setup') -> str:
        """The command line that makes `before` this."""
        keys = {
            'model.remat': lambda s: s.config.remat,
            'mesh.data': lambda s: s.mesh.data,
            'mesh.fsdp': lambda s: s.mesh.fsdp,
            'train.accumulation_steps': lambda s: s.accumulation_steps,
        }
        changed = ((key, get(self)) for key, get in keys.items() if get(self) != get(before))
        return ' '.join(f'--config.{key}={value}' for key, value in changed)


def setup_memory(setup: Setup, state: Any, cpu: bool = False) -> Memory:
    """The estimate for one device; `state` is the training state (`params`, `opt_state`) as sharded shapes."""
    mesh = dataclasses.asdict(setup.mesh)
    return training_memory(
        setup.config, state.params, state.opt_state, mesh, setup.batch_size, setup.accumulation_steps, cpu
    )


def smaller(setup: Setup) -> Iterator[Setup]:
    """Setups of the same training that take less memory: rematerialisation, more of fsdp, smaller micro-batches."""
    meshes = [setup.mesh]
    if setup.mesh.data > 1 and setup.config.d_model % setup.split == 0:
        meshes.append(dataclasses.replace(setup.mesh, data=1, fsdp=setup.split))
    remats = {'none': ('none', 'names', 'full'), 'full': ('full',)}.get(
        setup.config.remat, (setup.config.remat, 'full')
    )
    rows = setup.batch_size // setup.split
    doubled = [setup.accumulation_steps * 2**power for power in range(rows.bit_length())]
    steps = [count for count in (*doubled, rows) if rows % count == 0]
    for mesh in meshes:
        for count in steps:
            for remat in remats:
                config = dataclasses.replace(setup.config, remat=remat)
                changed = Setup(config, mesh, setup.batch_size, count)
                if changed != setup:
                    yield changed


def advice(setup: Setup, limit: int, memory: Callable[[Setup], Memory], count: int = 3) -> tuple[list, bool]:
    """The least changes after which the estimate is within `limit` bytes.

    Returns:
      Up to `count` pairs of setup and memory, fewest changes first, and True; or where none fits, the smallest, and
      False.
    """

    def effort(changed: Setup) -> tuple:
        # Recomputing less and fewer, larger micro-batches run faster.
        keys = changed.flags(setup).count('--')
        return keys, changed.accumulation_steps, ('none', 'names', 'dots', 'full').index(changed.config.remat)

    fit, tried = [], []
    for changed in sorted(set(smaller(setup)), key=effort):
        tried.append((changed, memory(changed)))
        if tried[-1][1].total <= limit:
            fit.append(tried[-1])
        if len(fit) == count:
            break
    if fit:
        return fit, True
    return sorted(tried, key=lambda pair: pair[1].total)[:1], False
