"""Beam search: the likeliest texts among those that begin with the likeliest tokens.

Meanings and scores are those of Hugging Face's `generate`. After the settings and the host's side comes what happens on
the device: all hypotheses of all groups and prompts, one token a step.

Shape suffixes beside the model's: P prompts, G groups of beams, K beams of a group, C candidates of a group,
R rows of the cache (P * G * K), L length of a text. Arrays without a suffix are [P, G, ...].
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import InputError
from gpt_jax.inference.engine import Engine, pack, padded_length, read, run_steps
from gpt_jax.inference.generate import Generation, Request, StoppingCriteria, longest_text
from gpt_jax.inference.sampling import Chain, Sampling, check_whole, check_within
from gpt_jax.models.cache import Cache, take_rows
from gpt_jax.parallel import activate

# A step sorts the continuations of all beams: with more it takes seconds.
MOST_BEAMS = 4096
# Powers of a length that stay far from the ends of float32, and penalties far above NEVER.
LENGTH_PENALTIES, DIVERSITY_PENALTIES = (-10.0, 10.0), (0.0, 1e6)
# Added to the score of what must not be chosen: far below every score, but not so far that it swallows them all.
NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Beams:
    """Beam search, a strategy of `generate`; the settings have Hugging Face's names.

    A score is the sum of log-probabilities, end-of-text and the effect of filters among them, over length to the power
    of length_penalty.

    Attributes:
      num_beams: texts that are followed at once.
      length_penalty: a text's score is its log-probability over its length to this power: above 0 favours long ones.
      early_stopping: when a search ends that has found num_beams ended texts. True: at once. False: when the best open
        text, if it ended now, would not be among them. 'never': when it could not be, however long it gets.
      num_return_sequences: how many of the best texts come back.
      num_beam_groups: groups of beams that choose in turn (Vijayakumar et al. 2018); 1: no groups.
      diversity_penalty: with groups: taken off a token's log-probability for each beam of the groups before that takes
        the same one at this step.

    Raises:
      InputError: a value is out of range, or values contradict each other.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    draws = False
    largest_batch = None

    def __post_init__(self):
        for name in ('num_beams', 'num_return_sequences', 'num_beam_groups'):
            check_whole(name, getattr(self, name), 1, MOST_BEAMS)
        check_within('length_penalty', self.length_penalty, *LENGTH_PENALTIES)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != 'never':
            raise InputError(f"early_stopping={self.early_stopping!r} must be True, False or 'never'")
        if self.num_return_sequences > self.num_beams:
            raise InputError(
                f'num_return_sequences={self.num_return_sequences} exceeds num_beams={self.num_beams}; '
                'use more beams or fewer sequences'
            )
        if self.num_beams % self.num_beam_groups:
            raise InputError(f'num_beams={self.num_beams} must be a multiple of num_beam_groups={self.num_beam_groups}')
        check_within('diversity_penalty', self.diversity_penalty, *DIVERSITY_PENALTIES)
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise InputError(
                f'diversity_penalty={self.diversity_penalty} is between groups of beams: set num_beam_groups as well'
            )

    def rows(self, vocab_size: int) -> int:
        """Of the KV cache, for each request."""
        del vocab_size
        return self.num_beams

    def check_settings(self, sampling: Sampling, stopping: StoppingCriteria) -> None:
        """Raises InputError where they do not go with beams."""
        if not sampling.greedy:
            raise InputError(
                f'num_beams={self.num_beams} with sampling: a beam search draws nothing; leave out temperature, top_k, '
                'top_p, min_p and typical_p'
            )
        stopping.check_search('beam search')

    def check(self, engine: Engine, requests: Sequence[Request], stopping: StoppingCriteria) -> None:
        """Any model does, for any requests."""

    def begin(
        self, engine: Engine, requests: Sequence[Request], sampling: Sampling, stopping: StoppingCriteria, seed: int
    ) -> 'BeamBatch':
        """A search for each request."""
        del seed
        return BeamBatch(engine, requests, self, sampling, stopping)


