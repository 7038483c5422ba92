"""A first GPT: learns the Python documentation on two CPU cores within five minutes, then writes some.

python -m gpt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """Four layers, 192 wide, on the embedded corpus."""
    config = base()
    config.model.update(block_size=128, n_layer=4, n_head=6, d_model=192, dropout=0.0)
    config.data.vocab_size = 2048
    config.optimizer.update(learning_rate=3e-3, beta2=0.95, weight_decay=0.1)
    config.schedule.update(warmup_steps=50, final_fraction=0.1)
    config.train.update(steps=500, batch_size=16)
    config.eval.update(every_steps=250, batch_size=64)
    config.checkpoint.every_steps = 250
    config.preview.update(every_steps=250, prompt='Return ', max_new_tokens=80)
    return config
