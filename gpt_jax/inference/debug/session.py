"""The debugger: commands in, replies out, and the state between them. Nothing here reads or prints."""

import dataclasses
import functools
from collections.abc import Sequence

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.inference.debug import choice, commands, picture, views
from gpt_jax.inference.debug.microscope import Microscope
from gpt_jax.inference.debug.moment import Moment
from gpt_jax.inference.sampling import Sampling
from gpt_jax.inference.text import harmless

Reply = list[str | views.Table | picture.Picture]


@dataclasses.dataclass(frozen=True)
class Taken:
    """A token of the text.

    Attributes:
      token: its id.
      rank: its place in the model's order, from 1.
      probability: the model's own.
      drawn_from: its probability after all filters; 0 where one dropped it.
      entropy: of the model's distribution, in nats.
      forced: whether a command named it.
    """

    token: int
    rank: int
    probability: float
    drawn_from: float
    entropy: float
    forced: bool


@dataclasses.dataclass(frozen=True)
class State:
    """All that commands change.

    Attributes:
      taken: the new tokens, the oldest first.
      sampling: how the next one is chosen.
      seed: of the draws.
      top: how many candidates are shown.
      done: whether the session is over.
    """

    taken: tuple[Taken, ...]
    sampling: Sampling
    seed: int
    top: int = 10
    done: bool = False


