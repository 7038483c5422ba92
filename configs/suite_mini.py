"""The example run of the PyTorch suite: a small GPT-3-style model on OpenWebText-10k, for 10 epochs.

    python -m gpt_jax.main --config=configs/suite_mini.py

8 layers, 8 heads, 512 wide, context 256, batch 32. The corpus comes from the Hugging Face hub; wants a GPU.
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """Optimizer from the gpt3 recipe; its 375M tokens of warmup would outlast this run, so warmup and decay are own."""
    config = base()
    config.model.update(version='gpt3', block_size=256, n_layer=8, n_head=8, d_model=512, dropout=0.1)
    config.data.update(corpus='openwebtext_10k', vocab_size=32000)
    config.schedule.update(warmup_epochs=0.2, decay_epochs=10.0)
    config.train.update(epochs=10.0, batch_size=32)
    config.eval.every_steps = 1000
    config.checkpoint.every_steps = 1000
    config.preview.update(every_steps=1000, prompt="What's your name?")
    return config
