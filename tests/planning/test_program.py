"""What is read from a compiled program, against counts by hand; and the forms of it that other compilers write."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.parallel import MeshConfig, make_mesh
from gpt_jax.parallel.devices import DEVICES, ring_bandwidth
from gpt_jax.planning.program import _bytes, _first_group, parse, read_program

H100 = DEVICES['NVIDIA H100 80GB HBM3']
V5E, V5P = DEVICES['TPU v5 lite'], DEVICES['TPU v5p']
TURNS, ROWS, INNER, OUTER = 5, 16, 64, 32


@pytest.fixture(scope='module')
def text(as_users):
    """A loop of products whose contracted dimension is split over four, so that each turn ends with an all-reduce."""
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    put = functools.partial(NamedSharding, mesh)
    x = jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32, sharding=put(PartitionSpec('data', 'tensor')))
    w = jax.ShapeDtypeStruct((TURNS, INNER, OUTER), jnp.float32, sharding=put(PartitionSpec(None, 'tensor')))

    def products(x, w):
        def turn(total, w):
            return total + jax.lax.with_sharding_constraint(x @ w, put(PartitionSpec('data'))), None

        return jax.lax.scan(turn, jnp.zeros((ROWS, OUTER)), w)[0]

    return jax.jit(products).lower(x, w).compile(compiler_options=as_users).as_text()


def test_collectives_of_a_loop_count_as_often_as_it_turns(text):
    (one,) = read_program(text, H100, 8).collectives
    assert (one.kind, one.devices, one.count, one.across_hosts) == ('all-reduce', 4, TURNS, False)
    assert one.bytes == TURNS * ROWS // 2 * OUTER * 4
    assert one.sent_bytes == one.bytes * 2 * 3 // 4  # three of four parts, once to add them up and once to spread them
    assert one.seconds == pytest.approx(one.sent_bytes / 450e9)


def test_products_of_a_loop_and_the_roofline_are_those_by_hand(text):
    program = read_program(text, H100, 8)
    flops = TURNS * 2 * ROWS // 2 * INNER // 4 * OUTER
    assert (program.flops, program.unknown_loops) == (flops, 0)
    # Everything here is bound by memory: a product reads a row block and a matrix, and writes the sum.
    assert program.kernel_seconds == pytest.approx(program.memory_bytes / H100.memory_bandwidth, rel=1e-6)
    least = TURNS * 4 * (ROWS // 2 * INNER // 4 + INNER // 4 * OUTER + ROWS // 2 * OUTER)
    assert least <= program.memory_bytes < 5 * least
    slow = dataclasses.replace(H100, peak_flops=1.0)
    assert read_program(text, slow, 8).kernel_seconds == pytest.approx(flops, rel=1e-6)


def test_of_a_tpu_and_of_an_unknown_device_collectives_alone_are_told(text):
    program = read_program(text, V5E, 8, (2, 4))
    assert (program.kernels, program.flops, program.kernel_seconds) == (None, None, None)
    assert program.collectives[0].seconds == pytest.approx(program.collectives[0].sent_bytes / 90e9)
    (unknown,) = read_program(text, None, 8).collectives
    assert unknown.seconds is None


@pytest.mark.parametrize(
    ('attributes', 'group'),
    [
        ('replica_groups={{0,2,4,6},{1,3,5,7}}, use', [0, 2, 4, 6]),
        ('replica_groups=[4,2]<=[8], use', [0, 1]),
        ('replica_groups=[2,4]<=[4,2]T(1,0), dimensions={2}', [0, 2, 4, 6]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}, dimensions", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ('replica_groups={}, to_apply', list(range(8))),
        ('source_target_pairs={{0,6},{2,0}}', [0, 6]),
    ],
)
def test_groups_are_read_in_every_form_that_xla_writes(attributes, group):
    assert _first_group(attributes, 8) == group


def test_lines_of_the_tpu_and_gpu_compilers_are_taken_apart():
    computations, entry = parse(
        """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %g = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  ROOT %s = (bf16[16,8]{1,0:T(8,128)(2,1)}, /*index=1*/u32[]{:S(2)}) all-gather-start(%g), dimensions={0}
}