class Debugger:
    """Generates from one prompt under commands.

    `respond` is a function of a state and a command: the same ones give the same answer, whatever came before.

    Args:
      microscope: the model.
      tokenizer: of its vocabulary.
      prompt: token ids; empty starts a new document, from end-of-text.
      max_new_tokens: where `run` stops.

    Raises:
      InputError: the prompt leaves no room in block_size, or max_new_tokens is below 1.
    """

    def __init__(self, microscope: Microscope, tokenizer: Tokenizer, prompt: Sequence[int], max_new_tokens: int):
        self._microscope, self._tokenizer = microscope, tokenizer
        self._prompt = tuple(prompt) or (tokenizer.end_of_text,)
        self._room = microscope.block_size - len(self._prompt)
        if max_new_tokens < 1:
            raise InputError(f'max_new_tokens={max_new_tokens} must be at least 1')
        if self._room < 1:
            raise InputError(
                f'the prompt has {len(self._prompt)} tokens and the model sees block_size={microscope.block_size} in '
                f'all; shorten the prompt to at most {microscope.block_size - 1}'
            )
        self._max_new_tokens = min(max_new_tokens, self._room)
        self._moment = functools.lru_cache(maxsize=16)(self._make_moment)

    def start(self, sampling: Sampling, seed: int = 0) -> tuple[State, Reply]:
        """The state before the first token."""
        state = State((), sampling, seed)
        return state, ['help lists the commands', *self._view(state)]

    def respond(self, state: State, line: str) -> tuple[State, Reply]:
        """The state after a command, and what there is to show; a command that cannot be changes nothing."""
        name, _, argument = line.strip('\r\n').lstrip().partition(' ')
        try:
            return getattr(self, f'_{commands.full_name(name)}')(state, argument)
        except InputError as error:
            return state, [f'error: {error}']

    # What the state means.

    def _tokens(self, state: State) -> tuple[int, ...]:
        return (*self._prompt, *(each.token for each in state.taken))

    def _make_moment(self, sampling: Sampling, seed: int, new: int, tokens: tuple[int, ...]) -> Moment:
        logits_V = self._microscope.lens(tokens)[-1]
        return choice.choose(sampling, logits_V, tokens, new, self._tokenizer.end_of_text, seed)

    def _moment_of(self, state: State) -> Moment:
        return self._moment(state.sampling, state.seed, len(state.taken), self._tokens(state))

    def _over(self, state: State) -> str | None:
        """Why no token can be taken, if none can."""
        if state.taken and state.taken[-1].token == self._tokenizer.end_of_text:
            return 'the text has ended'
        if len(state.taken) >= self._room:
            return f'prompt and text fill block_size={self._microscope.block_size}'
        return None

    def _take(self, state: State, token: int | None = None) -> State:
        """With one more token: the one that is drawn, or the one that is forced."""
        reason = self._over(state)
        if reason:
            raise InputError(f'{reason}; go back, or quit')
        moment = self._moment_of(state)
        chosen = moment.chosen if token is None else token
        probability, drawn_from = map(float, moment.probabilities[(0, -1), chosen])
        numbers = (moment.rank(chosen), probability, drawn_from, float(moment.entropies[0]))
        return dataclasses.replace(state, taken=(*state.taken, Taken(chosen, *numbers, forced=token is not None)))

    def _view(self, state: State) -> Reply:
        reason = self._over(state)
        if reason:
            return [f'{reason}: back undoes, quit leaves']
        moment, count = self._moment_of(state), len(self._tokens(state))
        title = f'token {len(state.taken)} of the text, after {count} tokens: {self._tail(state)}'
        return [views.candidates(moment, self._tokenizer, state.top, title)]

    def _tail(self, state: State) -> str:
        text = self._tokenizer.decode(self._tokens(state))
        return repr(text if len(text) <= 40 else f'...{text[-37:]}')

    def _history_of(self, state: State, first: int) -> views.Table:
        rows = []
        for index, taken in enumerate(state.taken[first:], first):
            shares = map(views.show_probability, (taken.probability, taken.drawn_from))
            name, how = views.show_token(self._tokenizer, taken.token), 'forced' if taken.forced else ''
            rows.append((str(index), name, str(taken.rank), *shares, f'{taken.entropy:.3f}', how))
        header = ('', 'token', 'rank', 'model', 'after all filters', 'entropy', '')
        return views.Table('tokens taken', header, tuple(rows))

    # The commands, each a function of the state and its argument.

    def _step(self, state: State, _: str) -> tuple[State, Reply]:
        state = self._take(state)
        return state, self._view(state)

    def _run(self, state: State, argument: str) -> tuple[State, Reply]:
        count = commands.number(argument or str(max(self._max_new_tokens - len(state.taken), 1)), 'N', 1)
        first = len(state.taken)
        state = self._take(state)
        while len(state.taken) < first + count and not self._over(state):
            state = self._take(state)
        return state, [self._history_of(state, first), *self._view(state)]

    def _back(self, state: State, argument: str) -> tuple[State, Reply]:
        count = commands.number(argument or '1', 'N', 1)
        if count > len(state.taken):
            raise InputError(f'N={count}: only {len(state.taken)} tokens have been taken')
        state = dataclasses.replace(state, taken=state.taken[:-count])
        return state, self._view(state)

    def _pick(self, state: State, argument: str) -> tuple[State, Reply]:
        logprobs_V = self._moment_of(state).logprobs_SV[0]
        wanted = commands.number(argument, 'RANK', 1, logprobs_V.size)
        state = self._take(state, int(views.likeliest(logprobs_V, wanted)[-1]))
        return state, self._view(state)

    def _force(self, state: State, argument: str) -> tuple[State, Reply]:
        for token in commands.tokens(argument, self._tokenizer):
            state = self._take(state, token)
        return state, self._view(state)

    def _show(self, state: State, _: str) -> tuple[State, Reply]:
        return state, self._view(state)

    def _top(self, state: State, argument: str) -> tuple[State, Reply]:
        state = dataclasses.replace(state, top=commands.number(argument, 'N', 1))
        return state, self._view(state)

    def _lens(self, state: State, _: str) -> tuple[State, Reply]:
        logits_LV = self._microscope.lens(self._tokens(state))
        return state, [views.lens(logits_LV, self._tokenizer, self._moment_of(state).chosen)]

    def _attention(self, state: State, argument: str) -> tuple[State, Reply]:
        words = argument.split(maxsplit=2)
        if len(words) < 2:
            raise InputError('attention needs a layer and a head, as in: attention 0 1')
        layer = commands.number(words[0], 'LAYER', 0, self._microscope.n_layer - 1)
        head = words[1] if words[1] == 'mean' else commands.number(words[1], 'HEAD', 0, self._microscope.n_head - 1)
        tokens = self._tokens(state)
        maps_NTS = self._microscope.attention(tokens, layer)
        weights_TS = maps_NTS.mean(axis=0) if head == 'mean' else maps_NTS[head]
        title = f'layer {layer}, ' + ('mean of all heads' if head == 'mean' else f'head {head}')
        reply = [
            views.most_attended(weights_TS[-1], tokens, self._tokenizer, f'{title}: what the last token looks at'),
            views.attention_map(weights_TS, tokens, self._tokenizer),
        ]
        if len(words) == 3:
            labels = tuple(views.show_token(self._tokenizer, token) for token in tokens)
            reply.append(picture.Picture(words[2], weights_TS, labels, title))
        return state, reply

    def _history(self, state: State, _: str) -> tuple[State, Reply]:
        return state, [self._history_of(state, 0)]

    def _text(self, state: State, _: str) -> tuple[State, Reply]:
        return state, [harmless(self._tokenizer.decode(self._tokens(state)))]

    def _set(self, state: State, argument: str) -> tuple[State, Reply]:
        state = dataclasses.replace(state, sampling=commands.changed(state.sampling, argument))
        return state, self._view(state)

    def _seed(self, state: State, argument: str) -> tuple[State, Reply]:
        state = dataclasses.replace(state, seed=commands.number(argument, 'N', 0, commands.LARGEST_SEED))
        return state, self._view(state)

    def _help(self, state: State, _: str) -> tuple[State, Reply]:
        rows = tuple((f'{name} {arguments}'.strip(), meaning) for name, arguments, meaning in commands.COMMANDS)
        return state, [views.Table('commands; their first letters are enough', ('command', 'what it does'), rows)]

    def _quit(self, state: State, _: str) -> tuple[State, Reply]:
        return dataclasses.replace(state, done=True), []
