"""A small training state of every kind of leaf, and helpers that the checkpoint tests share."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

META = {'config': {'model': {'n_layer': 2}}, 'tokenizer': '{"ü": 1}'}


@flax.struct.dataclass
class LossScale:
    scale: jax.Array
    good_steps: jax.Array


def make_state(seed: int = 0) -> tuple[dict, dict]:
    """Parameters and an optimizer item with NamedTuples, None, a flax struct, bf16 and integers, all random."""
    params = {
        'wte': jnp.zeros((16, 8)),
        'h': {
            'attn': {'kernel': jnp.zeros((2, 8, 8), jnp.bfloat16), 'bias': jnp.zeros((2, 8))},
            'step_size': jnp.zeros(()),
        },
    }
    optimizer = {
        'opt_state': optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        'loss_scale': LossScale(jnp.zeros(()), jnp.zeros((), jnp.int32)),
        'nothing': None,
        'tokens': jnp.zeros((), jnp.uint32),
        'list': [jnp.zeros(3, bool), (jnp.zeros(2, jnp.int8),)],
    }
    rng = np.random.default_rng(seed)

    def random_bits(leaf):
        # every bit pattern, NaNs with payloads too: what is saved must come back to the bit
        if leaf.dtype == bool:
            return jnp.asarray(rng.integers(0, 2, leaf.shape).astype(bool))
        return jnp.asarray(np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape))

    return jax.tree.map(random_bits, (params, optimizer))


def abstract(tree, sharding=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == wanted.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), jax.tree_util.keystr(path)


class Helpers:
    meta = META
    make_state = staticmethod(make_state)
    abstract = staticmethod(abstract)
    assert_same_bits = staticmethod(assert_same_bits)


@pytest.fixture
def ckpt():
    """The helpers above, as a fixture: test folders are no packages, so nothing can be imported from here."""
    return Helpers


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / 'run'
