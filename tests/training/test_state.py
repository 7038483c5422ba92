import jax
import jax.numpy as jnp
import pytest

from gpt_jax.errors import InputError
from gpt_jax.parallel import MeshConfig, make_mesh
from gpt_jax.training.step import TrainState, abstract_state, init_state


@pytest.fixture(scope='module')
def split(lab):
    """The state made on eight fsdp devices."""
    one = lab(mesh=(1, 8, 1, 1))
    return init_state(one.model, one.optimizer, one.mesh, seed=3)


def test_every_mesh_begins_with_the_same_parameters(lab, split, assert_close):
    assert_close(split.params, lab().state().params, atol=1e-7)


def test_another_seed_begins_with_others(lab):
    one = lab()
    state = init_state(one.model, one.optimizer, one.mesh, seed=4)
    assert not (state.params['wte'] == one.state().params['wte']).any()


def test_the_state_begins_at_step_0_with_empty_moments(split):
    assert (split.step.item(), split.skipped.item(), split.loss_scale) == (0, 0, None)
    assert split.step.dtype == split.skipped.dtype == jnp.int32
    moments = (split.opt_state[1].mu, split.opt_state[1].nu)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(moments))


def test_the_abstract_state_describes_the_real_one(lab, split):
    one = lab(mesh=(1, 8, 1, 1))
    abstract = abstract_state(one.model, one.optimizer, one.mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(split)
    for described, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(split), strict=True):
        assert isinstance(described, jax.ShapeDtypeStruct)
        assert (described.shape, described.dtype) == (leaf.shape, leaf.dtype)
        assert described.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_parameters_and_optimizer_taken_apart_make_the_state_again(split, assert_same_bits):
    joined = TrainState.join(split.params, split.optimizer)
    assert jax.tree.structure(joined) == jax.tree.structure(split)
    assert_same_bits(joined, split)
    assert 'params' not in split.optimizer


def test_only_fp16_has_a_loss_scale(lab):
    scaled = lab(precision='fp16', accumulation_steps=2)
    assert abstract_state(scaled.model, scaled.optimizer, scaled.mesh).loss_scale is not None
    half = lab(precision='bf16')
    assert abstract_state(half.model, half.optimizer, half.mesh).loss_scale is None


def test_a_mesh_that_does_not_divide_the_model_is_named(lab):
    one = lab()
    mesh = make_mesh(MeshConfig(tensor=8), devices=jax.devices())
    with pytest.raises(InputError, match=r'mesh\.tensor=8 does not divide a dimension of 2 in blocks/attention'):
        abstract_state(one.model, one.optimizer, mesh)
