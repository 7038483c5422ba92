"""GPT-2 small on WikiText-103, the PyTorch suite's large dataset.

    python -m gpt_jax.main --config=configs/wikitext_103.py

The corpus is 540 MB of Wikipedia's articles from the Hugging Face hub, once, with a validation split of its own; wants
a GPU.
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """The gpt2 recipe with a batch of 64 and a learning rate to go with it; assumed, not tuned."""
    config = base()
    config.model.update(preset='gpt2-small', dropout=0.1, scan_layers=True)
    config.data.update(corpus='wikitext_103', tokenizer='gpt2')
    config.optimizer.update(learning_rate=6e-4, beta2=0.95, weight_decay=0.1)
    config.schedule.update(warmup_steps=500, final_fraction=0.1)
    config.train.update(epochs=5.0, batch_size=64, accumulation_steps=2)
    config.precision.compute = 'bf16'
    config.eval.update(every_steps=500, batch_size=32)
    config.checkpoint.every_steps = 500
    config.preview.every_steps = 500
    return config
