"""What a run measures and shows of itself: the validation loss, and previews of what it has learned."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gpt_jax.data import Prepared, Tokenizer, validation_batches
from gpt_jax.models import GPT
from gpt_jax.training.step import Batch, compiler_options

PREVIEW_TOKENS = 48


def evaluate(
    eval_step: Callable[[Any, Batch], dict[str, jax.Array]],
    put_batch: Callable[[dict[str, Any]], Batch],
    params: Any,
    data: Prepared,
    batch_size: int,
    block_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss over the whole validation split, each token predicted once within its window.

    Returns:
      `val_loss` in nats a token, `val_perplexity`, and `val_bits_per_byte` of the split's UTF-8 text; None where
      `should_stop` became true on the way.
    """
    nats, tokens, pending = 0.0, 0.0, None
    batches = validation_batches(data.validation, batch_size, block_size, jax.process_index(), jax.process_count())
    for batch in batches:
        if should_stop():
            return None
        dispatched = eval_step(params, put_batch(batch))
        if pending is not None:  # one batch behind, so that the device never waits and never runs far ahead
            nats, tokens = nats + float(pending['loss']), tokens + float(pending['tokens'])
        pending = dispatched
    nats, tokens = nats + float(pending['loss']), tokens + float(pending['tokens'])
    # The first token of the split is never predicted.
    predicted_bytes = data.validation_bytes - len(data.tokenizer.token_bytes(int(data.validation[0])))
    loss = nats / tokens
    return {
        'val_loss': loss,
        'val_perplexity': math.exp(min(loss, 700.0)),
        'val_bits_per_byte': nats / math.log(2) / max(predicted_bytes, 1),
    }


def make_teacher_forced_preview(model: GPT, data: Prepared) -> Callable[[Any], dict[str, str]]:
    """A function of the parameters that shows the start of the validation split beside the model's guesses.

    At each place the model sees the true text so far; its guess is the likeliest next token.
    """
    count = min(PREVIEW_TOKENS, model.config.block_size, len(data.validation) - 1)
    tokens_1T = np.asarray(data.validation[: count + 1], np.int32)[None]
    guess = jax.jit(
        lambda params, tokens: model.apply({'params': params}, tokens).argmax(-1), compiler_options=compiler_options()
    )

    def preview(params: Any) -> dict[str, str]:
        guesses = np.asarray(guess(params, tokens_1T[:, :-1]))[0]
        truth = tokens_1T[0, 1:]
        right = int((guesses == truth).sum())
        return {
            'text': data.tokenizer.decode(truth),
            f'guessed token by token ({right} of {count} right)': _side_by_side(data.tokenizer, guesses),
        }

    return preview


def _side_by_side(tokenizer: Tokenizer, guesses: np.ndarray) -> str:
    return tokenizer.decode(guesses)
