"""The compiled part of beam search: all texts of all groups and prompts, one token a step.

Shape suffixes beside the model's: P prompts, G groups of beams, K beams of a group, C candidates (2K) of a group,
R rows of the cache (P * G * K), L length of a text. Arrays without a suffix are [P, G, ...].
"""

import functools

import flax
import jax
import jax.numpy as jnp

from gpt_jax.inference.engine import Seen, read
from gpt_jax.inference.sampling import Chain
from gpt_jax.parallel import activate

# Added to the score of what must not be chosen: far below every score, but not so far that it swallows them all.
NEVER = -1e9
# Steps of one compiled loop: between two of them Ctrl-C is looked at.
STEPS_AT_A_TIME = 32


@flax.struct.dataclass
class Rules:
    """What a search is told besides its prompts: arrays, so that other numbers compile nothing new."""

    chain: Chain
    max_new_tokens: jax.Array
    length_penalty: jax.Array
    diversity_penalty: jax.Array
    ends_when_full: jax.Array  # early_stopping=True
    hopes_for_longest: jax.Array  # early_stopping='never', where longer texts score better
    prompts_P: jax.Array  # lengths of the prompts

    def normalize(self, scores: jax.Array, count: jax.Array) -> jax.Array:
        """Log-probabilities of texts of `count` new tokens as scores."""
        return scores / count.astype(jnp.float32) ** self.length_penalty


@flax.struct.dataclass
class Texts:
    """Texts [P, G, K or C, ...]: prompt and new tokens, the model's log-probabilities of tokens, scores."""

    tokens: jax.Array
    logprobs: jax.Array
    scores: jax.Array

    def take(self, index: jax.Array) -> 'Texts':
        """Those at `index` [P, G, any]."""
        return jax.tree.map(lambda array: _take(array, index), self)


@flax.struct.dataclass
class State:
    """A search between two steps.

    Attributes:
      seen: all but the last token of each open text, as rows.
      parents_R: the row of `seen` that each open text goes on from.
      count: new tokens of each open text.
      open: texts that have not ended, the best first; scores not normalized.
      ended: the best texts that have, the best first; where `has_ended` is False none is there.
      counts, has_ended: [P, G, K], new tokens of the ended texts.
      improvable: bool [P, G], whether an open text may still get among the ended ones.
    """

    seen: Seen
    parents_R: jax.Array
    count: jax.Array
    open: Texts
    ended: Texts
    counts: jax.Array
    has_ended: jax.Array
    improvable: jax.Array

    def is_searching(self, rules: Rules) -> jax.Array:
        """bool [P, G]: which groups can still change what they have found."""
        return self.improvable & ~(jnp.all(self.has_ended, axis=-1) & rules.ends_when_full)


@functools.partial(jax.jit, static_argnames=('groups', 'beams'))
def start(logits_PV, seen: Seen, tokens_PL, is_prompt_P, rules: Rules, groups: int, beams: int) -> State:
    """The first tokens, from the logits after each prompt; rows that are no prompt (`is_prompt_P`) end nothing."""
    rows_R = jnp.repeat(jnp.arange(logits_PV.shape[0]), groups * beams)
    shape = (logits_PV.shape[0], groups, beams)
    tokens = jnp.broadcast_to(tokens_PL[:, None, None], (*shape, tokens_PL.shape[1]))
    nothing = Texts(tokens, jnp.zeros(tokens.shape, jnp.float32), jnp.full(shape, NEVER, jnp.float32))
    state = State(
        seen=seen.rows(rows_R),
        parents_R=jnp.arange(rows_R.size),
        count=jnp.zeros((), jnp.int32),
        # All beams are the same now: only the first of each group is gone on from.
        open=nothing.replace(scores=nothing.scores.at[:, :, 0].set(0.0)),
        ended=nothing,
        counts=jnp.zeros(shape, jnp.int32),
        has_ended=jnp.zeros(shape, bool),
        improvable=jnp.broadcast_to(is_prompt_P[:, None], shape[:2]),
    )
    return _step(state, logits_PV[rows_R], rules)


@functools.partial(jax.jit, static_argnames=('model', 'mesh'), donate_argnames='state')
def advance(model, mesh, params, state: State, rules: Rules) -> State:
    """Some tokens more, for as long as any search goes on; `state` is donated."""

    def unfinished(carry):
        steps, state = carry
        return (steps < STEPS_AT_A_TIME) & goes_on(state, rules)

    def step(carry):
        steps, state = carry
        places_R = jnp.repeat(rules.prompts_P, state.parents_R.size // rules.prompts_P.size) + state.count - 1
        tokens_RL = state.open.tokens.reshape(places_R.size, -1)
        last_R1 = jnp.take_along_axis(tokens_RL, places_R[:, None], axis=1)
        logits_R1V, seen = read(model, params, state.seen.rows(state.parents_R), last_R1)
        return steps + 1, _step(state.replace(seen=seen), logits_R1V[:, 0], rules)

    with activate(mesh):
        return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]


@jax.jit
def goes_on(state: State, rules: Rules) -> jax.Array:
    """Whether any search has a step to take."""
    return (state.count < rules.max_new_tokens) & jnp.any(state.is_searching(rules))


