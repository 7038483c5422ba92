"""GPT-3 of any size, by the paper's recipe.

    python -m gpt_jax.main --config=configs/gpt3.py:1.3b --config.mesh.fsdp=8

SIZE is one of the paper's 125m 350m 760m 1.3b 2.7b 6.7b 13b 175b, or of the PyTorch suite's ada babbage curie davinci.
300 billion tokens; the paper's corpus is not public, OpenWebText stands in for it. What no single device holds comes
with a mesh and rematerialisation that the TPU compiler certified for slices of v5p (docs/SCALING.md): 13b for 4x8x8,
175b for 8x8x20. `python -m gpt_jax.plan --search` finds them for other devices.
"""

import ml_collections

from gpt_jax.config import base

SIZES = ('125m', '350m', '760m', '1.3b', '2.7b', '6.7b', '13b', '175b', 'ada', 'babbage', 'curie', 'davinci')


def get_config(size: str = '125m') -> ml_collections.ConfigDict:
    """Everything that the paper tells is in the gpt3 recipe (gpt_jax/training/recipe.py)."""
    if size not in SIZES:
        raise ValueError(f'there is no size {size!r}; choose one of {", ".join(SIZES)}')
    config = base()
    config.model.update(version='gpt3', preset=f'gpt3-{size}', scan_layers=True)
    config.data.update(corpus='openwebtext', tokenizer='gpt2')
    config.train.tokens = 300_000_000_000  # paper: GPT-3, table 2.1
    config.precision.compute = 'bf16'
    if size == '6.7b':
        config.mesh.update(data=1, fsdp=-1)
        config.model.remat = 'names'
    if size == '13b':
        # Parts of 80 of the 5,120 rows: of thinner ones the TPU compiler makes all-reduces of whole matrices.
        config.mesh.update(data=-1, fsdp=64)
        config.model.remat = 'names'
    if size in ('175b', 'davinci'):
        # 1,600 sequences are 5 at once for each 64 x 5 devices; 256 chips of 95 GiB do as well, with data=1.
        config.mesh.update(data=-1, fsdp=64, tensor=4)
        config.model.remat = 'names'
        config.train.accumulation_steps = 5
    config.eval.every_steps = 5000
    config.checkpoint.every_steps = 5000
    config.preview.every_steps = 5000
    return config
