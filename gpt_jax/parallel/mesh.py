"""The four-axis device mesh, and the constraints that keep activations on it.

Model code names the *logical* dimensions of an array (`constrain(x_BTD, 'batch', 'time', 'embed')`); this file alone
maps them to mesh axes. Without an active mesh a constraint is a no-op, so a model runs unchanged on one device.
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_jax.config import MeshConfig
from gpt_jax.errors import InputError, printable

AXES = ('data', 'fsdp', 'tensor', 'context')

# The batch is split over both data axes: 'fsdp' is data parallelism whose parameters are split as well.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    'batch': ('data', 'fsdp'),
    'time': 'context',
    'heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
    'embed': None,
    'head_dim': None,
    # The model dimension of a parameter, and the copies of one: one for each device that has tokens of its own.
    'embed_parameter': 'fsdp',
    'copy': ('data', 'fsdp', 'context'),
}

_active_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar('gpt_jax_mesh', default=None)
_inside_per_device: contextvars.ContextVar[bool] = contextvars.ContextVar('gpt_jax_per_device', default=False)
_recorded: contextvars.ContextVar[list['Activation'] | None] = contextvars.ContextVar('gpt_jax_recorded', default=None)


@dataclasses.dataclass(frozen=True)
class Activation:
    """An array that `constrain` was asked about: what it is called, its logical names, and its parts.

    Attributes:
      called: what it is, or ''.
      names: the logical name of each dimension.
      shape: of the whole array.
      local_shape: of one device's part.
      dtype: of its numbers.
    """

    called: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: Any


def parse_mesh(text: str) -> MeshConfig:
    """A mesh as a flag gives it: 'fsdp:8,tensor:2' -> MeshConfig(data=1, fsdp=8, tensor=2, context=1).

    An axis that is not named has size 1; one may be -1, whatever the others leave.

    Raises:
      InputError: the text is no such list, names an axis twice, or `context`: decoding goes token by token.
    """
    way_out = 'write it as --mesh=fsdp:8,tensor:2, with sizes of data, fsdp and tensor'
    sizes: dict[str, int] = {}
    for part in text.split(','):
        axis, _, size = (word.strip() for word in part.partition(':'))
        if axis not in AXES or axis in sizes or not re.fullmatch(r'-1|[1-9][0-9]{0,8}', size):
            raise InputError(
                f'--mesh={printable(text, 80)}: {printable(part.strip(), 80)!r} is not a new axis with its number of '
                f'devices; {way_out}'
            )
        sizes[axis] = int(size)
    if sizes.get('context', 1) != 1:
        raise InputError(
            f'--mesh={text}: context splits the tokens of a text over devices, which training alone does; {way_out}'
        )
    return MeshConfig(**dict.fromkeys(AXES, 1) | sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: every device of every process) with the four `AXES`, in that order.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or more than one of them is -1.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    # Explicit axes, today's default, make linen modules fail: the compiler is to propagate what we constrain.
    settings = {'axis_names': AXES, 'axis_types': (AxisType.Auto,) * len(AXES)}
    try:
        return jax.make_mesh(tuple(sizes.values()), devices=devices, **settings)
    except NotImplementedError:
        # The axes of a TPU's torus are no products of these: some axis of it is then cut in two.
        cut = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(cut, **settings)


def make_abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """A mesh of `count` devices that need not be here: shapes can be split over it, and nothing run.

    Raises:
      InputError: as `make_mesh`.
    """
    sizes = axis_sizes(config, count)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(config: MeshConfig, count: int) -> dict[str, int]:
    """The size of each axis over `count` devices, -1 filled in.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or more than one of them is -1.
    """
    sizes = dataclasses.asdict(config)
    shown = ', '.join(f'mesh.{axis}={size}' for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f'{shown}: sizes are positive, and at most one of them is -1 (the devices the others leave)')
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        raise InputError(f'{shown} does not divide the {count} devices; make their product {count}')
    return sizes


@contextlib.contextmanager
def activate(mesh: Mesh | None) -> Iterator[None]:
    """Makes `constrain` act on `mesh` while code is traced inside.

    Not `jax.set_mesh`: under that, arrays made eagerly are committed as replicated.
    """
    token = _active_mesh.set(mesh)
    try:
        yield
    finally:
        _active_mesh.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh of the innermost `activate`, or None."""
    return _active_mesh.get()


