"""A model under observation."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.inference.buckets import bucket
from gpt_jax.models import GPT, attention_maps, lens_logits, residual_streams, unstack_layers


class Microscope:
    """Looks at a GPT after one text at a time; the last text's residual streams are kept.

    The debugger knows a model by these names alone, so that it is tested on a toy.

    Attributes:
      n_layer, n_head, block_size: as in GPTConfig.
    """

    def __init__(self, model: GPT, params: Any):
        self.n_layer, self.n_head = model.config.n_layer, model.config.n_head
        self.block_size = model.config.block_size
        self._model, self._params = model, unstack_layers(params)
        self._last: tuple[tuple[int, ...], jax.Array | None] = ((), None)

    def lens(self, tokens: Sequence[int]) -> np.ndarray:
        """What each layer would say comes next: logits float32 [n_layer + 1, vocab].

        The first are those of the embeddings, the last the model's own.
        """
        streams_L1TD = self._look(tokens)
        return np.asarray(lens_logits(self._model, self._params, streams_L1TD[:, :, len(tokens) - 1][:, :, None]))[
            :, 0, 0
        ]

    def attention(self, tokens: Sequence[int], layer: int) -> np.ndarray:
        """Attention probabilities of a layer (from 0), float32 [n_head, time, keys]."""
        maps_1NTS = attention_maps(self._model, self._params, self._look(tokens), layer)
        return np.asarray(maps_1NTS)[0, :, : len(tokens), : len(tokens)]

    def _look(self, tokens: Sequence[int]) -> jax.Array:
        text, streams_L1TD = self._last
        if streams_L1TD is None or tuple(tokens) != text:
            # One of few lengths, so that a session compiles few programs.
            padded_1T = np.zeros((1, bucket(len(tokens), self.block_size)), np.int32)
            padded_1T[0, : len(tokens)] = tokens
            streams_L1TD = residual_streams(self._model, self._params, padded_1T)
            self._last = (tuple(tokens), streams_L1TD)  # together: Ctrl-C may come between any two lines
        return streams_L1TD
