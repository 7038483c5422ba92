import dataclasses

import optax
import pytest

from gpt_jax.errors import InputError
from gpt_jax.models import GPT, GPTConfig, preset_config
from gpt_jax.parallel import MeshConfig, make_abstract_mesh
from gpt_jax.planning import Memory, Placement, advice
from gpt_jax.planning.cost import cache_bytes, training_cost
from gpt_jax.planning.memory import sharded_bytes, smaller, training_memory
from gpt_jax.training.step import abstract_state

CONFIG = GPTConfig(512, 64, n_layer=2, n_head=2, d_model=32)


def placement(mesh=(8, 1, 1, 1), batch_size=64, accumulation_steps=1, config=CONFIG):
    return Placement(config, MeshConfig(*mesh), batch_size, accumulation_steps)


def memory(total):
    return Memory(total, 0, 0, 0, 0, 0)


def test_minus_one_is_filled_in_for_the_devices_of_the_plan_not_for_those_here():
    planned = Placement.of(CONFIG, MeshConfig(data=-1, fsdp=16), 512, 1024, 2)
    assert (planned.mesh.data, planned.devices, planned.split, planned.rows) == (32, 512, 512, 1)
    with pytest.raises(InputError, match=r'mesh\.fsdp=16.* does not divide the 24 devices'):
        Placement.of(CONFIG, MeshConfig(data=-1, fsdp=16), 24, 1024, 2)


def test_a_batch_that_the_mesh_cannot_divide_is_refused():
    with pytest.raises(InputError, match=r'train\.batch_size=60 in 1 micro-batches is not divisible by the 8 devices'):
        placement(batch_size=60)


def test_smaller_placements_train_the_same_with_other_remat_mesh_and_micro_batches():
    found = list(smaller(placement()))
    assert all(one.batch_size == 64 and one.devices == 8 and one.accumulation_steps <= 8 for one in found)
    assert {one.config.remat for one in found} == {'none', 'names', 'full'}
    assert {(one.mesh.data, one.mesh.fsdp) for one in found} == {(8, 1), (1, 8)}
    assert {one.accumulation_steps for one in found} == {1, 2, 4, 8}
    assert placement() not in found
    # What the mesh cannot split stays as it is, and no policy is proposed that keeps more.
    odd = GPTConfig(512, 64, n_layer=2, n_head=1, d_model=30, remat='full')
    assert {(one.mesh.fsdp, one.config.remat) for one in smaller(placement(config=odd))} == {(1, 'full')}


def test_advice_takes_the_fewest_changes_that_fit_and_gives_them_as_flags():
    def estimate(one):
        return memory((30 if one.config.remat == 'none' else 10) * one.rows + (50 if one.mesh.fsdp == 1 else 10))

    found, fits = advice(placement(), 140, estimate)
    assert fits
    assert [(one.flags(placement()), size.total) for one, size in found] == [
        ('--config.model.remat=names', 130),
        ('--config.model.remat=full', 130),
        ('--config.train.accumulation_steps=4', 110),
    ]


def test_where_nothing_fits_advice_gives_the_smallest():
    found, fits = advice(placement(), 0, lambda one: memory(one.rows + (0 if one.mesh.fsdp > 1 else 50)))
    assert not fits
    ((smallest, size),) = found
    assert (smallest.rows, smallest.mesh.fsdp, size.total) == (1, 8, 1)


def test_nothing_left_to_change_gives_no_advice():
    full = GPTConfig(512, 64, n_layer=2, n_head=2, d_model=32, remat='full')
    assert advice(placement(mesh=(1, 8, 1, 1), batch_size=8, config=full), 0, lambda _: memory(1)) == ([], False)


def test_cost_is_arithmetic_over_what_the_devices_do():
    cost = training_cost(3.14e23, devices=1000, peak_flops=312e12, mfu=0.5, dollars_per_hour=2.0)
    seconds = 3.14e23 / (1000 * 312e12 * 0.5)
    assert cost.days == pytest.approx(seconds / 86400)
    assert cost.device_hours == pytest.approx(seconds / 3600 * 1000)
    assert cost.dollars == pytest.approx(cost.device_hours * 2)
    assert training_cost(1.0, 1, 1.0, 1.0, None).dollars is None


def test_the_cache_of_a_banded_layer_holds_its_band_alone():
    config = preset_config('gpt3-125m', compute_dtype='bf16')
    banded, dense = cache_bytes(config, batch=3, length=2048)
    a_token = 2 * 768 * 2 * 3  # key and value of three sequences in two bytes each, in one layer
    bookkeeping = 3 * 2048 * 4 + 3 * 4  # the position in each slot, the next slot of each row
    assert dense == 12 * 2048 * a_token + bookkeeping
    assert banded == 6 * (2048 + 256) * a_token + bookkeeping + 3 * 256 * 4


def test_parameters_take_what_the_sharding_rules_leave_on_a_device():
    def bytes_on(mesh, count):
        state = abstract_state(GPT(CONFIG), optax.identity(), make_abstract_mesh(mesh, count))
        return sharded_bytes(state.params)

    # Every matrix is split along fsdp, and no bias or gain.
    matrices = 4 * ((512 + 64) * 32 + 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128))
    vectors = 4 * (CONFIG.num_parameters - matrices // 4)
    assert bytes_on(MeshConfig(data=-1), 512) == matrices + vectors
    assert bytes_on(MeshConfig(fsdp=16), 32) == matrices // 16 + vectors


def test_gradients_are_exact_and_what_is_never_there_at_once_is_taken_off():
    def estimate(**fields):
        planned = placement(mesh=(1, 8, 1, 1), config=dataclasses.replace(CONFIG, **fields))
        state = abstract_state(GPT(planned.config), optax.identity(), make_abstract_mesh(planned.mesh, 8))
        return training_memory(planned, state), sharded_bytes(state.params), sharded_bytes(state.params['blocks'])

    # Unrolled, the gradients of the layers come when what they kept has gone; scanned, they are there beside it.
    unrolled, params, blocks = estimate()
    assert (unrolled.parameters, unrolled.gradients, unrolled.overlap) == (params, params, -blocks)
    scanned, _, _ = estimate(scan_layers=True)
    assert scanned.gradients == params
    assert -blocks <= scanned.overlap <= 0
