"""GPTConfig: what it refuses, and the numbers it derives."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.errors import InputError
from gpt_jax.models import GPT, GPTConfig

TINY = GPTConfig(vocab_size=300, block_size=24, n_layer=3, n_head=4, d_model=32)

SIZES = ('vocab_size', 'block_size', 'n_layer', 'n_head', 'd_model', 'mlp_expansion')
RATES = ('embedding_dropout', 'attention_dropout', 'mlp_dropout', 'resid_dropout')
BAD_VALUES = [
    *((key, value) for key in SIZES for value in (0, -1)),
    *((key, value) for key in RATES for value in (-0.1, 1.0, math.nan)),
    *((key, 10**10) for key in ('n_layer', 'd_model', 'mlp_expansion', 'n_inner', 'vocab_size', 'band_size')),
    ('n_inner', 0),
    ('block_size', 10**15),
    *(('layer_norm_epsilon', value) for value in (0, -1e-5, 2.0, math.inf, math.nan, True)),
    *((key, 1) for key in ('qkv_bias', 'tie_embeddings', 'scan_layers', 'scale_attn_by_inverse_layer_idx')),
    ('attention_scale', math.nan),
]


@pytest.mark.parametrize(('key', 'value'), BAD_VALUES)
def test_a_value_out_of_range_is_refused_by_its_key_on_one_line(key, value):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(TINY, **{key: value})
    assert f'model.{key}={value}' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_heads_that_do_not_divide_the_width_are_refused_with_a_width_that_works():
    with pytest.raises(InputError, match=r'^model\.d_model=30 .* model\.n_head=4; .* 32$'):
        dataclasses.replace(TINY, d_model=30)
    with pytest.raises(InputError, match=r'^model\.d_model=3 .* model\.n_head=8; .* 8$'):
        dataclasses.replace(TINY, d_model=3, n_head=8)


def test_an_activation_of_another_kind_is_refused_with_the_choices():
    with pytest.raises(InputError, match=r"^model\.activation='prelu' must be one of gelu_new, gelu, .*, linear$"):
        dataclasses.replace(TINY, activation='prelu')


def test_an_unknown_compute_dtype_is_refused_with_the_choices():
    with pytest.raises(InputError, match=r"^precision\.compute='f64' must be one of f32, bf16, fp16$"):
        dataclasses.replace(TINY, compute_dtype='f64')


def test_the_ends_of_every_range_are_accepted():
    smallest = dict.fromkeys(SIZES, 1)
    config = GPTConfig(**smallest, **dict.fromkeys(RATES, 0.999))
    assert config.num_parameters == 1 + 1 + (3 + 3 + 1 + 1) + (1 + 1 + 1 + 1) + 4 + 2


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.n_layer = 4


def test_a_model_has_no_dropout_and_a_tied_head_unless_asked():
    assert [getattr(TINY, rate) for rate in RATES] == [0.0] * 4
    assert TINY.tie_embeddings


def test_widths_follow_from_the_model_width():
    config = GPTConfig(vocab_size=300, block_size=24, n_layer=3, n_head=4, d_model=48, mlp_expansion=3)
    assert config.head_dim == 12
    assert config.d_mlp == 144
    narrow = dataclasses.replace(config, n_inner=100)
    assert (narrow.d_mlp, narrow.mlp_expansion) == (100, None)
    assert GPTConfig(**dataclasses.asdict(narrow)) == narrow


@pytest.mark.parametrize(('name', 'dtype'), [('f32', jnp.float32), ('bf16', jnp.bfloat16), ('fp16', jnp.float16)])
def test_compute_dtype_names_a_dtype(name, dtype):
    assert dataclasses.replace(TINY, compute_dtype=name).dtype == dtype


@pytest.mark.parametrize(('vocab_size', 'padded'), [(1, 128), (128, 128), (129, 256), (300, 384), (50257, 50304)])
def test_the_vocabulary_is_padded_to_the_next_multiple_of_128(vocab_size, padded):
    assert dataclasses.replace(TINY, vocab_size=vocab_size).padded_vocab_size == padded


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    vocab_size=st.integers(1, 400),
    block_size=st.integers(1, 50),
    n_layer=st.integers(1, 4),
    n_head=st.integers(1, 4),
    head_dim=st.integers(1, 8),
    mlp_expansion=st.integers(1, 5),
    n_inner=st.none() | st.integers(1, 50),
    tie_embeddings=st.booleans(),
)
def test_num_parameters_counts_the_tree_that_init_makes_less_the_padding(n_head, head_dim, tie_embeddings, **sizes):
    config = GPTConfig(n_head=n_head, d_model=n_head * head_dim, tie_embeddings=tie_embeddings, **sizes)
    tree = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    padding = (config.padded_vocab_size - config.vocab_size) * config.d_model * (1 if tie_embeddings else 2)
    assert config.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(tree)) - padding