ENTRY %main.1_spmd (a: f32[8]) -> f32[8] {
  %c = s32[]{:T(128)} constant(7)
  ROOT %a = f32[8]{0} parameter(0)
}
"""
    )
    assert entry == 'main.1_spmd'
    first, last = computations['body']
    assert (first.name, first.opcode, first.operands, _bytes(first.shape)) == ('g', 'get-tuple-element', ('p',), 256)
    assert (last.opcode, last.operands, last.is_root, _bytes(last.shape)) == ('all-gather-start', ('g',), True, 260)
    assert [one.attributes for one in computations[entry]] == ['(7)', '(0)']
    assert [_bytes(shape) for shape in ('pred[3]', 's4[4]', 'f8e4m3fn[2,3]', '(f32[], token[])')] == [3, 2, 6, 4]


def test_an_all_reduce_that_is_cut_in_its_kernel_is_a_reduce_scatter():
    text = """
%all-reduce-scatter (p: f32[64,32], i: s32[]) -> f32[16,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %sum = f32[64,32]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %cut = f32[16,32]{1,0} dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={16,32}
}

ENTRY %main (a: f32[64,32], b: s32[]) -> f32[16,32] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %f = f32[16,32]{1,0} fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter
}
"""
    (one,) = read_program(text, V5E, 8).collectives
    assert (one.kind, one.devices, one.count, one.sent_bytes) == ('reduce-scatter', 4, 1, 64 * 32 * 4 * 3 // 4)


def test_a_collective_that_a_tpu_spreads_over_kernels_counts_once_a_turn():
    step = """
%step.{n} (p: bf16[8,32]) -> bf16[32,32] {{
  %p.{n} = bf16[8,32]{{1,0}} parameter(0)
  ROOT %gather.{n} = bf16[32,32]{{1,0}} all-gather(%p.{n}), channel_id=7, replica_groups=[2,4]<=[8], dimensions={{0}}, \
frontend_attributes={{chain_id="0"}}
}}
"""
    text = (
        ''.join(step.format(n=n) for n in range(3))
        + """
%turn (t: (u32[], bf16[8,32])) -> (u32[], bf16[8,32]) {
  %t = (u32[], bf16[8,32]{1,0}) parameter(0)
  %x = bf16[8,32]{1,0} get-tuple-element(%t), index=1
  %f.0 = bf16[32,32]{1,0} fusion(%x), kind=kCustom, calls=%step.0
  %f.1 = bf16[32,32]{1,0} fusion(%x), kind=kCustom, calls=%step.1
  ROOT %f.2 = bf16[32,32]{1,0} fusion(%x), kind=kCustom, calls=%step.2
}

%more (t: (u32[], bf16[8,32])) -> pred[] {
  %limit = u32[]{:T(128)} constant(6)
  %u = (u32[], bf16[8,32]{1,0}) parameter(0)
  %now = u32[] get-tuple-element(%u), index=0
  ROOT %less = pred[] compare(%now, %limit), direction=LT
}

ENTRY %main (a: (u32[], bf16[8,32])) -> (u32[], bf16[8,32]) {
  %a = (u32[], bf16[8,32]{1,0}) parameter(0)
  ROOT %loop = (u32[], bf16[8,32]{1,0}) while(%a), condition=%more, body=%turn
}
"""
    )
    program = read_program(text, V5E, 8)
    assert program.unknown_loops == 0
    (one,) = program.collectives
    assert (one.kind, one.count, one.sent_bytes) == ('all-gather', 6, 6 * 8 * 32 * 2 * 3)


def test_a_ring_has_the_links_of_its_group():
    assert ring_bandwidth(H100, 8, 1, 32) == 450e9
    assert ring_bandwidth(H100, 4, 4, 32) == 50e9  # one of each host: its own network port
    assert ring_bandwidth(H100, 32, 4, 32) == 400e9  # eight ports of each host, side by side
    assert ring_bandwidth(V5P, 512, 1, 512, (8, 8, 8)) == 3 * 180e9
    assert ring_bandwidth(V5P, 8, 1, 512, (8, 8, 8)) == 180e9
    assert ring_bandwidth(V5E, 16, 1, 16, (4, 4)) == 2 * 90e9
    assert ring_bandwidth(dataclasses.replace(V5E, link_bandwidth=None), 4, 1, 4) is None