def target_device() -> jax.Device:
    """A device like those that the code being traced is compiled for: the active mesh's, else jax's default ones.

    The devices of a mesh need not be here, so that `jax.default_backend()` may well be another one. Of a mesh that
    names no devices (`make_abstract_mesh`) the default backend's are taken.
    """
    mesh = current_mesh()
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]


def on_one_device() -> bool:
    """Whether no dimension is split: no mesh is active, one of a single device, or the code is inside `per_device`."""
    mesh = current_mesh()
    return mesh is None or mesh.size == 1 or _inside_per_device.get()


def per_device(function: Callable, in_names: Sequence[tuple[str | None, ...]], out_names: Any) -> Callable:
    """`function` as every device of the mesh runs it, on its own parts of the arrays alone (`jax.shard_map`).

    For what the compiler cannot split by itself, or splits badly. Inside, `constrain` does nothing and `split_axes`
    names what collectives run over. Only where `can_split`; differentiate outside of it, by `jax.custom_vjp`.

    Args:
      function: takes arrays, gives an array or a tuple of them (None for one that is left out).
      in_names: the logical names of the dimensions of each argument.
      out_names: those of the result, or a list of them where it is a tuple.
    """

    def run(*arrays):
        token = _inside_per_device.set(True)
        try:
            return function(*arrays)
        finally:
            _inside_per_device.reset(token)

    in_specs = tuple(logical_spec(*names) for names in in_names)
    several = isinstance(out_names, list)
    out_specs = tuple(logical_spec(*names) for names in out_names) if several else logical_spec(*out_names)
    # The check of what varies over which axis would want every constant marked; the collectives here are few.
    return jax.shard_map(run, mesh=current_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def can_split(shape: tuple[int, ...], *names: str | None) -> bool:
    """Whether the active mesh has several devices, and its axes divide the dimensions called `names`."""
    if on_one_device():
        return False
    return all(
        size % math.prod(current_mesh().shape[a] for a in _axes(n)) == 0 for size, n in zip(shape, names, strict=True)
    )


def splits(name: str) -> bool:
    """Whether the active mesh splits the logical dimension `name`, and no `per_device` has split it already."""
    return not on_one_device() and math.prod(current_mesh().shape[a] for a in _axes(name)) > 1


def split_axes(name: str) -> tuple[str, ...]:
    """Inside `per_device`, the mesh axes that the logical dimension `name` is split over; none outside of it."""
    return tuple(a for a in _axes(name) if current_mesh().shape[a] > 1) if _inside_per_device.get() else ()


def _axes(name: str | None) -> tuple[str, ...]:
    axes = None if name is None else LOGICAL_AXES[name]
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def logical_spec(*names: str | None) -> PartitionSpec:
    """The mesh axes of logically named dimensions; a name that is not in `LOGICAL_AXES` raises KeyError."""
    return PartitionSpec(*(None if name is None else LOGICAL_AXES[name] for name in names))


@contextlib.contextmanager
def recorded_activations() -> Iterator[list[Activation]]:
    """A list of what `constrain` is asked about while code is traced inside, each once."""
    found: list[Activation] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def _record(x: jax.Array, names: tuple[str | None, ...], called: str) -> None:
    split = [math.prod(current_mesh().shape[axis] for axis in _axes(name)) for name in names]
    if _inside_per_device.get():  # it is a part already
        shape, local = tuple(size * by for size, by in zip(x.shape, split, strict=True)), x.shape
    else:
        shape, local = x.shape, tuple(-(-size // by) for size, by in zip(x.shape, split, strict=True))
    activation = Activation(called, names, shape, local, x.dtype)
    if activation not in _recorded.get():
        _recorded.get().append(activation)


def constrain(x: jax.Array, *names: str | None, called: str = '') -> jax.Array:
    """`x` with its dimensions laid along the mesh as their logical `names` say; unchanged without a mesh.

    `called` says what it is, for a table of all of them (`recorded_activations`).

    Raises:
      KeyError: a name is unknown (an unknown name that replicated silently would cost memory unseen).
      ValueError: there are not as many names as dimensions.
    """
    spec = logical_spec(*names)
    if len(names) != x.ndim:
        raise ValueError(f'{len(names)} names {names} for an array of shape {x.shape}')
    if _recorded.get() is not None and current_mesh() is not None:
        _record(x, names, called)
    return x if on_one_device() else jax.lax.with_sharding_constraint(x, NamedSharding(current_mesh(), spec))
