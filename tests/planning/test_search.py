import dataclasses

import pytest

from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig, preset_config
from gpt_jax.models.config import causal_flops_per_token
from gpt_jax.parallel import MeshConfig
from gpt_jax.parallel.devices import DEVICES
from gpt_jax.planning import Memory, Placement, next_smaller, search
from gpt_jax.planning.cost import PRODUCT_SHARE, step_time
from gpt_jax.planning.search import placements

H100 = DEVICES['NVIDIA H100 80GB HBM3']
MODEL = preset_config('gpt3-6.7b', scan_layers=True, compute_dtype='bf16')


def memory(total):
    return Memory(int(total), 0, 0, 0, 0, 0)


def test_every_way_to_train_is_one_that_divides_model_batch_and_devices():
    found = list(placements(MODEL, 96, 48))
    assert all(p.devices == 48 and p.rows * p.split * p.accumulation_steps == 96 for p in found)
    # 3 divides neither the heads nor the width.
    assert {p.mesh.tensor for p in found} == {1, 2, 4, 8, 16}
    assert {p.mesh.fsdp for p in found} == {1, 2, 4, 8, 16}
    assert {p.config.remat for p in found} == {'none', 'dots', 'names', 'full'}
    assert {p.mesh.context for p in found} == {1}
    assert len(set(found)) == len(found)
    assert not list(placements(MODEL, 7, 5))


def test_a_tpu_is_given_no_parts_of_parameters_thinner_than_a_tile():
    config = preset_config('gpt3-13b', scan_layers=True, compute_dtype='bf16')
    assert max(p.mesh.fsdp for p in placements(config, 1024, 256)) == 256  # 20 of 5,120 rows each
    assert max(p.mesh.fsdp for p in placements(config, 1024, 256, tile_rows=16)) == 64
    for device, widest in ((H100, 256), (DEVICES['TPU v5p'], 64)):
        ranking, _ = search(config, 1024, 256, device, lambda p: memory(p.rows))
        assert max(one.placement.mesh.fsdp for one in ranking) == widest


def test_long_contexts_alone_are_split():
    long = dataclasses.replace(MODEL, block_size=32768)
    assert {p.mesh.context for p in placements(long, 8, 8)} == {1, 2, 4, 8}


def test_the_fastest_that_fits_comes_first_and_where_none_fits_the_smallest():
    def estimate(placement):
        return memory(10e9 * placement.rows + (0 if placement.config.remat == 'full' else 30e9))

    ranking, tried = search(MODEL, 64, 32, H100, estimate)
    times = [one.time.total for one in ranking]
    assert times == sorted(times)
    assert max(one.memory.total for one in ranking) <= 0.95 * H100.memory_bytes
    assert len(ranking) < tried == len(list(placements(MODEL, 64, 32)))
    (smallest,), _ = search(MODEL, 64, 32, H100, lambda p: memory(1e12 + p.rows))
    assert smallest.placement.rows == 1

    def only(mesh_fsdp):
        def estimate(placement):
            if placement.mesh.fsdp != mesh_fsdp:
                raise InputError(f'not mesh.fsdp={placement.mesh.fsdp}')
            return memory(1)

        return estimate

    assert search(MODEL, 64, 32, H100, only(4))[0][0].placement.mesh.fsdp == 4
    # The reason is that of the mesh with the least of data and fsdp.
    with pytest.raises(InputError, match=r'^--search: none of the meshes of 32 .* Of the last one: not mesh.fsdp=2$'):
        search(MODEL, 64, 32, H100, only(3))
    with pytest.raises(InputError, match=r'--search: no mesh of 5 devices divides the batch of train.batch_size=7 '):
        search(MODEL, 7, 5, H100, estimate)


def test_after_a_refusal_the_next_is_smaller_by_what_was_too_much():
    ranking, _ = search(MODEL, 64, 32, H100, lambda p: memory(1e9 * p.rows))
    totals = [one.memory.total for one in ranking]
    place = next_smaller(ranking, 0, needed=2 * totals[0], available=totals[0])
    assert totals[place] <= totals[0] / 2
    assert all(total > totals[0] / 2 for total in totals[1:place])
    assert next_smaller(ranking, 0, needed=1000 * totals[0], available=totals[0]) is None


def seconds(mesh, steps=1, device=H100, config=MODEL):
    return step_time(Placement(config, MeshConfig(*mesh), 256, steps), device)


def test_on_one_device_nothing_is_sent_and_products_take_their_share_of_the_peak():
    alone = seconds((1, 1, 1, 1))
    assert (alone.beside, alone.waiting) == (0, 0)
    tokens = 256 * 2048
    assert alone.products == pytest.approx(tokens * causal_flops_per_token(MODEL) / (989e12 * PRODUCT_SHARE))
    full = seconds((1, 1, 1, 1), config=dataclasses.replace(MODEL, remat='full'))
    assert full.products == pytest.approx(alone.products * 4 / 3)


def test_what_is_sent_is_what_the_papers_count():
    weights = MODEL.num_parameters
    # ZeRO-3: parameters twice in 16 bits, gradients once in 32, 7 of 8 parts of each, for each micro-batch.
    assert seconds((1, 8, 1, 1)).beside == pytest.approx(weights * (2 + 2 + 4) * 7 / 8 / 450e9)
    assert seconds((1, 8, 1, 1), steps=4).beside == pytest.approx(4 * seconds((1, 8, 1, 1)).beside)
    # An all-reduce of the gradients over four hosts, on a port of 50 GB/s for each GPU of them.
    assert seconds((4, 8, 1, 1)).beside > weights / 8 * 8 * 3 / 4 / 50e9
    # Megatron: four all-reduces of the residual stream a layer.
    of_stream = 256 * 2048 * MODEL.d_model * 2
    assert seconds((1, 1, 8, 1)).waiting == pytest.approx(32 * 4 * 2 * of_stream * 7 / 8 / 450e9)
    over_hosts = seconds((1, 1, 16, 1)).waiting
    assert over_hosts > 32 * 4 * 2 * of_stream * 15 / 16 / 450e9


def test_a_model_that_waits_for_its_network_is_slower_than_its_products():
    config = GPTConfig(512, 16, n_layer=8, n_head=8, d_model=1024, compute_dtype='bf16')
    time = seconds((256, 1, 1, 1), config=config)
    assert time.total == time.beside + time.waiting > time.products + time.memory
