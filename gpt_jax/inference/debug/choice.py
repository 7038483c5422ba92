"""What each filter does to the logits, one after another, and the draw that follows: those of `generate`."""

from collections.abc import Sequence

import jax
import numpy as np

from gpt_jax.inference import sampling as sampling_lib
from gpt_jax.inference.decode import Sampling

MODEL = 'model'


def stages(sampling: Sampling, logits_V: np.ndarray, tokens: Sequence[int], new: int) -> list[tuple[str, np.ndarray]]:
    """The model's logits and those after each filter in use, by name and in order.

    Args:
      sampling: the filters' settings.
      logits_V: the model's logits of the next token.
      tokens: prompt and text so far.
      new: how many of them are new.
    """
    steps = [(MODEL, logits_V)]
    if sampling.greedy:
        return steps
    steps.append(
        (f'temperature={sampling.temperature:g}', sampling_lib.apply_temperature(logits_V, sampling.temperature))
    )
    if sampling.top_k:
        steps.append((f'top_k={sampling.top_k}', sampling_lib.keep_top_k(steps[-1][1], sampling.top_k)))
    if sampling.top_p < 1:
        steps.append((f'top_p={sampling.top_p:g}', sampling_lib.keep_top_p(steps[-1][1], sampling.top_p)))
    return [(name, np.asarray(logits)) for name, logits in steps]


def draw(sampling: Sampling, logits_V: np.ndarray, seed: int, new: int) -> int:
    """The token that `generate` takes as its `new`-th (from 0) in the first sample of that seed.

    Args:
      sampling: says whether anything is drawn at all.
      logits_V: after all filters.
      seed, new: of the draw.
    """
    if sampling.greedy:
        return int(sampling_lib.greedy(logits_V))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), new)
    return int(sampling_lib.categorical(key[None], logits_V[None])[0])
