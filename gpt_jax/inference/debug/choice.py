"""What each filter does to the logits, one after another, and the draw that follows: those of `generate`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.inference.buckets import bucket
from gpt_jax.inference.debug.moment import Moment, log_softmax
from gpt_jax.inference.loop import row_keys
from gpt_jax.inference.sampling import Chain, Sampling

MODEL = 'model'


def choose(
    sampling: Sampling, logits_V: np.ndarray, tokens: Sequence[int], new: int, end_of_text: int, seed: int
) -> Moment:
    """The choice that `generate` makes of the next token, in the first sample of its first prompt.

    Args:
      sampling: the settings.
      logits_V: the model's logits.
      tokens: prompt and text so far.
      new: how many of them are new.
      end_of_text: the token that ends a text.
      seed: of the draws.

    Raises:
      InputError: `sampling` names a token that the vocabulary has not.
    """
    chain = sampling.chain(len(logits_V), end_of_text)
    padded_1L = np.zeros((1, bucket(len(tokens))), np.int32)
    padded_1L[0, : len(tokens)] = tokens
    counts = (np.array([len(tokens)], np.int32), np.array([new], np.int32))
    keys_1 = row_keys(seed, np.zeros((1, 2), np.int32))
    logits_SV, chosen = _stages(chain, logits_V[None], padded_1L, *counts, keys_1)
    names = (MODEL, *(_named(sampling, name) for name in chain.used))
    return Moment(names, log_softmax(logits_SV), int(chosen))


@jax.jit
def _stages(chain: Chain, logits_1V, tokens_1L, lengths_1, new_1, keys_1) -> tuple[jax.Array, jax.Array]:
    steps = [logits_1V]
    for _, filter_ in (*chain.processors(tokens_1L, lengths_1, new_1), *chain.warpers()):
        steps.append(filter_(steps[-1]))
    keys_1 = jax.vmap(jax.random.fold_in)(keys_1, new_1)
    return jnp.concatenate(steps), chain.choose(keys_1, logits_1V, tokens_1L, lengths_1, new_1)[0]


def _named(sampling: Sampling, name: str) -> str:
    value = getattr(sampling, name)
    return f'{name}={value:g}' if isinstance(value, int | float) else name
