"""Checkpoints: written while training goes on, checked when read, found by whatever name the user gives.

A checkpoint is one folder, `WORKDIR/checkpoints/STEP`, and describes itself: the parameters, the optimizer's state, a
JSON dict (`meta`: config, tokenizer, data fingerprint, versions) and a sha256 of every file. It can be copied anywhere.

    with Checkpoints(workdir / 'checkpoints') as checkpoints:     # training: saves in the background
        checkpoints.save(step, params, optimizer, meta, val_loss)
        params, optimizer, meta = checkpoints.restore(step, abstract_params, abstract_optimizer)

    loaded = load('runs/gpt2_small')                               # everyone else: loaded.params, loaded.meta
    ready = load_model('runs/gpt2_small')                          # ready.model, ready.params, ready.tokenizer

A Hugging Face directory of GPT-2 or GPT-Neo is loaded as one, too, and either is made from the other.
"""

from gpt_jax.checkpoints.exchange import export_huggingface, import_huggingface
from gpt_jax.checkpoints.language_model import LanguageModel, load_model
from gpt_jax.checkpoints.manager import Checkpoints
from gpt_jax.checkpoints.resolve import Loaded, Resolved, fingerprint, load, read_meta, resolve
from gpt_jax.checkpoints.steps import latest_meta

__all__ = [
    'Checkpoints',
    'LanguageModel',
    'Loaded',
    'Resolved',
    'export_huggingface',
    'fingerprint',
    'import_huggingface',
    'latest_meta',
    'load',
    'load_model',
    'read_meta',
    'resolve',
]
