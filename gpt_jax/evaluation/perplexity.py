"""Perplexity of a text of any length, by windows that slide over it.

A window is `context` consecutive predictions: it reads the tokens s ... s + context - 1 and predicts the tokens
s + 1 ... s + context. The first one starts at 0, each next one `stride` tokens later; of all but the first, only the
last `stride` predictions count. So every token of the text but the first is scored exactly once: those of the first
window after all that stands before them, every other one after at least context - stride + 1 tokens.

`stride=1` gives every token as much context as the model takes, at the price of a window for each; `stride=context`
cuts the text into windows that do not overlap, as the validation loss of training does.

Hugging Face's guide ("Perplexity of fixed-length models") slides windows of `max_length` tokens, whose first one has
no prediction. With the same stride its numbers are those of `context = max_length - 1` here.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.models import GPT
from gpt_jax.parallel import activate, batch_sharding, replicated
from gpt_jax.parallel.devices import host_memory, memory_of

# A loss above this is a perplexity beyond float64.
LARGEST_EXPONENT = 700.0
# The least that a batch takes: of each token on the host, and on a device, in vectors of d_model numbers.
BATCH_BYTES, LAYER_VECTORS = 24, 8

TokenLosses = Callable[[np.ndarray, np.ndarray], Any]


def model_losses(model: GPT, params: Any, mesh: Mesh | None = None) -> TokenLosses:
    """The function (tokens_BT, targets_BT) -> losses [batch, time] in nats, compiled once for each shape.

    With a `mesh`, over which `params` are split, the rows of a batch are split over its data axes. Rows that do not
    divide are filled up with copies of others.
    """
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    token_bytes = LAYER_VECTORS * model.config.d_model * np.dtype(model.config.dtype).itemsize
    memory = memory_of(devices)

    if mesh is None:

        def losses_of_one(tokens_BT: np.ndarray, targets_BT: np.ndarray) -> jax.Array:
            _check_memory(*tokens_BT.shape, tokens_BT.size * token_bytes, memory)
            return _losses(model, None, params, tokens_BT, targets_BT)

        return losses_of_one

    def place(array_BT: np.ndarray) -> jax.Array:
        filled_BT = np.resize(array_BT, (divisible_batch(len(array_BT), mesh), array_BT.shape[1]))
        return jax.make_array_from_callback(filled_BT.shape, batch_sharding(mesh), filled_BT.__getitem__)

    def losses(tokens_BT: np.ndarray, targets_BT: np.ndarray) -> jax.Array:
        _check_memory(*tokens_BT.shape, tokens_BT.size * token_bytes, memory)
        return _losses(model, mesh, params, place(tokens_BT), place(targets_BT))[: len(tokens_BT)]

    return losses


def divisible_batch(rows: int, mesh: Mesh | None) -> int:
    """The least batch of at least `rows` that the data axes of a mesh divide."""
    devices = 1 if mesh is None else mesh.shape['data'] * mesh.shape['fsdp']
    return -(-rows // devices) * devices


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(model, mesh, params, tokens_BT, targets_BT):
    with activate(mesh):
        losses_BT = model.apply({'params': params}, tokens_BT, targets_BT, method='token_losses')
    # Each process reads the losses of all rows.
    return losses_BT if mesh is None else jax.lax.with_sharding_constraint(losses_BT, replicated(mesh))


def strided_losses(
    token_losses: TokenLosses,
    tokens: Sequence[int],
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The loss of each token but the first, in nats: float32 [len(tokens) - 1].

    Args:
      token_losses: (tokens, targets), both int32 [batch, time], time at most `context` -> losses [batch, time], each
        target predicted from the tokens up to its position. It sees few shapes: a short text is padded to a power of
        two.
      tokens: ids of the text, at least two.
      context: predictions of a window, and with them the most tokens that one is made from.
      stride: tokens from the start of a window to that of the next, 1 to `context` (default: half of it, rounded up).
      batch_size: windows at a time.
      report: called with the number of windows done and their total.

    Raises:
      InputError: fewer than two tokens, or a number out of range.
    """
    stride = (context + 1) // 2 if stride is None else stride
    _check(len(tokens), context, stride, batch_size)
    predictions = len(tokens) - 1
    starts = np.arange(1 + max(0, math.ceil((predictions - context) / stride))) * stride
    # Powers of two: a program is compiled for each shape, and texts have any length.
    rows = min(batch_size, 1 << (len(starts) - 1).bit_length())
    width = min(context, 1 << (predictions - 1).bit_length())
    _check_memory(rows, width, rows * width * BATCH_BYTES, host_memory())
    padded = np.zeros(starts[-1] + width + 1, np.int32)
    padded[: len(tokens)] = tokens
    losses = np.empty(predictions, np.float32)

    def keep(first: int, losses_BT: Any) -> None:
        for start, losses_T in zip(starts[first : first + rows], np.asarray(losses_BT), strict=False):
            begin = start + context - stride if start else 0
            end = min(start + context, predictions)
            losses[begin:end] = losses_T[begin - start : end - start]
        report(min(first + rows, len(starts)), len(starts))

    pending = None
    for first in range(0, len(starts), rows):
        # Rows beyond the last window repeat it.
        rows_B = starts[np.minimum(np.arange(first, first + rows), len(starts) - 1)]
        positions_BT = rows_B[:, None] + np.arange(width)
        dispatched = first, token_losses(padded[positions_BT], padded[positions_BT + 1])
        if pending is not None:  # one batch behind, so that the device never waits for the host
            keep(*pending)
        pending = dispatched
    keep(*pending)
    return losses