class BeamBatch:
    """Searches on their way; their texts are there when all of them have ended.

    Attributes:
      unfinished: whether any search goes on.
      generations: at the end the best texts of each request.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        beams: Beams,
        sampling: Sampling,
        stopping: StoppingCriteria,
    ):
        self._engine, self._beams, self._stopping, self._count = engine, beams, stopping, len(requests)
        length = longest_text(requests, stopping)
        # Rows that fill the batch up are done before they begin.
        rows = engine.batch_size(len(requests))
        prompts = [request.prompt for request in requests] + [[0]] * (rows - len(requests))
        tokens_PL, self._prompts_P = pack(prompts, padded_length(length))
        self._rules = Rules(
            chain=sampling.chain(engine.model.config.vocab_size, stopping.ends),
            max_new_tokens=np.int32(stopping.max_new_tokens),
            length_penalty=np.float32(beams.length_penalty),
            diversity_penalty=np.float32(beams.diversity_penalty),
            ends_when_full=np.bool_(beams.early_stopping is True),
            hopes_for_longest=np.bool_(beams.early_stopping == 'never' and beams.length_penalty > 0),
            prompts_P=self._prompts_P,
        )
        logits_PV, cache = engine.prefill(prompts, length)
        sizes = (beams.num_beam_groups, beams.num_beams // beams.num_beam_groups)
        is_request_P = np.arange(rows) < len(requests)
        self._state = start_beams(logits_PV, cache, tokens_PL, is_request_P, self._rules, *sizes)
        self.unfinished, self.generations = True, []

    def advance(self, steps: int) -> None:
        """At most `steps` tokens more for each hypothesis."""
        engine = self._engine
        self._state = advance_beams(engine.model, engine.mesh, engine.params, self._state, self._rules, steps)
        self.unfinished = bool(goes_on(self._state, self._rules))
        if not self.unfinished:
            ended, counts = jax.tree.map(np.asarray, (self._state.ended, self._state.counts))
            for request in range(self._count):
                parts = jax.tree.map(lambda array, request=request: array[request], (ended, counts))
                self.generations += self._best(*parts, int(self._prompts_P[request]))

    def _best(self, ended: 'Hypotheses', counts: np.ndarray, prompt: int) -> list[Generation]:
        """The best of all groups of one request."""
        beams, results = self._beams, []
        ended, counts = jax.tree.map(lambda array: array.reshape(beams.num_beams, *array.shape[2:]), (ended, counts))
        for index in np.argsort(-ended.scores, kind='stable')[: beams.num_return_sequences]:
            new = slice(prompt, prompt + counts[index])
            found = (ended.tokens[index, new], ended.logprobs[index, new])
            results.append(Generation.finished(*found, self._stopping.ends, float(ended.scores[index])))
        return results


# What happens on the device.


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
class Hypotheses:
    """Texts [P, G, K or C, ...]: prompt and new tokens, the model's log-probabilities of tokens, scores."""

    tokens: jax.Array
    logprobs: jax.Array
    scores: jax.Array

    def take(self, index: jax.Array) -> 'Hypotheses':
        """Those at `index` [P, G, any]."""
        return jax.tree.map(lambda array: _take(array, index), self)


@flax.struct.dataclass
class BeamState:
    """A search between two steps.

    Attributes:
      cache: of all but the last token of each open text, as rows.
      parents_R: the row of `cache` that each open text goes on from.
      count: new tokens of each open text.
      open: texts that have not ended, the best first; scores not normalized.
      ended: the best texts that have, the best first; where `has_ended` is False none is there.
      counts, has_ended: [P, G, K], new tokens of the ended texts.
      improvable: bool [P, G], whether an open text may still get among the ended ones.
    """

    cache: Cache
    parents_R: jax.Array
    count: jax.Array
    open: Hypotheses
    ended: Hypotheses
    counts: jax.Array
    has_ended: jax.Array
    improvable: jax.Array

    def is_searching(self, rules: Rules) -> jax.Array:
        """bool [P, G]: which groups can still change what they have found."""
        return self.improvable & ~(jnp.all(self.has_ended, axis=-1) & rules.ends_when_full)


@functools.partial(jax.jit, static_argnames=('groups', 'beams'))
def start_beams(logits_PV, cache: Cache, tokens_PL, is_request_P, rules: Rules, groups: int, beams: int) -> BeamState:
    """The first tokens, from the logits after each prompt; rows that are no request (`is_request_P`) end nothing."""
    rows_R = jnp.repeat(jnp.arange(logits_PV.shape[0]), groups * beams)
    shape = (logits_PV.shape[0], groups, beams)
    tokens = jnp.broadcast_to(tokens_PL[:, None, None], (*shape, tokens_PL.shape[1]))
    nothing = Hypotheses(tokens, jnp.zeros(tokens.shape, jnp.float32), jnp.full(shape, NEVER, jnp.float32))
    state = BeamState(
        cache=take_rows(cache, rows_R),
        parents_R=jnp.arange(rows_R.size),
        count=jnp.zeros((), jnp.int32),
        # All beams are the same now: only the first of each group is gone on from.
        open=nothing.replace(scores=nothing.scores.at[:, :, 0].set(0.0)),
        ended=nothing,
        counts=jnp.zeros(shape, jnp.int32),
        has_ended=jnp.zeros(shape, bool),
        improvable=jnp.broadcast_to(is_request_P[:, None], shape[:2]),
    )
    return _step(state, logits_PV[rows_R], rules)


