"""What a model and each filter make of the next token, and the draw that follows: those of `generate`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data import Tokenizer
from gpt_jax.inference.engine import check_finite, pack, padded_length
from gpt_jax.inference.generate import row_keys
from gpt_jax.inference.sampling import Chain, Sampling
from gpt_jax.models import GPT, attention_maps, lens_logits, residual_streams, unstack_layers

MODEL = 'model'


class ModelInspector:
    """Looks at a GPT after one text at a time; the last text's residual streams are kept.

    Ids that the tokenizer has no token for have logits of -inf, as in `Engine`.

    The debugger knows a model by these names alone, so that it is tested on a toy.

    Attributes:
      n_layer, n_head, block_size: as in GPTConfig.
    """

    def __init__(self, model: GPT, params: Any, tokenizer: Tokenizer | None = None):
        self.n_layer, self.n_head = model.config.n_layer, model.config.n_head
        self.block_size = model.config.block_size
        self._model, self._params = model, unstack_layers(params)
        size = model.config.vocab_size
        self._is_token_V = np.ones(size, bool) if tokenizer is None else tokenizer.is_token(size)
        self._last: tuple[tuple[int, ...], jax.Array | None] = ((), None)

    def lens(self, tokens: Sequence[int]) -> np.ndarray:
        """What each layer would say comes next: logits float32 [n_layer + 1, vocab].

        The first are those of the embeddings, the last the model's own.
        """
        streams_L1TD = self._look(tokens)
        logits = lens_logits(self._model, self._params, streams_L1TD[:, :, len(tokens) - 1][:, :, None])
        return np.where(self._is_token_V, np.asarray(logits)[:, 0, 0], np.float32(-np.inf))

    def attention(self, tokens: Sequence[int], layer: int) -> np.ndarray:
        """Attention probabilities of a layer (from 0), float32 [n_head, time, keys]."""
        maps_1NTS = attention_maps(self._model, self._params, self._look(tokens), layer)
        return np.asarray(maps_1NTS)[0, :, : len(tokens), : len(tokens)]

    def _look(self, tokens: Sequence[int]) -> jax.Array:
        text, streams_L1TD = self._last
        if streams_L1TD is None or tuple(tokens) != text:
            # One of few lengths, so that a session compiles few programs.
            tokens_1T, _ = pack([tokens], padded_length(len(tokens), self.block_size))
            streams_L1TD = residual_streams(self._model, self._params, tokens_1T)
            self._last = (tuple(tokens), streams_L1TD)  # together: Ctrl-C may come between any two lines
        return streams_L1TD


@dataclasses.dataclass(frozen=True, eq=False)
class TokenChoice:
    """The choice of the next token, with all that led to it.

    Attributes:
      names: of the distributions: the model's, then after each filter.
      logprobs_SV: their log-probabilities in nats, float64 [len(names), vocab]; -inf: dropped.
      chosen: the token that was drawn, or is the likeliest.
    """

    names: tuple[str, ...]
    logprobs_SV: np.ndarray
    chosen: int

    @property
    def probabilities(self) -> np.ndarray:
        """[len(names), vocab]."""
        return np.exp(self.logprobs_SV)

    @property
    def entropies(self) -> np.ndarray:
        """Entropy of each distribution, in nats."""
        return entropy(self.logprobs_SV)

    @property
    def kept(self) -> np.ndarray:
        """How many tokens each distribution has left."""
        return np.isfinite(self.logprobs_SV).sum(axis=-1)

    def rank(self, token: int) -> int:
        """1 for the token that the model finds likeliest; of equals the lower id comes first."""
        return rank(self.logprobs_SV[0], token)


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, over the last axis."""
    logits_V = np.asarray(logits_V, np.float64)
    logits_V = logits_V - logits_V.max(axis=-1, keepdims=True)
    return logits_V - np.log(np.exp(logits_V).sum(axis=-1, keepdims=True))


def entropy(logprobs_V: np.ndarray) -> np.ndarray:
    """-sum p log p in nats, over the last axis; what was dropped adds nothing."""
    return -(np.exp(logprobs_V) * np.where(np.isfinite(logprobs_V), logprobs_V, 0.0)).sum(axis=-1)


def rank(scores_V: np.ndarray, token: int) -> int:
    """The place of `token`, from 1, in descending order of scores; of equals the lower id comes first."""
    return 1 + int((scores_V > scores_V[token]).sum()) + int((scores_V[:token] == scores_V[token]).sum())


def likeliest(scores_V: np.ndarray, count: int) -> np.ndarray:
    """The `count` ids of the highest scores, in that order."""
    return np.argsort(-scores_V, kind='stable')[:count]


def choose(
    sampling: Sampling, logits_V: np.ndarray, tokens: Sequence[int], new: int, ends: int | Sequence[int], seed: int
) -> TokenChoice:
    """The choice that `generate` makes of the next token, in the first sample of its first prompt.

    Args:
      sampling: the settings.
      logits_V: the model's logits.
      tokens: prompt and text so far.
      new: how many of them are new.
      ends: the token that ends a text, or all that do.
      seed: of the draws.

    Raises:
      InputError: `sampling` names a token that the vocabulary has not, or the logits are not finite.
    """
    check_finite(logits_V)
    chain = sampling.chain(len(logits_V), ends)
    tokens_1L, lengths_1 = pack([tokens], padded_length(len(tokens)))
    keys_1 = row_keys(np.uint32(seed), np.zeros((1, 2), np.int32))
    logits_SV, chosen = _stages(chain, logits_V[None], tokens_1L, lengths_1, np.array([new], np.int32), keys_1)
    names = (MODEL, *(_named(sampling, name) for name in chain.used))
    return TokenChoice(names, log_softmax(logits_SV), int(chosen))


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
