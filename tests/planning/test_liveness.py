import jax
import jax.numpy as jnp
import pytest

from gpt_jax.planning.liveness import Liveness, array_bytes

KIB = 1024
x = jax.ShapeDtypeStruct((16, 16), jnp.float32)  # 1 KiB, and 0.5 KiB in 16 bits


def peak(function, *arguments, cpu=False):
    return Liveness(jax.make_jaxpr(function)(*arguments), cpu).peak()


def test_a_chain_of_products_holds_two_of_them_at_once():
    assert peak(lambda x: x @ x @ x @ x @ x, x) == 2 * KIB


def test_a_value_is_held_until_its_last_reader():
    def function(x):
        first = x @ x
        return first @ x @ x @ x @ first

    assert peak(function, x) == 3 * KIB


def test_elementwise_steps_between_products_are_not_stored():
    assert peak(lambda x: jnp.sum(-(x @ x) * 2.0 + 1.0), x) == KIB + 4


def test_an_elementwise_result_takes_the_place_of_an_operand_that_dies():
    assert peak(lambda x: jnp.tanh(x @ x) @ x, x) == 2 * KIB
    # Read once more at the end, the operand stays.
    assert peak(lambda x: (lambda y: (jnp.tanh(y) @ x) @ y)(x @ x), x) == 3 * KIB


def test_what_several_fused_readers_need_is_stored_if_dear_and_made_again_if_cheap():
    def function(of):
        def both(x):
            made = of(x)
            return jnp.sum(made * 3.0), jnp.sum(made * 5.0)

        return both

    assert peak(function(jnp.exp), x) == KIB + 8
    assert peak(function(jnp.negative), x) == 8


def test_equal_things_are_made_once_but_not_across_a_barrier_of_rematerialisation():
    def twice(x):
        return jnp.exp(x @ x) @ jnp.exp(x @ x)

    assert peak(twice, x) == peak(lambda x: (lambda y: y @ y)(jnp.exp(x @ x)), x)

    def layers(x):
        for _ in range(6):
            x = jax.checkpoint(lambda x: jnp.exp(jnp.exp(x @ x) @ x))(x)
        return jnp.sum(x)

    # XLA's CPU backend drops the barrier, and with it the saving.
    assert peak(jax.grad(layers), x) < peak(jax.grad(layers), x, cpu=True)


def test_a_loop_holds_what_its_body_holds_beside_what_it_carries_and_collects():
    def function(x):
        return jax.lax.scan(lambda carry, _: (carry @ x @ x, carry), x, None, length=3)

    # The carry and the three collected ones outside, two products within.
    assert peak(function, x) == (1 + 3 + 2) * KIB


def test_only_the_cpu_holds_16_bits_as_32():
    half = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)
    assert peak(lambda x: x @ x @ x, half) == KIB
    assert peak(lambda x: x @ x @ x, half, cpu=True) == 2 * KIB


def test_results_count_once_and_inputs_not_at_all():
    traced = jax.make_jaxpr(lambda x: (x, x @ x, x @ x, x + 1.0))(x)
    assert Liveness(traced).results() == 2 * KIB


@pytest.mark.parametrize('tree', [{'a': x, 'b': [x]}, (jnp.zeros((16, 16)), x)])
def test_the_bytes_of_a_tree_are_those_of_its_arrays(tree):
    assert array_bytes(tree) == 2 * KIB
