"""Every key of an experiment, with its default and what it means. The other files here are changes to this one.

    python -m gpt_jax.main --config=configs/NAME.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

"Unset" keys are placeholders. Those marked (recipe) are filled in by the recipe of `model.version`
(gpt_jax/training/recipe_values.py gives each value's source). The command line wins over the config file, and the
config file over the recipe. With `train.init_from` the unset keys of the architecture are those of its weights.
Lengths are given in steps, tokens or epochs: one of the three.
"""

from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    """The base experiment; it names no model size and no length of the run."""
    keys = {
        'model': _model(),
        'data': _data(),
        'optimizer': _optimizer(),
        'schedule': _schedule(),
        'train': _train(),
        'eval': {
            'every_steps': 500,  # over the whole validation split, and at the end; 0: at the end alone
            'batch_size': placeholder(int),  # sequences; unset: that of a micro-batch
        },
        'checkpoint': {
            'every_steps': 500,  # and at the end, and where validation is best so far; 0: only then
            'keep_latest': 1,  # of the newest
            'keep_best': 1,  # of the lowest validation loss; 0: none is saved for being best
        },
        'mesh': {
            'data': -1,  # devices that split the batch; -1: all that the other axes leave
            'fsdp': 1,  # devices that split the batch and the parameters
            'tensor': 1,  # devices that split heads, MLP width and vocabulary
            'context': 1,  # devices that split a sequence's tokens
        },
        'precision': {'compute': 'f32'},  # 'f32', 'bf16', or 'fp16' with dynamic loss scaling; parameters stay f32
        'preview': {
            'every_steps': 500,  # to samples.txt, and at the end; 0: at the end alone
            'prompt': '',  # of the sampled preview; empty: starts a new document
            'max_new_tokens': 64,  # of the sampled preview
            'temperature': 0.8,  # divides the logits
            'top_k': 50,  # likeliest tokens drawn from; 0: all
        },
    }
    return ml_collections.ConfigDict(keys)


def _model() -> dict[str, Any]:
    """The architecture, and how its layers are run."""
    return {
        'version': 'gpt2',  # 'gpt2' or 'gpt3': whose recipe fills the unset keys
        'preset': placeholder(str),  # a published size, e.g. 'gpt2-small' (models/config.py)
        'vocab_size': placeholder(int),  # unset: the tokenizer's
        'block_size': placeholder(int),  # context, in tokens; unset: the preset's
        'n_layer': placeholder(int),  # unset: the preset's
        'n_head': placeholder(int),  # unset: the preset's
        'd_model': placeholder(int),  # unset: the preset's
        'mlp_expansion': placeholder(int),  # the MLP's width as a multiple of d_model; unset: 4
        'dropout': placeholder(float),  # the four rates below, where they are unset (recipe)
        'embedding_dropout': placeholder(float),  # on token + position embeddings
        'attention_dropout': placeholder(float),  # on the attention probabilities
        'mlp_dropout': placeholder(float),  # on the MLP's output
        'resid_dropout': placeholder(float),  # on the attention's output
        'attention_pattern': placeholder(str),  # 'dense', or 'alternating' with banded layers (recipe)
        'band_size': placeholder(int),  # tokens that a banded layer's query sees; unset: 256, which no paper gives
        'qkv_bias': placeholder(bool),  # of the projections to query, key and value; unset: True
        'attention_scale': placeholder(float),  # on query x key; unset: 1 / sqrt(head width)
        'tie_embeddings': placeholder(bool),  # the output head is the token embedding; unset: True
        'layer_norm_epsilon': placeholder(float),  # added to the variance; unset: 1e-5
        'remat': 'none',  # kept for the backward pass: 'none' all, 'dots' and 'names' some, 'full' layer inputs
        'scan_layers': False,  # one compiled block for all layers: compiles sooner, for deep models
    }


def _data() -> dict[str, Any]:
    """What is trained on, and how it is cut into tokens."""
    return {
        'corpus': 'python_docs',  # a name (data/corpora.py lists them), or 'hub:REPO[@REVISION][:CONFIG]'
        'mixture': placeholder(str),  # several, in place of the corpus: 'python_docs:0.7,notes.txt:0.3' (weights)
        'path': placeholder(str),  # local .txt, .jsonl[.gz, .zst] or .parquet, also '*.txt', in place of the corpus
        'column': 'text',  # of parquet and JSON lines: where the text stands
        'documents': 'whole',  # plain text is 'whole' (its last tenth held out), or a document a 'file' or 'block'
        'validation_fraction': placeholder(float),  # held out, by the hash of a document; unset: the corpus's own
        'invalid_bytes': 'refuse',  # or 'replace': by U+FFFD, counted; what is no UTF-8
        'streaming': False,  # read the hub's files over the network, keeping none of them
        # 'bpe' (trained on the corpus), 'char', 'gpt2', or a folder with GPT-2's files
        'tokenizer': placeholder(str),  # unset: that of train.init_from, else 'bpe'
        'vocab_size': 4096,  # of a tokenizer that is trained
        'num_workers': placeholder(int),  # processes that prepare a large corpus; unset: one for each core
        'mask_documents': False,  # tokens see their own document alone; positions start again in each
        'cache_dir': placeholder(str),  # token shards; unset: gpt_jax/data in the user's cache folder
    }


def _optimizer() -> dict[str, Any]:
    """AdamW."""
    return {
        'learning_rate': placeholder(float),  # at its peak (recipe)
        'beta1': placeholder(float),  # Adam's first moment (recipe)
        'beta2': placeholder(float),  # Adam's second moment (recipe)
        'epsilon': placeholder(float),  # added to Adam's denominator (recipe)
        'weight_decay': placeholder(float),  # decoupled; on matrices and embeddings alone (recipe)
        'clip_norm': placeholder(float),  # of the global gradient; 0.0: no clipping (recipe)
    }


def _schedule() -> dict[str, Any]:
    """The learning rate over the run."""
    return {
        'warmup_steps': placeholder(int),  # linear, from 0 to the peak (recipe)
        'warmup_tokens': placeholder(int),  # the same in tokens (recipe)
        'warmup_epochs': placeholder(float),  # the same in epochs of the training split
        'decay_steps': placeholder(int),  # where the cosine ends, counted from step 0 (recipe, or the run's end)
        'decay_tokens': placeholder(int),  # the same in tokens (recipe)
        'decay_epochs': placeholder(float),  # the same in epochs
        'final_fraction': placeholder(float),  # of the peak: the floor that the cosine ends on (recipe)
    }


def _train() -> dict[str, Any]:
    """Length, batch and seed."""
    return {
        'init_from': placeholder(str),  # a checkpoint or Hugging Face directory to take the first weights from
        'steps': placeholder(int),  # the run's length: exactly one of these three
        'tokens': placeholder(int),  # the same in tokens
        'epochs': placeholder(float),  # the same in epochs of the training split
        'batch_size': placeholder(int),  # sequences of block_size tokens a step, over all devices (recipe)
        'accumulation_steps': 1,  # micro-batches that a step is cut into
        'seed': 0,  # of initialisation, order of the data, dropout and previews
        'log_every_steps': 10,  # rows of metrics.jsonl; the first and the last step have one as well
    }