def text_perplexity(
    token_losses: TokenLosses,
    tokenizer: Tokenizer,
    text: str,
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    parse_special: bool = False,
) -> dict[str, float | int]:
    """How well a text is predicted; arguments as for `strided_losses`.

    With `parse_special`, special tokens that stand in the text literally are these tokens.

    Returns:
      `loss` in nats a token, `perplexity` (its exponential), `bits_per_byte` of the UTF-8 text, and what was scored:
      `tokens`, `words` (between white space) and `bytes` of the text without its first token, which nothing precedes;
      `stride` and `context` as they were used. The perplexity of a word is exp(loss * tokens / words).

    Raises:
      InputError: the text has fewer than two tokens, a number is out of range, or the loss is not finite.
    """
    tokens = tokenizer.encode(text, special=parse_special)
    losses = strided_losses(token_losses, tokens, context, stride, batch_size, report)
    nats = float(losses.sum(dtype=np.float64))
    if not math.isfinite(nats):
        raise InputError(
            f'token {int(np.flatnonzero(~np.isfinite(losses))[0]) + 1} of the text has a loss that is not finite; '
            'the model has diverged, use an earlier checkpoint'
        )
    scored = _without_first(text, tokenizer.token_bytes(tokens[0]))
    loss = nats / len(losses)
    return {
        'loss': loss,
        'perplexity': math.exp(min(loss, LARGEST_EXPONENT)),
        'bits_per_byte': nats / math.log(2) / max(len(scored), 1),
        'tokens': len(losses),
        'words': sum(1 for _ in re.finditer(rb'\S+', scored)),
        'bytes': len(scored),
        'stride': (context + 1) // 2 if stride is None else stride,
        'context': context,
    }


def _check_memory(rows: int, width: int, needed: int, memory: int) -> None:
    """Raises InputError where a batch takes more memory than there is at all."""
    if needed > memory:
        raise InputError(
            f'batch_size={rows} windows of {width} tokens take at least {needed / 1e9:,.1f} GB, and there are '
            f'{memory / 1e9:,.1f} GB; use a smaller batch_size'
        )


def _check(count: int, context: int, stride: int, batch_size: int) -> None:
    for name, value in (('context', context), ('batch_size', batch_size)):
        if value < 1:
            raise InputError(f'{name}={value} must be at least 1')
    if not 1 <= stride <= context:
        raise InputError(f'stride={stride} must be at least 1 and at most context={context}: tokens would be left out')
    if count < 2:
        raise InputError(f'the text has {count} tokens, and the first is never scored; give a text of at least 2')


def _without_first(text: str, first: bytes) -> bytes:
    """UTF-8 of `text` after its first token, which stands for one character where the vocabulary does not know it."""
    data = text.encode()
    return data[len(first) :] if data.startswith(first) else text[1:].encode()
