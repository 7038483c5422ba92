"""Checkpoints: written while training goes on, checked when read, found by whatever name the user gives.

A checkpoint is one folder, `WORKDIR/checkpoints/STEP`, and describes itself: the parameters, the optimizer's state, a
JSON dict (`meta`: config, tokenizer, data fingerprint, versions) and a sha256 of every file. It can be copied anywhere.

    with Checkpoints(workdir / 'checkpoints') as checkpoints:     # training: saves in the background
        checkpoints.save(step, params, optimizer, meta, val_loss)
        params, optimizer, meta = checkpoints.restore(step, abstract_params, abstract_optimizer)

    loaded = load('runs/gpt2_small')                               # everyone else: loaded.params, loaded.meta
    loaded = load_model('runs/gpt2_small', mesh=mesh)              # loaded.model, loaded.params, loaded.tokenizer

A Hugging Face directory of GPT-2 or GPT-Neo is loaded as one, too, and either is made from the other.
"""

from gpt_jax.checkpoints.finding import (
    PretrainedWeights,
    Resolved,
    find_run,
    find_weights,
    fingerprint,
    read_meta,
    read_model_config,
    resolve,
)
from gpt_jax.checkpoints.loading import (
    LanguageModel,
    Loaded,
    export_huggingface,
    import_huggingface,
    load,
    load_model,
)
from gpt_jax.checkpoints.saving import Checkpoints, recover

__all__ = [
    'Checkpoints',
    'LanguageModel',
    'Loaded',
    'PretrainedWeights',
    'Resolved',
    'export_huggingface',
    'find_run',
    'find_weights',
    'fingerprint',
    'import_huggingface',
    'load',
    'load_model',
    'read_meta',
    'read_model_config',
    'recover',
    'resolve',
]
