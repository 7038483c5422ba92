"""Characters of Shakespeare: nanoGPT's setting for a CPU, on a file that you name.

    python -m gpt_jax.main --config=configs/shakespeare_char.py --config.data.path=tinyshakespeare.txt

0.8 million parameters, 2 000 steps of 12 x 64 characters. The first 90 % of the file train, the last 10 % validate.
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """nanoGPT's hyper-parameters (its README, "i only have a macbook")."""
    config = base()
    config.model.update(block_size=64, n_layer=4, n_head=4, d_model=128, dropout=0.0)
    config.data.update(path='tinyshakespeare.txt', tokenizer='char')
    config.optimizer.update(learning_rate=1e-3, beta2=0.99, weight_decay=0.1)
    config.schedule.update(warmup_steps=100, final_fraction=0.1)
    config.train.update(steps=2000, batch_size=12, log_every_steps=50)
    config.eval.update(every_steps=250, batch_size=128)
    config.checkpoint.every_steps = 250
    config.preview.update(every_steps=1000, max_new_tokens=60, prompt='ROM')
    return config
