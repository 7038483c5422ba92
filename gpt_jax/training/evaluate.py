"""What a run measures and shows of itself: the validation loss, and previews of what it has learned."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.data import TrainingData, ValidationBatches, document_positions
from gpt_jax.models import GPT
from gpt_jax.parallel import global_batch, replicated
from gpt_jax.training.step import Batch, compiler_options

PREVIEW_TOKENS = 48


def evaluate(
    eval_step: Callable[[Any, Batch], dict[str, jax.Array]],
    mesh: Mesh,
    params: Any,
    data: TrainingData,
    batch_size: int,
    block_size: int,
    document_separator: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss over the whole validation split of each source, each token predicted once within its window.

    Returns:
      `val_loss` in nats a token, `val_perplexity`, and `val_bits_per_byte` of the split's UTF-8 text; None where
      `should_stop` became true on the way. Of a mixture, these are of text that has each source's tokens by its weight,
      and `val_loss_NAME` is that of one source.
    """
    losses, bytes_a_token = {}, {}
    for name, prepared in data.prepared.items():
        batches = ValidationBatches(prepared.validation, batch_size, block_size, document_separator)
        totals = _totals(eval_step, mesh, params, batches, should_stop)
        if totals is None:
            return None
        # The first token of the split is never predicted.
        first = data.tokenizer.token_bytes(int(prepared.validation[0]))
        losses[name] = totals[0] / totals[1]
        bytes_a_token[name] = max(prepared.validation_bytes - len(first), 1) / totals[1]
    loss, bytes_ = (
        sum(float(data.weights[name]) * value for name, value in values.items()) for values in (losses, bytes_a_token)
    )
    values = {
        'val_loss': loss,
        'val_perplexity': math.exp(min(loss, 700.0)),
        'val_bits_per_byte': loss / math.log(2) / bytes_,
    }
    return values | ({f'val_loss_{name}': value for name, value in losses.items()} if len(losses) > 1 else {})


def _totals(eval_step, mesh, params, batches, should_stop) -> tuple[float, float] | None:
    """Nats and tokens over all batches, or None where it is to stop."""
    nats, tokens, pending = 0.0, 0.0, None
    for step in range(len(batches)):
        if should_stop():
            return None
        shape = (batches.batch_size, batches.block_size)
        dispatched = eval_step(params, global_batch(functools.partial(batches.rows, step), shape, mesh))
        if pending is not None:  # one batch behind, so that the device never waits and never runs far ahead
            nats, tokens = nats + float(pending['loss']), tokens + float(pending['tokens'])
        pending = dispatched
    return nats + float(pending['loss']), tokens + float(pending['tokens'])


def make_teacher_forced_preview(
    model: GPT, data: TrainingData, mesh: Mesh, document_separator: int | None = None
) -> Callable[[Any], dict[str, str]]:
    """A function of the parameters that shows the start of the first validation split beside what the model predicts.

    At each token the model sees the true text so far; what it predicts is the likeliest next token.
    """
    validation = next(iter(data.prepared.values())).validation
    count = min(PREVIEW_TOKENS, model.config.block_size, len(validation) - 1)
    tokens_1T = np.asarray(validation[: count + 1], np.int32)[None]
    info = {}
    if document_separator is not None:
        info = dict(
            zip(('positions', 'documents'), document_positions(tokens_1T[:, :-1], document_separator), strict=True)
        )
    # A model may have more ids than the tokenizer has tokens: they stand for no text.
    vocab_size = data.tokenizer.vocab_size
    predict = jax.jit(
        lambda params, tokens: model.apply({'params': params}, tokens, **info)[..., :vocab_size].argmax(-1),
        out_shardings=replicated(mesh),  # or no process could read it where parameters are split over several
        compiler_options=compiler_options(mesh),
    )

    def preview(params: Any) -> dict[str, str]:
        predicted = np.asarray(predict(params, tokens_1T[:, :-1]))[0]
        truth = tokens_1T[0, 1:]
        right = int((predicted == truth).sum())
        return {
            'text': data.tokenizer.decode(truth),
            f'guessed token by token ({right} of {count} right)': data.tokenizer.decode(predicted),
        }

    return preview