def _step(state: State, logits_RV: jax.Array, rules: Rules) -> State:
    """One token more for every open text."""
    prompts, groups, beams = state.open.scores.shape
    logprobs = jax.nn.log_softmax(logits_RV, axis=-1).reshape(prompts, groups, beams, -1)
    chosen = [None] * groups
    taken_PV = jnp.zeros((prompts, logprobs.shape[-1]), jnp.float32)
    searching_PG = state.is_searching(rules)
    for group in range(groups):
        part = jax.tree.map(lambda array, group=group: array[:, group], state.open)
        penalized = logprobs[:, group] - rules.diversity_penalty * taken_PV[:, None] if group else logprobs[:, group]
        chosen[group] = _choose(part, penalized, state.count, rules)
        tokens_PK = _take(chosen[group]['tokens'], chosen[group]['next'])
        if groups > 1:
            taken_PKV = jax.nn.one_hot(tokens_PK, taken_PV.shape[-1]) * searching_PG[:, group, None, None]
            taken_PV += jnp.sum(taken_PKV, axis=1)
    found = {name: jnp.stack([part[name] for part in chosen], axis=1) for name in chosen[0]}
    place_P11 = (rules.prompts_P + state.count)[:, None, None]
    here = jnp.arange(state.open.tokens.shape[-1]) == place_P11[..., None]
    parents = state.open.take(found['parents'])
    token_logprobs = jnp.take_along_axis(_take(logprobs, found['parents']), found['tokens'][..., None], axis=-1)
    candidates = Texts(
        jnp.where(here, found['tokens'][..., None], parents.tokens),
        jnp.where(here, token_logprobs, parents.logprobs),
        found['scores'],
    )
    first_rows = jnp.arange(prompts * groups).reshape(prompts, groups, 1) * beams
    state = _end(state, candidates, found['ends'], rules)
    state = state.replace(
        open=candidates.replace(scores=found['running']).take(found['next']),
        parents_R=(_take(found['parents'], found['next']) + first_rows).reshape(-1),
        count=state.count + 1,
    )
    return state.replace(improvable=state.improvable & _is_improvable(state, rules))


def _choose(texts: Texts, logprobs_PKV: jax.Array, count: jax.Array, rules: Rules) -> dict[str, jax.Array]:
    """The 2K best continuations of one group's texts [P, K], and which K of them to go on with.

    They are enough: at most K of them end.
    """
    prompts, beams, vocab = logprobs_PKV.shape
    flat = jax.tree.map(lambda array: array.reshape(prompts * beams, *array.shape[2:]), texts)
    lengths_R, new_R = jnp.repeat(rules.prompts_P, beams) + count, jnp.full(prompts * beams, count)
    processed_RV = rules.chain.process(logprobs_PKV.reshape(-1, vocab), flat.tokens, lengths_R, new_R)
    totals_PX = (processed_RV + flat.scores[:, None]).reshape(prompts, beams * vocab)
    scores_PC, index_PC = jax.lax.top_k(totals_PX, 2 * beams)
    tokens_PC = index_PC % vocab
    is_end_PC = tokens_PC == rules.chain.end_of_text
    running_PC = scores_PC + jnp.where(is_end_PC, NEVER, 0.0)
    return {
        'scores': scores_PC,
        'parents': index_PC // vocab,
        'tokens': tokens_PC,
        'ends': is_end_PC | (count + 1 >= rules.max_new_tokens),
        'running': running_PC,
        'next': jax.lax.top_k(running_PC, beams)[1],
    }


def _end(state: State, candidates: Texts, ends: jax.Array, rules: Rules) -> State:
    """The best of the texts that ended before and now; only of the K best candidates is an end an end."""
    beams, count = state.counts.shape[-1], state.count + 1
    ends &= jnp.arange(2 * beams) < beams
    barred = ~state.is_searching(rules)[..., None] | ~ends
    scores = rules.normalize(candidates.scores, count) + jnp.where(barred, NEVER, 0.0)
    both = jax.tree.map(
        lambda before, now: jnp.concatenate([before, now], axis=2), state.ended, candidates.replace(scores=scores)
    )
    index = jax.lax.top_k(both.scores, beams)[1]
    counts = jnp.concatenate([state.counts, jnp.full(ends.shape, count)], axis=2)
    has_ended = jnp.concatenate([state.has_ended, ends], axis=2)
    return state.replace(ended=both.take(index), counts=_take(counts, index), has_ended=_take(has_ended, index))


def _is_improvable(state: State, rules: Rules) -> jax.Array:
    """[P, G]: whether the best open text, at the length it is judged by, beats the worst of the ended ones."""
    count = jnp.where(rules.hopes_for_longest, rules.max_new_tokens, state.count)
    best = rules.normalize(state.open.scores[..., 0], count)
    worst = jnp.where(jnp.all(state.has_ended, axis=-1), jnp.min(state.ended.scores, axis=-1), NEVER)
    return best > worst


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """`array` [..., K, rest] at `index` [..., N]: [..., N, rest]."""
    axis = index.ndim - 1
    return jnp.take_along_axis(array, index.reshape(*index.shape, *[1] * (array.ndim - index.ndim)), axis=axis)
