"""The whole job in seconds, to see that everything works; it learns next to nothing.

python -m gpt_jax.main --config=configs/smoke.py --workdir=/tmp/smoke
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """Two tiny layers, 20 steps."""
    config = base()
    config.model.update(block_size=32, n_layer=2, n_head=2, d_model=32, dropout=0.0)
    config.data.vocab_size = 512
    config.optimizer.learning_rate = 1e-2
    config.schedule.warmup_steps = 4
    config.train.update(steps=20, batch_size=8, log_every_steps=5)
    config.eval.update(every_steps=10, batch_size=512)
    config.checkpoint.every_steps = 10
    config.preview.update(every_steps=10, max_new_tokens=16)
    return config
