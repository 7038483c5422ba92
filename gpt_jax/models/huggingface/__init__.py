"""Hugging Face directories of GPT-2 and GPT-Neo, in and out: config.json with safetensors, and nothing else needed.

    config, params = load(directory)
    save(directory, config, params)

A directory holds `config.json` and the weights, in `model.safetensors` or in several files that
`model.safetensors.index.json` lists. Pickled weights are never read: loading a pickle runs the code in it.
"""

from gpt_jax.models.huggingface.directory import is_directory, load, read_config, save
from gpt_jax.models.huggingface.layout import parameter_shapes

__all__ = ['is_directory', 'load', 'parameter_shapes', 'read_config', 'save']
