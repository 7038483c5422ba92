"""Products of few rows with a matrix: what decoding is made of, in the form that the CPU's compiler makes fast code of.

There a token costs at least the time of reading every matrix once, and a plain `x @ kernel` of 2 to 32 rows reads them
at about half the speed of this form (docs/PERFORMANCE.md).
"""

from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.parallel import on_one_device

# In place of a Dense's `kernel`: the same matrix as [*out, *in].
TRANSPOSED = 'kernel_transposed'
# Beyond that many rows a plain product is as fast.
FEW = 32
# How many dimensions of its kernel a Dense contracts, where it is not one: CausalSelfAttention's output.
_CONTRACTED = {'out': 2}


def transpose_kernels(blocks: tuple[Any, ...]) -> tuple[Any, ...]:
    """Parameters of blocks (`unstack_layers`) with every kernel transposed; `Dense` takes either form."""

    def convert(tree, name=''):
        if not isinstance(tree, dict):
            return tree
        tree = {key: convert(value, key) for key, value in tree.items()}
        if 'kernel' in tree:
            kernel = tree.pop('kernel')
            contracted = _CONTRACTED.get(name, 1)
            axes = range(kernel.ndim)
            tree[TRANSPOSED] = kernel.transpose(*axes[contracted:], *axes[:contracted])
        return tree

    return tuple(convert(block) for block in blocks)


def multiply(x: jax.Array, matrix_OI: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x @ matrix.T: [..., in], [out, in] -> [..., out]; `dtype` is that of the sums and the result, by default x's."""
    rows = x.size // x.shape[-1]
    if rows > FEW or jax.default_backend() != 'cpu' or not on_one_device():
        return jnp.einsum('...i,oi->...o', x, matrix_OI, preferred_element_type=dtype)
    # As a stack of one matrix: of a plain product with so few rows the compiler makes slow loops.
    y = jnp.einsum('ri,soi->sro', x.reshape(rows, -1), matrix_OI[None], preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], matrix_OI.shape[0])
