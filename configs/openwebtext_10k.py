"""GPT-2 small on 10 000 documents of OpenWebText, the PyTorch suite's small dataset.

    python -m gpt_jax.main --config=configs/openwebtext_10k.py

The corpus is 50 MB from the Hugging Face hub, once; wants a GPU. So little text is soon learned by heart: hence
dropout, and 5 epochs. configs/suite_mini.py is the suite's own example on it.
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """The gpt2 recipe with a batch of 32 and a learning rate to go with it; assumed, not tuned."""
    config = base()
    config.model.update(preset='gpt2-small', dropout=0.1, scan_layers=True)
    config.data.update(corpus='openwebtext_10k', tokenizer='gpt2')
    config.optimizer.update(learning_rate=3e-4, beta2=0.95, weight_decay=0.1)
    config.schedule.update(warmup_steps=100, final_fraction=0.1)
    config.train.update(epochs=5.0, batch_size=32)
    config.precision.compute = 'bf16'
    config.eval.update(every_steps=250, batch_size=32)
    config.checkpoint.every_steps = 250
    config.preview.every_steps = 250
    return config
