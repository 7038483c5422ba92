"""Fine-tune GPT-2 on a text: nanoGPT's values, on weights and a file that you name.

    python -m gpt_jax.main --config=configs/finetune_gpt2.py --config.train.init_from=DIR --config.data.path=FILE

DIR holds GPT-2 of any size as Hugging Face has it, or is a checkpoint; its tokenizer cuts the text. 20 steps of 32
sequences, one at a time. On N devices --config.train.accumulation_steps is 32 / N.
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """The values of karpathy/nanoGPT's config/finetune_shakespeare.py, and of its train.py where that says nothing."""
    config = base()
    config.model.update(dropout=0.0, scan_layers=True)
    config.data.path = 'tinyshakespeare.txt'
    config.optimizer.update(learning_rate=3e-5, beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.schedule.update(warmup_steps=0, final_fraction=1.0)  # constant
    config.train.update(init_from='gpt2-xl', steps=20, batch_size=32, accumulation_steps=32, log_every_steps=1)
    config.eval.every_steps = 5
    config.checkpoint.every_steps = 0  # only where validation is best so far, and at the end
    config.precision.compute = 'bf16'
    config.preview.every_steps = 20
    return config
