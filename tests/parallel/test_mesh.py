"""The mesh's four axes, and constraints that act only where a mesh is active."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gpt_jax.errors import InputError
from gpt_jax.parallel import (
    AXES,
    MeshConfig,
    activate,
    constrain,
    current_mesh,
    make_abstract_mesh,
    make_mesh,
    parse_mesh,
)


def sizes(mesh):
    return tuple(mesh.shape.values())


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2, 1)),
        (MeshConfig(data=2, tensor=2, context=-1), (2, 1, 2, 2)),
        (MeshConfig(data=1, fsdp=2, tensor=4, context=1), (1, 2, 4, 1)),
        (MeshConfig(data=-1, fsdp=8), (1, 8, 1, 1)),
    ],
)
def test_a_mesh_has_the_four_axes_in_order_and_minus_one_takes_what_is_left(config, expected):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES == ('data', 'fsdp', 'tensor', 'context')
    assert sizes(mesh) == expected
    assert set(mesh.devices.flat) == set(jax.devices())


def test_the_axes_are_left_to_the_compiler():
    assert make_mesh(MeshConfig()).axis_types == (AxisType.Auto,) * 4


def test_a_mesh_of_devices_that_are_not_here_has_the_sizes_of_one_that_is():
    assert make_abstract_mesh(MeshConfig(data=-1, fsdp=128), 512).shape == dict(zip(AXES, (4, 128, 1, 1), strict=True))
    assert make_abstract_mesh(MeshConfig(), 8).shape == make_mesh(MeshConfig()).shape
    with pytest.raises(InputError, match=r'mesh\.fsdp=3.* does not divide the 512 devices'):
        make_abstract_mesh(MeshConfig(fsdp=3), 512)


def test_a_mesh_may_be_made_of_some_devices():
    some = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(fsdp=2), some)
    assert sizes(mesh) == (2, 2, 1, 1)
    assert set(mesh.devices.flat) == set(some)


@pytest.mark.parametrize(
    'config',
    [
        MeshConfig(data=-1, tensor=-1),
        MeshConfig(data=0),
        MeshConfig(data=-1, context=0),
        MeshConfig(data=3),
        MeshConfig(data=4),
        MeshConfig(data=16),
        MeshConfig(data=-1, fsdp=3),
        MeshConfig(data=-1, tensor=16),
    ],
)
def test_impossible_sizes_are_refused_on_one_line_with_every_key_and_its_value(config):
    with pytest.raises(InputError) as caught:
        make_mesh(config)
    message = str(caught.value)
    for axis in AXES:
        assert f'mesh.{axis}={getattr(config, axis)}' in message
    assert '\n' not in message


def test_a_product_that_misses_the_devices_is_refused_with_their_number():
    with pytest.raises(InputError, match=r'\b8 devices'):
        make_mesh(MeshConfig(data=3))


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('fsdp:8', MeshConfig(1, 8, 1, 1)),
        ('fsdp:8,tensor:2', MeshConfig(1, 8, 2, 1)),
        (' tensor: 2, data:-1 ', MeshConfig(-1, 1, 2, 1)),
        ('data:2,context:1', MeshConfig(2, 1, 1, 1)),
    ],
)
def test_a_flag_names_axes_with_their_sizes_and_the_others_are_one(text, expected):
    assert parse_mesh(text) == expected


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', "'' is not a new axis"),
        ('fsdp', "'fsdp' is not a new axis"),
        ('fsdp:0', "'fsdp:0' is not"),
        ('fsdp:-2', "'fsdp:-2' is not"),
        ('fsdp:' + '1' * 5000, 'is not a new axis with its number of devices'),
        ('fsdp:two', "'fsdp:two' is not"),
        ('model:2', "'model:2' is not"),
        ('fsdp:2,fsdp:4', "'fsdp:4' is not a new axis"),
        ('fsdp:2,', "'' is not"),
        ('context:2', 'context splits the tokens of a text over devices, which training alone does'),
        ('context:-1', 'context splits the tokens'),
    ],
)
def test_a_flag_that_names_no_mesh_is_refused_with_the_way_to_write_it(text, message):
    with pytest.raises(InputError, match=f'^--mesh={text[:80]}.*: .*{message}.*; write it as --mesh=fsdp:8,tensor:2'):
        parse_mesh(text)


def test_a_constraint_is_a_no_op_without_a_mesh_and_on_one_device():
    x = jnp.ones((8, 4))
    assert constrain(x, 'batch', 'embed') is x
    with activate(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert constrain(x, 'batch', 'embed') is x


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (('batch', 'time', 'embed'), (('data', 'fsdp'), 'context', None)),
        (('batch', 'time', 'mlp'), (('data', 'fsdp'), 'context', 'tensor')),
        (('batch', 'heads', 'head_dim'), (('data', 'fsdp'), 'tensor', None)),
        ((None, None, 'vocab'), (None, None, 'tensor')),
    ],
)
def test_a_constraint_lays_named_dimensions_along_the_mesh_under_jit(names, expected):
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    x = np.arange(4 * 8 * 2, dtype=np.float32).reshape(4, 8, 2)
    with activate(mesh):
        y = jax.jit(lambda x: constrain(x, *names))(x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, PartitionSpec(*expected)), 3)
    np.testing.assert_array_equal(y, x)


def test_a_batch_is_split_over_both_data_axes():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with activate(mesh):
        y = jax.jit(lambda x: constrain(x, 'batch', 'time'))(jnp.zeros((16, 3)))
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize('config', [None, MeshConfig()])
def test_a_constraint_with_an_unknown_name_or_a_wrong_rank_raises_with_and_without_a_mesh(config):
    with activate(make_mesh(config) if config else None):
        with pytest.raises(KeyError, match='batsch'):
            constrain(jnp.ones((8, 4)), 'batsch', 'embed')
        with pytest.raises(ValueError, match=r'2 names.*\(8, 4, 2\)'):
            constrain(jnp.ones((8, 4, 2)), 'batch', 'embed')
        with pytest.raises(ValueError, match='2 names'):
            constrain(jnp.ones(8), 'batch', 'embed')


def test_activate_nests_and_ends_with_its_block_even_after_an_error():
    outer, inner = make_mesh(MeshConfig()), make_mesh(MeshConfig(fsdp=2))
    assert current_mesh() is None
    with activate(outer):
        with activate(inner):
            assert current_mesh() is inner
        assert current_mesh() is outer
        with activate(None):
            assert current_mesh() is None
        assert current_mesh() is outer

    def fail():
        with activate(outer):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert current_mesh() is None


def test_arrays_made_inside_activate_stay_on_one_device():
    with activate(make_mesh(MeshConfig())):
        assert len(jnp.ones(8).devices()) == 1