@functools.partial(jax.jit, static_argnames=('model', 'mesh'), donate_argnames='state')
def advance_beams(model, mesh, params, state: BeamState, rules: Rules, steps) -> BeamState:
    """At most `steps` tokens more, for as long as any search goes on; `state` is donated."""

    def step(state):
        last_R = jnp.repeat(rules.prompts_P, state.parents_R.size // rules.prompts_P.size) + state.count - 1
        tokens_RL = state.open.tokens.reshape(last_R.size, -1)
        last_R1 = jnp.take_along_axis(tokens_RL, last_R[:, None], axis=1)
        # One gather a step reorders the cache: slots carry their positions with them, so banded rings need no rule.
        logits_R1V, cache = read(model, params, take_rows(state.cache, state.parents_R), last_R1)
        return _step(state.replace(cache=cache), logits_R1V[:, 0], rules)

    with activate(mesh):
        return run_steps(step, lambda state: goes_on(state, rules), steps, state)


@jax.jit
def goes_on(state: BeamState, rules: Rules) -> jax.Array:
    """Whether any search has a step to take."""
    return (state.count < rules.max_new_tokens) & jnp.any(state.is_searching(rules))


def _step(state: BeamState, logits_RV: jax.Array, rules: Rules) -> BeamState:
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
    candidates = Hypotheses(
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


def _choose(texts: Hypotheses, logprobs_PKV: jax.Array, count: jax.Array, rules: Rules) -> dict[str, jax.Array]:
    """The C best continuations of one group's texts [P, K], and which K of them to go on with.

    C is K for each token that ends a text, and K more: so many are enough, as each beam has one of each end at most.
    """
    prompts, beams, vocab = logprobs_PKV.shape
    flat = jax.tree.map(lambda array: array.reshape(prompts * beams, *array.shape[2:]), texts)
    lengths_R, new_R = jnp.repeat(rules.prompts_P, beams) + count, jnp.full(prompts * beams, count)
    processed_RV = rules.chain.process(logprobs_PKV.reshape(-1, vocab), flat.tokens, lengths_R, new_R)
    totals_PX = (processed_RV + flat.scores[:, None]).reshape(prompts, beams * vocab)
    scores_PC, index_PC = jax.lax.top_k(totals_PX, min((1 + rules.chain.ends_E.size) * beams, beams * vocab))
    tokens_PC = index_PC % vocab
    is_end_PC = rules.chain.is_end(tokens_PC)
    running_PC = scores_PC + jnp.where(is_end_PC, NEVER, 0.0)
    return {
        'scores': scores_PC,
        'parents': index_PC // vocab,
        'tokens': tokens_PC,
        'ends': is_end_PC | (count + 1 >= rules.max_new_tokens),
        'running': running_PC,
        'next': jax.lax.top_k(running_PC, beams)[1],
    }


def _end(state: BeamState, candidates: Hypotheses, ends: jax.Array, rules: Rules) -> BeamState:
    """The best of the texts that ended before and now; only of the K best candidates is an end an end."""
    beams, count = state.counts.shape[-1], state.count + 1
    ends &= jnp.arange(ends.shape[-1]) < beams
    barred = ~state.is_searching(rules)[..., None] | ~ends
    scores = rules.normalize(candidates.scores, count) + jnp.where(barred, NEVER, 0.0)
    both = jax.tree.map(
        lambda before, now: jnp.concatenate([before, now], axis=2), state.ended, candidates.replace(scores=scores)
    )
    index = jax.lax.top_k(both.scores, beams)[1]
    counts = jnp.concatenate([state.counts, jnp.full(ends.shape, count)], axis=2)
    has_ended = jnp.concatenate([state.has_ended, ends], axis=2)
    return state.replace(ended=both.take(index), counts=_take(counts, index), has_ended=_take(has_ended, index))


def _is_improvable(state: BeamState, rules: Rules) -> jax.Array:
    """[P, G]: whether the best open text, at the length it is judged by, beats the worst of the ended ones."""
    count = jnp.where(rules.hopes_for_longest, rules.max_new_tokens, state.count)
    best = rules.normalize(state.open.scores[..., 0], count)
    worst = jnp.where(jnp.all(state.has_ended, axis=-1), jnp.min(state.ended.scores, axis=-1), NEVER)
    return best > worst


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """`array` [..., K, rest] at `index` [..., N]: [..., N, rest]."""
    axis = index.ndim - 1
    return jnp.take_along_axis(array, index.reshape(*index.shape, *[1] * (array.ndim - index.ndim)), axis=axis)
