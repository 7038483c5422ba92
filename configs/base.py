"""The experiment that every other one is a change of; gpt_jax/config.py says what each key means.

    python -m gpt_jax.main --config=configs/NAME.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]
    python -m gpt_jax.main --help_config

"Unset" keys are placeholders. Those marked "recipe" are filled in by the recipe of `model.version`
(gpt_jax/training/recipe.py gives each value's source). The command line wins over the experiment file, and the file
over the recipe. With `train.init_from` or `checkpoint.restore_from` the unset keys of the architecture are those of the
weights there. Lengths are given in steps, tokens or epochs: one of the three.
"""

import ml_collections

from gpt_jax.config import base


def get_config() -> ml_collections.ConfigDict:
    """All keys with their defaults; it names no model size and no length of the run."""
    return base()
