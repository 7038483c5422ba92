"""The published sizes: dimensions of the papers, parameters to the unit."""

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.errors import InputError
from gpt_jax.models import GPT, PRESETS, preset, preset_config

# name: layers, heads, d_model, context, parameters (vocabulary 50257, tied head).
SIZES = {
    'gpt2-small': (12, 12, 768, 1024, 124_439_808),
    'gpt2-medium': (24, 16, 1024, 1024, 354_823_168),
    'gpt2-large': (36, 20, 1280, 1024, 774_030_080),
    'gpt2-xl': (48, 25, 1600, 1024, 1_557_611_200),
    'gpt3-125m': (12, 12, 768, 2048, 125_226_240),
    'gpt3-350m': (24, 16, 1024, 2048, 355_871_744),
    'gpt3-760m': (24, 16, 1536, 2048, 760_300_032),
    'gpt3-1.3b': (24, 16, 2048, 2048, 1_315_723_264),
    'gpt3-2.7b': (32, 32, 2560, 2048, 2_651_553_280),
    'gpt3-6.7b': (32, 32, 4096, 2048, 6_658_404_352),
    'gpt3-13b': (40, 40, 5120, 2048, 12_853_386_240),
    'gpt3-175b': (96, 96, 12288, 2048, 174_604_259_328),
    'gpt3-ada': (12, 12, 768, 2048, 125_226_240),
    'gpt3-babbage': (24, 16, 1024, 2048, 355_871_744),
    'gpt3-curie': (48, 32, 2048, 2048, 2_524_321_792),
    'gpt3-davinci': (96, 96, 12288, 2048, 174_604_259_328),
}


def test_every_published_size_is_there_and_no_other():
    assert sorted(PRESETS) == sorted(SIZES)


@pytest.mark.parametrize('name', SIZES)
def test_a_preset_has_the_dimensions_and_the_parameter_count_of_its_paper(name):
    config = preset_config(name)
    dimensions = (config.n_layer, config.n_head, config.d_model, config.block_size, config.num_parameters)
    assert dimensions == SIZES[name]
    assert (config.vocab_size, config.mlp_expansion, config.tie_embeddings) == (50257, 4, True)


@pytest.mark.parametrize('name', SIZES)
def test_init_makes_as_many_parameters_as_the_paper_counts(name):
    # Shapes only: 175B parameters are counted without one being allocated. Scanned, 96 layers are traced as one.
    model = preset(name, scan_layers=True)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    padding = (50304 - 50257) * model.config.d_model
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) - padding == SIZES[name][-1]


def test_a_preset_is_a_model_and_takes_changes_to_its_config():
    model = preset('gpt2-small', block_size=256, resid_dropout=0.1)
    assert isinstance(model, GPT)
    assert (model.config.block_size, model.config.resid_dropout, model.config.n_layer) == (256, 0.1, 12)
    assert PRESETS['gpt2-small'].block_size == 1024


def test_changes_to_a_preset_are_checked():
    with pytest.raises(InputError, match=r'model\.n_head=7'):
        preset('gpt2-small', n_head=7)


def test_an_unknown_preset_is_refused_on_one_line_with_every_name():
    with pytest.raises(InputError) as caught:
        preset('gpt5')
    message = str(caught.value)
    assert message.startswith("model.preset='gpt5'")
    assert all(name in message for name in SIZES)
    assert '\n' not in message
