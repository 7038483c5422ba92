"""GPT-2 xl, 1.56B parameters, on OpenWebText.

    python -m gpt_jax.main --config=configs/gpt2_xl.py

The paper's batch of 512 sequences of 1024 tokens, in 32 micro-batches; about 9 epochs of OpenWebText.
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """The gpt2 recipe; length, weight decay and learning rate are nanoGPT's, which reproduce OpenAI's loss."""
    config = base()
    config.model.preset = 'gpt2-xl'
    config.model.dropout = 0.0
    config.model.scan_layers = True
    config.data.update(corpus='openwebtext', tokenizer='gpt2')
    config.optimizer.update(learning_rate=6e-4, beta2=0.95, weight_decay=0.1)
    config.schedule.update(warmup_steps=2000, final_fraction=0.1)
    config.train.update(steps=150_000, accumulation_steps=32, log_every_steps=10)
    config.precision.compute = 'bf16'
    config.eval.update(every_steps=2000, batch_size=32)
    config.checkpoint.every_steps = 2000
    config.preview.every_steps = 2000
    return config
