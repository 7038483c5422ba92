"""The compiled loop: read the last token, choose the next one, until enough are chosen or every row has ended."""

import functools

import flax
import jax
import jax.numpy as jnp

from gpt_jax.inference.engine import Seen, read
from gpt_jax.inference.sampling import Chain
from gpt_jax.models import GPT
from gpt_jax.parallel import activate


@flax.struct.dataclass
class State:
    """A batch on the device. Texts are prompts with what was chosen after them, padded at their end."""

    seen: Seen  # all but the last token of each text, or of the part of it that is still looked at
    tokens_BL: jax.Array
    logprobs_BL: jax.Array
    lengths_B: jax.Array  # of texts
    prompts_B: jax.Array  # lengths of prompts
    done_B: jax.Array
    keys_B: jax.Array


@jax.jit
def row_keys(seed: int, draws_B2: jax.Array) -> jax.Array:
    """A key for each (prompt, sample): the same whatever batch it is in."""

    def one(draw_2):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draw_2[0]), draw_2[1])

    return jax.vmap(one)(draws_B2)


def _append(state: State, logits_BV: jax.Array, end_of_text, max_new_tokens, chain: Chain) -> State:
    """Chooses a token for each row that goes on."""
    new_B = state.lengths_B - state.prompts_B
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, new_B)
    token_B = chain.choose(keys_B, logits_BV, state.tokens_BL, state.lengths_B, new_B)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]
    # A slot that does not exist takes nothing.
    slot_B = jnp.where(state.done_B, state.tokens_BL.shape[1], state.lengths_B)
    rows_B = jnp.arange(slot_B.size)
    ended_B = (token_B == end_of_text) | (new_B + 1 >= max_new_tokens)
    return state.replace(
        tokens_BL=state.tokens_BL.at[rows_B, slot_B].set(token_B, mode='drop'),
        logprobs_BL=state.logprobs_BL.at[rows_B, slot_B].set(logprob_B, mode='drop'),
        lengths_B=jnp.where(state.done_B, state.lengths_B, state.lengths_B + 1),
        done_B=state.done_B | ended_B,
    )


@functools.partial(jax.jit, donate_argnames='state')
def choose_first(state: State, logits_BV, end_of_text, max_new_tokens, chain) -> State:
    """The token after a prefill, of each row that goes on; arguments as of `decode`."""
    return _append(state, logits_BV, end_of_text, max_new_tokens, chain)


@functools.partial(jax.jit, static_argnames=('model', 'mesh'), donate_argnames='state')
def decode(
    model: GPT, mesh, params, state: State, steps, end_of_text, max_new_tokens, chain: Chain
) -> tuple[jax.Array, State]:
    """At most `steps` tokens more for each row.

    Args:
      model, mesh, params: of an engine.
      state: donated.
      steps: how many at most; the cache has that many slots left.
      end_of_text, max_new_tokens: what ends a row.
      chain: how tokens are chosen.

    Returns:
      The steps taken, fewer where no row goes on or one that does has no position left; and the state after them.
    """
    block_size = model.config.block_size

    def unfinished(carry):
        count, state = carry
        full_B = ~state.done_B & (state.seen.lengths_B >= block_size)
        return (count < steps) & ~jnp.all(state.done_B) & ~jnp.any(full_B)

    def step(carry):
        count, state = carry
        last_B1 = jnp.take_along_axis(state.tokens_BL, state.lengths_B[:, None] - 1, axis=1)
        logits_BTV, seen = read(model, params, state.seen, last_B1, ~state.done_B)
        state = state.replace(seen=seen)
        return count + 1, _append(state, logits_BTV[:, 0], end_of_text, max_new_tokens, chain)

    with activate(mesh):
        return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))
